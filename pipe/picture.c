/* picture.c - a comparison as an SVG picture: accuracy on the test questions above, reward on the
 * training batches below, both over the axis of the alignment.
 *
 * A band is the 95 % Wilson interval of one run's score; an arm with seeds shows all its runs.
 * SPDX-License-Identifier: Apache-2.0 */
#include "pipe/compare.h"

#include <math.h>

#include "lib/base/fs.h"

/* pixels; everything below the list of arms is moved down by its lines */
enum { WIDE = 860, LEFT = 70, RIGHT = 30, LINE = 16, TOP = 60, SPLIT = 420, BOTTOM = 580,
       HIGH = 640 };
static const char *const colour[] = { "#1f4e8c", "#c44e1a", "#2c7a3d", "#7a3d9a",
                                      "#8a6d1f", "#a3244b", "#1d7f86", "#555555" };

struct panel { double x0, x1, y0, y1; int top, bottom; };    /* values at the edges, pixels */

static double px(const struct panel *p, double x) {
    return LEFT + (x - p->x0) / (p->x1 - p->x0) * (WIDE - LEFT - RIGHT);
}

static double py(const struct panel *p, double y) {
    return p->bottom - (y - p->y0) / (p->y1 - p->y0) * (p->bottom - p->top);
}

static double axis_of(const struct comparison *c, const struct result *r, int64_t step) {
    const struct point *at = result_point(r, step);
    if (c->align == ALIGN_STEP) return (double)step;
    return !at ? NAN : c->align == ALIGN_PROMPTS ? at->prompts : at->tokens;
}

static void text(struct str *out, double x, double y, const char *more, const char *what) {
    str_printf(out, "<text x=\"%.1f\" y=\"%.1f\" %s>", x, y, more);
    for (; *what; what++) {
        if (*what == '&') str_puts(out, "&amp;");
        else if (*what == '<') str_puts(out, "&lt;");
        else str_add(out, what, 1);
    }
    str_puts(out, "</text>\n");
}

/* Three to seven round numbers between the edges. */
static double tick_of(double span) {
    const double unit = pow(10, floor(log10(span > 0 ? span : 1)));
    return span / unit < 2 ? unit / 5 : span / unit < 5 ? unit / 2 : unit;
}

static void draw_axes(struct str *out, const struct panel *p, const char *title) {
    char label[40];
    const double dy = tick_of(p->y1 - p->y0), dx = tick_of(p->x1 - p->x0);
    text(out, LEFT, p->top - 8, "font-weight=\"bold\"", title);
    for (double y = ceil(p->y0 / dy) * dy; y <= p->y1 + dy * 1e-6; y += dy) {
        str_printf(out, "<line x1=\"%d\" x2=\"%d\" y1=\"%.1f\" y2=\"%.1f\" stroke=\"#dddddd\"/>\n",
                   LEFT, WIDE - RIGHT, py(p, y), py(p, y));
        snprintf(label, sizeof label, "%.4g", fabs(y) < dy * 1e-6 ? 0 : y);
        text(out, LEFT - 8, py(p, y) + 4, "text-anchor=\"end\"", label);
    }
    for (double x = ceil(p->x0 / dx) * dx; x <= p->x1 + dx * 1e-6; x += dx) {
        snprintf(label, sizeof label, "%.6g", x);
        text(out, px(p, x), p->bottom + 18, "text-anchor=\"middle\"", label);
    }
}

static void draw_band(struct str *out, const struct comparison *c, const struct panel *p, int arm) {
    const struct arm *a = &c->arm[arm];
    const struct result *r = a->run[0];
    if (a->n > 1 || !r->score_n || !r->score[0].n) return;
    str_printf(out, "<polygon fill=\"%s\" fill-opacity=\"0.12\" points=\"",
               colour[arm % (int)COUNT_OF(colour)]);
    for (int i = 0; i < 2 * r->score_n; i++) {
        const bool back = i >= r->score_n;
        const struct score *s = &r->score[back ? 2 * r->score_n - 1 - i : i];
        const double x = axis_of(c, r, s->step);
        if (!isnan(x)) str_printf(out, "%.1f,%.1f ", px(p, x), py(p, 100 * (back ? s->low
                                                                               : s->high)));
    }
    str_puts(out, "\"/>\n");
}

static void draw_line(struct str *out, const struct comparison *c, const struct panel *p, int arm,
                      const struct result *r, bool reward, double width) {
    str_printf(out, "<polyline fill=\"none\" stroke=\"%s\" stroke-width=\"%.1f\" points=\"",
               colour[arm % (int)COUNT_OF(colour)], width);
    for (int i = 0; i < (reward ? r->points : r->score_n); i++) {
        const int64_t step = reward ? r->point[i].step : r->score[i].step;
        const double x = axis_of(c, r, step),
                     y = reward ? r->point[i].reward : 100 * result_accuracy(r, step);
        if (!isnan(x) && !isnan(y)) str_printf(out, "%.1f,%.1f ", px(p, x), py(p, y));
    }
    str_puts(out, "\"/>\n");
}

static void stretch(double *low, double *high, double v) {
    if (isnan(v)) return;
    if (v < *low) *low = v;
    if (v > *high) *high = v;
}

static void measure(const struct comparison *c, struct panel *accuracy, struct panel *reward) {
    const int down = c->arms * LINE;
    *accuracy = (struct panel){ 0, 1, 100, 0, down + TOP, down + SPLIT - 60 };
    *reward = (struct panel){ 0, 1, INFINITY, -INFINITY, down + SPLIT, down + BOTTOM };
    for (int i = 0; i < c->runs; i++) {
        const struct result *r = &c->run[i];
        for (int j = 0; j < r->score_n; j++) {
            stretch(&accuracy->y0, &accuracy->y1, 100 * r->score[j].low);
            stretch(&accuracy->y0, &accuracy->y1, 100 * r->score[j].high);
            stretch(&accuracy->x0, &accuracy->x1, axis_of(c, r, r->score[j].step));
        }
        for (int j = 0; j < r->points; j++) {
            stretch(&reward->y0, &reward->y1, r->point[j].reward);
            stretch(&accuracy->x0, &accuracy->x1, axis_of(c, r, r->point[j].step));
        }
    }
    if (accuracy->y1 <= accuracy->y0) accuracy->y0 = 0, accuracy->y1 = 100;
    if (!(reward->y1 > reward->y0)) reward->y0 = fmin(reward->y0, 0), reward->y1 = reward->y0 + 1;
    if (!isfinite(reward->y0)) reward->y0 = 0, reward->y1 = 1;
    reward->x0 = accuracy->x0;
    reward->x1 = accuracy->x1;
}

int compare_picture(const struct comparison *c, const char *path, struct err *e) {
    struct panel accuracy, reward;
    struct str out;
    char axis[80];
    str_init(&out);
    measure(c, &accuracy, &reward);
    str_printf(&out, "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" "
                     "font-family=\"sans-serif\" font-size=\"12\">\n"
                     "<rect width=\"100%%\" height=\"100%%\" fill=\"white\"/>\n",
               WIDE, HIGH + c->arms * LINE);
    if (c->reasons.len)
        text(&out, LEFT, 20, "fill=\"#b00000\" font-weight=\"bold\"",
             "these runs must not be compared (--force)");
    draw_axes(&out, &accuracy, "accuracy on the test questions, %");
    draw_axes(&out, &reward, "reward on the training batches");
    for (int i = 0; i < c->arms; i++) {
        draw_band(&out, c, &accuracy, i);
        for (int j = 0; j < c->arm[i].n; j++) {
            draw_line(&out, c, &accuracy, i, c->arm[i].run[j], false, c->arm[i].n > 1 ? 1 : 2);
            draw_line(&out, c, &reward, i, c->arm[i].run[j], true, 1);
        }
        char more[80];
        snprintf(more, sizeof more, "fill=\"%s\"", colour[i % (int)COUNT_OF(colour)]);
        text(&out, LEFT, 20 + LINE * (i + (c->reasons.len > 0)), more, c->arm[i].label);
    }
    snprintf(axis, sizeof axis, c->align == ALIGN_STEP ? "completed steps"
                                : c->align == ALIGN_PROMPTS ? "prompts since the start"
                                                            : "answer tokens since the start");
    text(&out, WIDE / 2., HIGH - 20 + c->arms * LINE, "text-anchor=\"middle\"", axis);
    str_puts(&out, "</svg>\n");
    const int rc = fs_replace(path, out.s, out.len, e);
    str_release(&out);
    return rc;
}
