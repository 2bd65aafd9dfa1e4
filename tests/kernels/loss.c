/* loss.c - log-probs, their backward, and the sampler.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/kernels/kt.h"

enum { ROWS = 9 };
static const int vocabs[] = { 1, 2, 7, 16, 17, 31, 33, 255, 256, 257, 624, 1000, 5003, 0 };

Test(logprob, same_bits_near_double_and_backward) {
    struct kt t;
    kt_open(&t);
    for (int v = 0; vocabs[v]; v++) {
        int vocab = vocabs[v];
        size_t n = (size_t)(ROWS * vocab);
        float inv = v % 2 ? 1.0f : 1.0f / 0.7f, *logits = kt_f32(&t, n, 4.0),
              *coef = kt_f32(&t, ROWS, 1.0);
        if (vocab > 16) logits[3] = -INFINITY;
        int32_t *target = kt_new(&t, ROWS * 4);
        for (int r = 0; r < ROWS; r++) target[r] = (int32_t)(kt_unit(&t) * vocab);
        if (target[0] == 3) target[0] = 4;
        float *lp = kt_new(&t, ROWS * 4), *lse = kt_new(&t, ROWS * 4), *ent = kt_new(&t, ROWS * 4),
              *grad = kt_copy(&t, logits, n * 4);
        struct kern_logprob a = { kt_p(logits), kt_p(target), kt_p(lp), kt_p(lse),
                                  kt_p(ent),    ROWS,         vocab,    inv };
        t.ref.logprob(&t.ref, &a);
        struct kern_logprob_bwd b = { kt_p(grad), kt_p(target), kt_p(lse), kt_p(coef),
                                      ROWS,       vocab,        inv };
        t.ref.logprob_bwd(&t.ref, &b);
        for (int r = 0; r < ROWS; r++) {
            const float *z = logits + r * vocab;
            double sum = 0.0, e = 0.0;
            for (int i = 0; i < vocab; i++) sum += exp((double)z[i] * (double)inv);
            for (int i = 0; i < vocab; i++) {
                double p = exp((double)z[i] * (double)inv) / sum;
                if (p > 0.0) e -= p * log(p);
                /* dlp/dlogit_i = ([i == target] - p_i) / T is exact calculus, checked in double */
                KT_NEAR((double)grad[r * vocab + i],
                        (double)coef[r] * ((i == target[r]) - p) * (double)inv,
                        4e-6 * (1 + fabs((double)coef[r])), "gradient vocab %d", vocab);
            }
            double want = (double)z[target[r]] * (double)inv - log(sum);
            KT_NEAR((double)lp[r], want, 4e-6 * (1 + fabs(log(sum))), "lp vocab %d", vocab);
            KT_NEAR((double)lse[r], log(sum), 2e-6 * (1 + fabs(log(sum))), "lse vocab %d", vocab);
            KT_NEAR((double)ent[r], e, 1e-5, "entropy vocab %d", vocab);
        }
        KT_EACH(&t, k) {
            float *lp2 = kt_new(&t, ROWS * 4), *lse2 = kt_new(&t, ROWS * 4),
                  *ent2 = kt_new(&t, ROWS * 4), *grad2 = kt_copy(&t, logits, n * 4);
            a.lp = kt_p(lp2), a.lse = kt_p(lse2), a.entropy = kt_p(ent2);
            k->logprob(k, &a);
            KT_SAME(k, lp2, lp, ROWS * 4, "logprob vocab %d", vocab);
            KT_SAME(k, lse2, lse, ROWS * 4, "lse vocab %d", vocab);
            KT_SAME(k, ent2, ent, ROWS * 4, "entropy vocab %d", vocab);
            memset(lp2, 0, ROWS * 4);
            a.lse = a.entropy = kt_p(NULL);
            k->logprob(k, &a);
            KT_SAME(k, lp2, lp, ROWS * 4, "logprob alone vocab %d", vocab);
            b.logits = kt_p(grad2);
            k->logprob_bwd(k, &b);
            KT_SAME(k, grad2, grad, n * 4, "logprob_bwd vocab %d", vocab);
        }
        kt_drop(&t);
    }
    kt_close(&t);
}

/* the worked example of these tests */
static float small[4] = { 2.0f, 1.0f, 0.5f, -1.0f };

Test(logprob, worked_example) {
    static const struct { float temp; double lp[4], entropy; } row[] = {
        { 1.0f, { -0.495181898, -1.495181898, -1.995181898, -3.495181898 }, 1.014402776 },
        { 0.7f, { -0.315346355, -1.743917784, -2.458203498, -4.601060641 }, 0.791547061 },
        { 0.6f, { -0.245060451, -1.911727117, -2.745060451, -5.245060451 }, 0.678413767 },
        { 2.0f, { -0.833790201, -1.333790201, -1.583790201, -2.333790201 }, 1.264816998 },
    };
    struct kt t;
    kt_open(&t);
    KT_EACH(&t, k)
        for (size_t i = 0; i < COUNT_OF(row); i++)
            for (int32_t target = 0; target < 4; target++) {
                float lp, entropy;
                k->logprob(k, &(struct kern_logprob){ kt_p(small), kt_p(&target), kt_p(&lp),
                                                      kt_p(NULL), kt_p(&entropy), 1, 4,
                                                      1.0f / row[i].temp });
                KT_NEAR((double)lp, row[i].lp[target], 1e-6, "lp at temperature %g",
                        (double)row[i].temp);
                KT_NEAR((double)entropy, row[i].entropy, 1e-6, "entropy at temperature %g",
                        (double)row[i].temp);
            }
    kt_close(&t);
}

static int32_t draw(struct kern *k, float *logits, int vocab, struct kern_sampler s, float *lp,
                    float *lp_raw) {
    int32_t token = -1;
    k->sample(k, &(struct kern_sample){ kt_p(logits), 1, vocab, kt_p(&s), kern_sampler_cuts(&s, vocab), kt_p(&token),
                                        kt_p(lp), kt_p(lp_raw) });
    return token;
}

/* Draws with many u and counts: which tokens survive the cuts, and with which probabilities. */
static void kept_set(struct kern *k, struct kern_sampler s, const double want[4]) {
    const int draws = kt_slow(k) ? 500 : 20000;
    int count[4] = { 0 };
    for (int i = 0; i < draws; i++) {
        float lp, raw;
        s.u = ((float)i + 0.5f) / (float)draws;
        int32_t token = draw(k, small, 4, s, &lp, &raw);
        cr_assert(token >= 0 && token < 4);
        count[token]++;
        KT_NEAR(exp((double)lp), want[token], 1e-6,
                "%s: probability of token %d under the cut distribution", k->name, token);
        KT_NEAR((double)raw, (double)(small[token] - 2.0f) - 0.495181898, 1e-6,
                "%s: lp at temperature 1, uncut", k->name);
    }
    for (int i = 0; i < 4; i++)
        KT_NEAR((double)count[i] / draws, want[i], 2.0 / draws, "%s: share of token %d", k->name, i);
}

Test(sample, worked_example) {
    struct kt t;
    kt_open(&t);
    KT_EACH(&t, k) {
        kept_set(k, (struct kern_sampler){ 1.0f, 0, 0.95f, 0 },
                 (double[4]){ 0.628532, 0.231224, 0.140244, 0 });
        kept_set(k, (struct kern_sampler){ 1.0f, 2, 1.0f, 0 },
                 (double[4]){ 0.731059, 0.268941, 0, 0 });
        kept_set(k, (struct kern_sampler){ 0.6f, 20, 0.95f, 0 },
                 (double[4]){ 0.786806, 0.148609, 0.064585, 0 });
        kept_set(k, (struct kern_sampler){ 1.0f, 3, 0.7f, 0 },
                 (double[4]){ 0.731059, 0.268941, 0, 0 });
        kept_set(k, (struct kern_sampler){ 1.0f, 0, 1.0f, 0 },
                 (double[4]){ 0.609460, 0.224208, 0.135989, 0.030343 });
        float lp, raw; /* the first two draws of Philox's zero key and counter */
        cr_assert(draw(k, small, 4, (struct kern_sampler){ 1.0f, 0, 1.0f, 0.3990464211f }, &lp,
                       &raw) == 0);
        KT_NEAR((double)lp, -0.495181898, 1e-6, "lp of the first draw");
        cr_assert(draw(k, small, 4, (struct kern_sampler){ 1.0f, 0, 1.0f, 0.8805201650f }, &lp,
                       &raw) == 2);
        KT_NEAR((double)lp, -1.995181898, 1e-6, "lp of the second draw");
        cr_assert(draw(k, small, 4, (struct kern_sampler){ 0.0f, 0, 1.0f, 0.9f }, &lp, &raw) == 0);
        KT_NEAR((double)lp, -0.495181898, 1e-6, "greedy: lp under temperature 1");
    }
    kt_close(&t);
}

Test(sample, same_draws_on_every_path_and_lp_is_logprob) {
    struct kt t;
    kt_open(&t);
    for (int v = 0; vocabs[v]; v++)
        for (int turn = 0; turn < 12; turn++) {
            int vocab = vocabs[v];
            float *logits = kt_f32(&t, (size_t)(ROWS * vocab), turn % 3 + 1.0);
            if (turn % 4 == 3)                                            /* many ties */
                for (int i = 0; i < ROWS * vocab; i++) logits[i] = roundf(logits[i]);
            struct kern_sampler s[ROWS];
            for (int r = 0; r < ROWS; r++) {
                static const float temps[] = { 1.0f, 0.6f, 0.0f, 1.7f },
                                   top_p[] = { 1.0f, 0.95f, 0.5f };
                static const int top_k[] = { 0, 1, 20, 300 };
                bool cut = turn & 1;
                s[r] = (struct kern_sampler){ temps[r % 4], cut ? top_k[(r + turn) % 4] : 0,
                                              cut ? top_p[(r + turn) % 3] : 1.0f,
                                              (float)kt_unit(&t) };
                if (r == 4) s[r].u = 0x1.fffffep-1f;
                if (r == 5) s[r].u = 0.0f;
            }
            int32_t want[ROWS];
            float lp[ROWS], raw[ROWS];
            struct kern_sample a = { kt_p(logits), ROWS, vocab, kt_p(s), true, kt_p(want), kt_p(lp), kt_p(raw) };
            t.ref.sample(&t.ref, &a);
            KT_EACH(&t, k) {
                int32_t token[ROWS];
                float lp2[ROWS], raw2[ROWS], plain;
                struct kern_sample b = a;
                b.token = kt_p(token), b.lp = kt_p(lp2), b.lp_raw = kt_p(raw2);
                k->sample(k, &b);
                KT_SAME(k, token, want, sizeof token, "sample token vocab %d", vocab);
                KT_SAME(k, lp2, lp, sizeof lp2, "sample lp vocab %d", vocab);
                KT_SAME(k, raw2, raw, sizeof raw2, "sample lp_raw vocab %d", vocab);
                for (int r = 0; r < ROWS; r++) {
                    struct kern_logprob l = { kt_p(logits + r * vocab),
                                              kt_p(token + r),
                                              kt_p(&plain),
                                              kt_p(NULL),
                                              kt_p(NULL),
                                              1,
                                              vocab,
                                              1.0f };
                    cr_assert(token[r] >= 0 && token[r] < vocab);
                    k->logprob(k, &l);
                    cr_assert(!memcmp(&plain, &raw2[r], 4), "lp_raw is logprob's at temperature 1");
                    if (s[r].temperature > 0.0f) l.inv_temp = 1.0f / s[r].temperature;
                    k->logprob(k, &l);
                    bool cut = (s[r].top_k > 0 && s[r].top_k < vocab) || s[r].top_p < 1.0f;
                    if (!cut || s[r].temperature <= 0.0f)
                        cr_assert(!memcmp(&plain, &lp2[r], 4),
                                  "uncut lp is logprob's at that temperature");
                }
            }
            kt_drop(&t);
        }
    kt_close(&t);
}

/* The slow definition: sort everything, cut, renormalise, walk the ids. */
struct item { float z; int id; };
static int item_cmp(const void *a, const void *b) {
    const struct item *x = a, *y = b;
    return x->z != y->z ? (x->z < y->z ? 1 : -1) : x->id - y->id;
}
Test(sample, cuts_follow_the_definition) {
    struct kt t;
    kt_open(&t);
    enum { V = 700 };
    static struct item item[V];
    static bool kept[V];
    for (int turn = 0; turn < 400; turn++) {
        float *logits = kt_f32(&t, V, 0.3 + turn % 5);
        if (turn % 3 == 0)
            for (int i = 0; i < V; i++) logits[i] = roundf(logits[i]);
        struct kern_sampler s = { turn % 2 ? 1.0f : 0.8f,
                                  turn % 4 == 1 ? 0 : 1 + (int)(kt_unit(&t) * 800),
                                  turn % 4 ? (float)kt_unit(&t) : 1.0f, (float)kt_unit(&t) };
        double mass = 0.0, seen = 0.0, total = 0.0, walk = 0.0;
        int n = s.top_k > 0 && s.top_k < V ? s.top_k : V, last = 0;
        for (int i = 0; i < V; i++)
            item[i] = (struct item){ logits[i] / s.temperature, i }, kept[i] = false;
        qsort(item, V, sizeof *item, item_cmp);
        float most = item[0].z;
        for (int i = 0; i < n; i++) mass += exp((double)(item[i].z - most));
        for (int i = 0; i < n; i++) {
            kept[item[i].id] = true;
            total += exp((double)(item[i].z - most));
            if (total >= (double)s.top_p * mass) break;
        }
        for (int i = 0; i < V; i++)
            walk += kept[i] ? exp((double)(logits[i] / s.temperature - most)) : 0.0;
        bool close = false; /* u within rounding of an edge: either side is right */
        for (int i = 0; i < V; i++) {
            if (!kept[i]) continue;
            seen += exp((double)(logits[i] / s.temperature - most)) / walk;
            close |= fabs(seen - (double)s.u) < 1e-5;
            last = i;
            if (seen > (double)s.u) break;
        }
        float lp, raw;
        int32_t token = draw(&t.ref, logits, V, s, &lp, &raw);
        if (!close && fabs(total / mass - (double)s.top_p) > 1e-5)
            cr_assert(token == last, "turn %d: drew %d, the definition says %d", turn, token, last);
        kt_drop(&t);
    }
    kt_close(&t);
}

Test(sample, odd_rows_give_some_token) {
    struct kt t;
    kt_open(&t);
    enum { V = 600 };
    static float x[V];
    KT_EACH(&t, k)
        for (int what = 0; what < 7; what++)
            for (int cut = 0; cut < 3; cut++)
                for (int ui = 0; ui < 3; ui++) {
                    for (int i = 0; i < V; i++)
                        x[i] = what == 1   ? NAN
                               : what == 2 ? -INFINITY
                               : what == 5 ? 0.0f
                                           : (float)(i % 11);
                    /* all but one impossible */
                    if (what == 0) {
                        for (int i = 0; i < V; i++) x[i] = -INFINITY;
                        x[317] = 5.0f;
                    }
                    if (what == 3) x[40] = NAN;
                    if (what == 4) x[41] = INFINITY;
                    /* the tail has no mass at all */
                    if (what == 6)
                        for (int i = 100; i < V; i++) x[i] = -1000.0f;
                    float lp, raw, u[] = { 0.0f, 0.5f, 0x1.fffffep-1f };
                    struct kern_sampler s = { 0.9f, cut == 1 ? 5 : 0, cut == 2 ? 0.9f : 1.0f,
                                              u[ui] };
                    int32_t token = draw(k, x, V, s, &lp, &raw);
                    cr_assert(token >= 0 && token < V);
                    if (what == 0)
                        cr_assert(token == 317 && fabsf(lp) < 1e-6f && fabsf(raw) < 1e-6f);
                    if (what >= 1 && what <= 4)
                        cr_assert(isnan(lp), "a row that is not finite has no log-prob");
                    if (what == 4) cr_assert(token == 41);
                    if (what == 6) cr_assert(token < 100);
                }
    kt_close(&t);
}

Test(sample, a_large_vocabulary) {
    struct kt t;
    kt_open(&t);
    int vocab = 262144;
    float *logits = kt_f32(&t, (size_t)vocab, 2.0), lp, raw, lp2, raw2;
    for (int i = 0; i < 6; i++) {
        struct kern_sampler s = { 1.0f,
                                  i == 1   ? 50
                                  : i == 4 ? 100000
                                           : 0,
                                  i == 2   ? 0.9f
                                  : i == 5 ? 0.9999f
                                           : 1.0f,
                                  (float)kt_unit(&t) };
        int32_t want = draw(&t.ref, logits, vocab, s, &lp, &raw);
        KT_EACH(&t, k) {
            cr_assert(draw(k, logits, vocab, s, &lp2, &raw2) == want);
            cr_assert(!memcmp(&lp, &lp2, 4) && !memcmp(&raw, &raw2, 4));
        }
    }
    kt_close(&t);
}
