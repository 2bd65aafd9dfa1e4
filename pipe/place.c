/* place.c - see place.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "pipe/place.h"

#include <ctype.h>
#include <dirent.h>

#include "lib/base/str.h"

void place_machine(struct place_machine *m) {
    CPU_ZERO(&m->cores);
    m->gpus = 0;
    sched_getaffinity(0, sizeof m->cores, &m->cores);
    DIR *d = opendir("/dev");
    for (struct dirent *entry; d && (entry = readdir(d));) {
        int64_t n;
        if (str_starts(entry->d_name, "nvidia") && str_to_i64(entry->d_name + 6, &n) && n >= 0 &&
            n < 64)
            m->gpus |= 1ull << n;
    }
    if (d) closedir(d);
    d = m->gpus ? NULL : opendir("/proc/driver/nvidia/gpus");
    int n = 0;
    for (struct dirent *entry; d && (entry = readdir(d));)
        if (entry->d_name[0] != '.' && n < 64) m->gpus |= 1ull << n++;
    if (d) closedir(d);
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
    snprintf(out, size, "%s:%s", c->gpu ? "gpu" : "cpu", ids);
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
    if (c->gpu) c->cores = m->cores;
    do {
        long first, last, most = c->gpu ? 63 : CPU_SETSIZE - 1;
        if (read_range(&ids, &first, &last) < 0 || last > most)
            return err_set(e, "place '%s': write numbers up to %ld and ranges, as in 'cpu:0-3,8'",
                           s, most);
        for (long i = first; i <= last; i++) {
            if (c->gpu) c->gpus |= 1ull << i;
            else CPU_SET((size_t)i, &c->cores);
        }
    } while (*ids);
    return 0;
}

int place_read(struct place *p, const char *text, const struct place_machine *m, struct err *e) {
    char copy[400];
    *p = (struct place){ .taken = -1 };
    if ((size_t)snprintf(copy, sizeof copy, "%s", text) >= sizeof copy)
        return err_set(e, "place is too long");
    char *save = NULL;
    for (char *s = strtok_r(copy, "|", &save); s; s = strtok_r(NULL, "|", &save)) {
        while (*s == ' ') s++;
        for (size_t n = strlen(s); n && s[n - 1] == ' ';) s[--n] = 0;
        if (p->choices == PLACE_ALTERNATIVES_MAX)
            return err_set(e, "place has more than %d alternatives", PLACE_ALTERNATIVES_MAX);
        if (read_choice(&p->choice[p->choices++], s, m, e) < 0) return -1;
    }
    return p->choices ? 0 : err_set(e, "place is empty: write 'cpu:*' for all cores");
}

int place_take(struct place *p, const char *text, const struct place_machine *m, struct err *e) {
    for (int i = 0; i < p->choices; i++) {
        cpu_set_t both;
        CPU_AND(&both, &p->choice[i].cores, &m->cores);
        bool has = p->choice[i].gpu ? (p->choice[i].gpus & ~m->gpus) == 0
                                    : CPU_EQUAL(&both, &p->choice[i].cores);
        if (!has) continue;
        p->taken = i;
        return 0;
    }
    char cores[400], gpus[200];
    place_cores_text(cores, sizeof cores, &m->cores);
    place_gpus_text(gpus, sizeof gpus, m->gpus);
    return err_code(e, EXIT_ENV,
                    "place '%s': this machine has cores %s and %s%s; add '| cpu:*' or choose among "
                    "these",
                    text, cores, m->gpus ? "GPUs " : "no GPU", gpus);
}
