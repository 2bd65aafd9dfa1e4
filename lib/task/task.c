/* task.c - question files, prompts, intervals, order of the questions. See task.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/task/task.h"

#include <errno.h>
#include <math.h>

#include "lib/base/json.h"
#include "lib/base/rng.h"

static const char instruction[] =
    "Let's think step by step and output the final answer after \"####\".";

void task_user_message(struct str *out, const char *question) {
    str_printf(out, "%s %s", question, instruction);
}

static int read_line(struct task_question *q, const char *line, size_t bytes, const char *where,
                     struct err *e) {
    json_t *o = json_parse(line, bytes, where, e);
    const char *question, *answer;
    int rc = -1;
    if (!o) goto done;
    if (!json_is_object(o)) {
        err_set(e, "%s: not a JSON object", where);
        goto done;
    }
    if (json_need_str(o, "question", &question, where, e) < 0 ||
        json_need_str(o, "answer", &answer, where, e) < 0)
        goto done;
    const char *gold = NULL;
    for (const char *p = answer; (p = strstr(p, "#### ")); p += 5) gold = p + 5;
    if (!gold || !*question) {
        err_set(e,
                gold ? "%s: field 'question' is empty"
                     : "%s: field 'answer' has no \"#### \" before its number",
                where);
        goto done;
    }
    q->question = mem_dup(question);
    q->gold = mem_alloc(strlen(gold) + 1);
    size_t n = 0;
    for (; *gold && *gold != '\n'; gold++)
        if (*gold != ',') q->gold[n++] = *gold;
    while (n && (q->gold[n - 1] == ' ' || q->gold[n - 1] == '\r')) n--;
    q->gold[n] = 0;
    rc = strpbrk(q->gold, "0123456789")
             ? 0
             : err_set(e, "%s: field 'answer' has no number after its last \"#### \"", where);
done:
    if (rc < 0) {
        free(q->question);
        free(q->gold);
        *q = (struct task_question){ 0 };
    }
    json_decref(o);
    return rc;
}

int task_load(struct task_set *s, const char *path, const char *split, int first_n, struct err *e) {
    *s = (struct task_set){ 0 };
    snprintf(s->split, sizeof s->split, "%s", split);
    FILE *f = fopen(path, "re");
    if (!f) return err_code(e, EXIT_ENV, "cannot open questions '%s': %s", path, strerror(errno));
    char *line = NULL;
    size_t cap = 0;
    ssize_t n;
    int rc = 0, cap_q = 0;
    for (int number = 1; rc == 0 && (n = getline(&line, &cap, f)) >= 0; number++) {
        char where[1100];
        snprintf(where, sizeof where, "%s:%d", path, number);
        while (n && (line[n - 1] == '\n' || line[n - 1] == '\r')) n--;
        if (n == 0) continue;
        if (first_n > 0 && s->n == first_n) break;
        if (n > TASK_LINE_BYTES_MAX || s->n == TASK_QUESTIONS_MAX) {
            rc = err_set(e, "%s: %s", where,
                         n > TASK_LINE_BYTES_MAX ? "line longer than 1 MiB" : "too many questions");
            break;
        }
        if (s->n == cap_q) {
            cap_q = cap_q ? cap_q * 2 : 1024;
            s->q = mem_grow(s->q, (size_t)cap_q * sizeof *s->q);
        }
        s->q[s->n] = (struct task_question){ 0 };
        rc = read_line(&s->q[s->n], line, (size_t)n, where, e);
        if (rc == 0) s->n++;
    }
    free(line);
    fclose(f);
    if (rc == 0 && s->n == 0) rc = err_set(e, "questions '%s': the file holds no question", path);
    if (rc == 0) rc = sha256_file(path, s->sha256, e);
    if (rc < 0) {
        if (e) e->code = EXIT_ENV;
        task_release(s);
    }
    return rc;
}

void task_release(struct task_set *s) {
    for (int i = 0; i < s->n; i++) {
        free(s->q[i].question);
        free(s->q[i].gold);
    }
    free(s->q);
    *s = (struct task_set){ 0 };
}

double task_pass_at(int n, int c, int k) {
    if (n - c < k) return 1;
    double fail = 1;
    for (int i = n - c + 1; i <= n; i++) fail *= 1. - (double)k / i;
    return 1 - fail;
}

void task_order_init(struct task_order *o, uint64_t seed, int n) {
    *o = (struct task_order){ .seed = seed, .n = n, .epoch = -1 };
}

void task_order_release(struct task_order *o) {
    free(o->perm);
    *o = (struct task_order){ .epoch = -1 };
}

int task_order_at(struct task_order *o, int64_t index) {
    int64_t epoch = index / o->n;
    if (epoch != o->epoch) {
        if (!o->perm) o->perm = mem_alloc((size_t)o->n * sizeof *o->perm);
        for (int i = 0; i < o->n; i++) o->perm[i] = i;
        uint32_t key[2];
        rng_key(key, o->seed, RNG_PURPOSE_PERMUTE, (uint64_t)epoch);
        /* Fisher-Yates; 64 random bits make the modulo's bias negligible */
        for (int i = o->n - 1; i > 0; i--) {
            const uint32_t counter[4] = { (uint32_t)i };
            struct rng4 r = rng_philox(counter, key);
            uint64_t wide = (uint64_t)r.v[0] << 32 | r.v[1];
            int j = (int)(wide % (uint64_t)(i + 1)), t = o->perm[i];
            o->perm[i] = o->perm[j];
            o->perm[j] = t;
        }
        o->epoch = epoch;
    }
    return o->perm[index % o->n];
}
