/* table.c - see table.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "pipe/table.h"

#include <stdarg.h>

static void add(struct table *t, const char *text, size_t bytes) {
    t->cell = mem_grow(t->cell, (size_t)(t->cells + 1) * sizeof *t->cell);
    char *copy = mem_alloc(bytes + 1);
    memcpy(copy, text, bytes);
    t->cell[t->cells++] = copy;
}

void table_init(struct table *t, const char *head) {
    *t = (struct table){ 0 };
    for (const char *p = head;; p++) {
        if (*p == '<') t->left |= 1u << t->columns, p++;
        const size_t n = strcspn(p, "|");
        add(t, p, n);
        t->columns++;
        p += n;
        if (!*p) break;
    }
}

void table_release(struct table *t) {
    for (int i = 0; i < t->cells; i++) free(t->cell[i]);
    free(t->cell);
    *t = (struct table){ 0 };
}

void table_cell(struct table *t, const char *fmt, ...) {
    char text[2000];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    add(t, text, strlen(text));
}

static int width(const struct table *t, int column) {
    int most = 0;
    for (int i = column; i < t->cells; i += t->columns)
        if ((int)strlen(t->cell[i]) > most) most = (int)strlen(t->cell[i]);
    return most;
}

static void print_text(const struct table *t, FILE *to) {
    for (int i = 0; i < t->cells; i++) {
        const int c = i % t->columns, wide = width(t, c);
        const bool left = t->left >> c & 1, last = c + 1 == t->columns;
        fprintf(to, "  %*s", left ? (last ? 0 : -wide) : wide, t->cell[i]);
        if (last) fputc('\n', to);
    }
}

static void print_markdown(const struct table *t, FILE *to) {
    for (int i = 0; i < t->cells; i++) {
        fputs("| ", to);
        for (const char *p = t->cell[i]; *p; p++) fprintf(to, "%s%c", *p == '|' ? "\\" : "", *p);
        fputc(' ', to);
        if ((i + 1) % t->columns) continue;
        fputs("|\n", to);
        for (int c = 0; i + 1 == t->columns && c < t->columns; c++)
            fputs(t->left >> c & 1 ? "| --- " : "| ---: ", to);
        if (i + 1 == t->columns) fputs("|\n", to);
    }
}

void table_print(struct table *t, bool markdown, FILE *to) {
    while (t->cells % t->columns) add(t, "", 0);
    if (markdown) print_markdown(t, to);
    else print_text(t, to);
}
