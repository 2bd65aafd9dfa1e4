/* place.c - see place.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "pipe/place.h"

#include <ctype.h>
#include <dirent.h>

#include "lib/base/fs.h"
#include "lib/base/gpus.h"
#include "lib/base/json.h"
#include "pipe/proc.h"

static const char *own_gpus(void) { return getenv("CUDA_VISIBLE_DEVICES"); }

json_t *place_devices(struct err *e) {
    char path[FS_PATH_MAX];
    const char *argv[] = { path, "--devices", NULL };
    struct str out, talk;
    int status = 0;
    json_t *o = NULL;
    if (proc_find(path, sizeof path, "qerl-rollout") < 0) {
        err_code(e, EXIT_ENV, "qerl-rollout is not built");
        return NULL;
    }
    str_init(&out);
    str_init(&talk);
    if (proc_capture(argv, &out, &talk, 60, &status, e) == 0) {
        if (status == 0) o = json_parse(out.s, out.len, "qerl-rollout --devices", e);
        else err_code(e, EXIT_ENV, "qerl-rollout --devices ended with %d: %.300s", status, talk.s);
    }
    str_release(&out);
    str_release(&talk);
    return o;
}

static void ask_plugin(struct place_machine *m) {
    struct err e = { 0 };
    json_t *o = place_devices(&e), *all = json_object_get(o, "devices");
    const char *error = json_string_value(json_object_get(o, "error"));
    for (size_t i = 0; i < json_array_size(all) && i < 64; i++) {
        const json_t *arch = json_object_get(json_array_get(all, i), "arch");
        m->gpus |= 1ull << i;
        m->emulated = json_is_string(arch) && strcmp(json_string_value(arch), "emulated") == 0;
    }
    if (!o) error = e.text;
    if (error) snprintf(m->trouble, sizeof m->trouble, "%.399s", error);
    json_decref(o);
}

/* Numbered from 0, as CUDA does: a container that holds /dev/nvidia3 alone has GPU 0. */
static void ask_driver(struct place_machine *m) {
    int there = 0;
    DIR *d = opendir("/dev");
    for (struct dirent *entry; d && (entry = readdir(d));) {
        int64_t n;
        if (str_starts(entry->d_name, "nvidia") && str_to_i64(entry->d_name + 6, &n) && n >= 0 &&
            n < 64)
            there++;
    }
    if (d) closedir(d);
    d = there ? NULL : opendir("/proc/driver/nvidia/gpus");
    for (struct dirent *entry; d && (entry = readdir(d));)
        if (entry->d_name[0] != '.' && there < 64) there++;
    if (d) closedir(d);
    const char *own = own_gpus();
    int given = own ? gpus_count(own) : there;
    if (given > there) given = there;
    if (there && !given)
        snprintf(m->trouble, sizeof m->trouble, "CUDA_VISIBLE_DEVICES is '%.100s': all GPUs are "
                 "hidden", own);
    m->gpus = given < 64 ? (1ull << given) - 1 : ~0ull;
}

void place_machine(struct place_machine *m) {
    const char *plugin = getenv("QERL_CUDA");
    *m = (struct place_machine){ 0 };
    sched_getaffinity(0, sizeof m->cores, &m->cores);
    if (plugin && *plugin) ask_plugin(m);
    else ask_driver(m);
}

void place_cores_text(char *out, size_t size, const cpu_set_t *cores) {
    size_t used = 0;
    out[0] = 0;
    for (int i = 0; i < CPU_SETSIZE && used < size; i++) {
        if (!CPU_ISSET(i, cores)) continue;
        int last = i;
        while (last + 1 < CPU_SETSIZE && CPU_ISSET(last + 1, cores)) last++;
        used += (size_t)snprintf(out + used, size - used, last > i ? "%s%d-%d" : "%s%d",
                                 used ? "," : "", i, last);
        i = last;
    }
}

void place_gpus_text(char *out, size_t size, uint64_t gpus) {
    size_t used = 0;
    out[0] = 0;
    for (int i = 0; i < 64 && used < size; i++)
        if (gpus >> i & 1)
            used += (size_t)snprintf(out + used, size - used, "%s%d", used ? "," : "", i);
}

void place_text(char *out, size_t size, const struct place_choice *c) {
    char ids[400];
    if (c->gpu) place_gpus_text(ids, sizeof ids, c->gpus);
    else place_cores_text(ids, sizeof ids, &c->cores);
    snprintf(out, size, "%s:%s%s", c->gpu ? "gpu" : "cpu", ids,
             c->emulated ? " (emulated device: for tests)" : "");
}

int place_gpus(const struct place_choice *c) { return __builtin_popcountll(c->gpus); }

struct place_choice place_share(const struct place_choice *c, int part) {
    struct place_choice one = *c;
    for (; part > 0; part--) one.gpus &= one.gpus - 1;
    one.gpus &= -one.gpus;
    return one;
}

void place_visible(char *out, size_t size, const struct place_choice *c) {
    const char *own = own_gpus();
    char word[GPUS_WORD_MAX];
    size_t used = 0;
    if (!own) {
        place_gpus_text(out, size, c->gpus);
        return;
    }
    out[0] = 0;
    for (int i = 0; i < 64 && used < size; i++)
        if (c->gpus >> i & 1 && gpus_word(word, own, i) == 0)
            used += (size_t)snprintf(out + used, size - used, "%s%s", used ? "," : "", word);
}

/* "0,2-3": one number or range at *s; moves on. */
static int read_range(const char **s, long *first, long *last) {
    char *end;
    if (!isdigit((unsigned char)**s)) return -1;
    *first = *last = strtol(*s, &end, 10);
    if (*end == '-') {
        if (!isdigit((unsigned char)end[1])) return -1;
        *last = strtol(end + 1, &end, 10);
    }
    if (*end == ',' && end[1]) end++;
    else if (*end) return -1;
    *s = end;
    return *last >= *first ? 0 : -1;
}

static int take_number(struct place_choice *c, long i) {
    if (c->gpu ? c->gpus >> i & 1 : CPU_ISSET((size_t)i, &c->cores)) return -1;
    if (c->gpu) c->gpus |= 1ull << i;
    else CPU_SET((size_t)i, &c->cores);
    return 0;
}

static int read_choice(struct place_choice *c, const char *s, const struct place_machine *m,
                       struct err *e) {
    memset(c, 0, sizeof *c);
    c->gpu = str_starts(s, "gpu:");
    if (!c->gpu && !str_starts(s, "cpu:"))
        return err_set(e, "place '%s' is neither gpu:N nor cpu:N, as in 'gpu:0 | cpu:0-1'", s);
    const char *ids = s + 4;
    if (!c->gpu && strcmp(ids, "*") == 0) {
        c->cores = m->cores;
        return 0;
    }
    do {
        long first, last, most = c->gpu ? 63 : CPU_SETSIZE - 1;
        if (read_range(&ids, &first, &last) < 0 || last > most)
            return err_set(e, "place '%s': write numbers up to %ld and ranges, as in '%s'", s, most,
                           c->gpu ? "gpu:0-1,3" : "cpu:0-3,8");
        for (long i = first; i <= last; i++)
            if (take_number(c, i) < 0)
                return err_set(e, "place '%s' names %s %ld twice: write each once, as in '%s'", s,
                               c->gpu ? "GPU" : "core", i, c->gpu ? "gpu:0-1,3" : "cpu:0-3,8");
    } while (*ids);
    if (c->gpu) c->cores = m->cores;
    return 0;
}

int place_read(struct place *p, const char *text, const struct place_machine *m, struct err *e) {
    char copy[400];
    *p = (struct place){ .taken = -1 };
    if ((size_t)snprintf(copy, sizeof copy, "%s", text) >= sizeof copy)
        return err_set(e, "place is too long");
    if (!copy[strspn(copy, " ")]) return err_set(e, "place is empty: write 'cpu:*' for all cores");
    for (char *rest = copy, *s; (s = strsep(&rest, "|"));) {
        while (*s == ' ') s++;
        for (size_t n = strlen(s); n && s[n - 1] == ' ';) s[--n] = 0;
        if (!*s)
            return err_set(e, "place '%s' has an empty alternative: write one on each side of '|', "
                           "as in 'gpu:0 | cpu:*'", text);
        if (p->choices == PLACE_ALTERNATIVES_MAX)
            return err_set(e, "place has more than %d alternatives", PLACE_ALTERNATIVES_MAX);
        if (read_choice(&p->choice[p->choices++], s, m, e) < 0) return -1;
    }
    return 0;
}

/* Why there is no GPU, where a plugin that is built can say it; "" where not. */
static void ask_reason(char *out, size_t size, const struct place_machine *m) {
    char path[FS_PATH_MAX];
    struct place_machine asked = { 0 };
    snprintf(out, size, "%s", m->trouble);
    if (m->gpus || *out || proc_find(path, sizeof path, "qerl-cuda.so") < 0) return;
    ask_plugin(&asked);
    snprintf(out, size, "%s", asked.trouble);
}

/* The GPUs that stood before the alternative taken, and why they are not it. */
static void note_passed(struct place *p, const struct place_machine *m) {
    size_t used = 0;
    for (int i = 0; i < p->taken && used < sizeof p->passed; i++) {
        char one[450];
        if (!p->choice[i].gpu) continue;
        place_text(one, sizeof one, &p->choice[i]);
        used += (size_t)snprintf(p->passed + used, sizeof p->passed - used, "%s%s",
                                 used ? ", " : "", one);
    }
    if (!used) return;
    const char *own = own_gpus();
    char gpus[200];
    ask_reason(p->why, sizeof p->why, m);
    place_gpus_text(gpus, sizeof gpus, m->gpus);
    if (m->gpus)
        snprintf(p->why, sizeof p->why, "GPUs here: %s%s%.100s%s", gpus,
                 own ? " (CUDA_VISIBLE_DEVICES is '" : "", own ? own : "", own ? "')" : "");
    else if (!*p->why) snprintf(p->why, sizeof p->why, "this machine has no NVIDIA GPU");
}

int place_take(struct place *p, const char *text, const struct place_machine *m, struct err *e) {
    for (int i = 0; i < p->choices; i++) {
        cpu_set_t both;
        CPU_AND(&both, &p->choice[i].cores, &m->cores);
        bool has = p->choice[i].gpu ? (p->choice[i].gpus & ~m->gpus) == 0
                                    : CPU_EQUAL(&both, &p->choice[i].cores);
        if (!has) continue;
        p->choice[i].emulated = p->choice[i].gpu && m->emulated;
        p->taken = i;
        note_passed(p, m);
        return 0;
    }
    char cores[400], gpus[200], trouble[sizeof m->trouble];
    ask_reason(trouble, sizeof trouble, m);
    place_cores_text(cores, sizeof cores, &m->cores);
    place_gpus_text(gpus, sizeof gpus, m->gpus);
    return err_code(e, EXIT_ENV,
                    "place '%s': this machine has cores %s and %s%s%s%s%s; add '| cpu:*' or choose "
                    "among these",
                    text, cores, m->gpus ? "GPUs " : "no GPU", gpus, *trouble ? " (" : "",
                    trouble, *trouble ? ")" : "");
}
