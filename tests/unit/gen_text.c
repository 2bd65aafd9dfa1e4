/* gen_text.c - generation with a real tokenizer (models/tiny): the end of a turn, stop strings, new
 * requests on the way.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/unit/net_fixture.h"

#include <criterion/criterion.h>

#include "lib/gen/gen.h"

struct scene {
    struct pool *pool;
    struct kern kern;
    struct model *model;
    struct tok *tok;
    struct gen *gen;
    struct tok_ids prompt;
};

static void scene_open(struct scene *s, const char *stop) {
    struct err e = { 0 };
    memset(s, 0, sizeof *s);
    s->pool = pool_create(2);
    cr_assert_eq(kern_open(&s->kern, "auto", s->pool, &e), 0, "%s", e.text);
    cr_assert_eq(model_open(&s->model, &s->kern, &(struct model_opts){ .path = "models/tiny" }, &e),
                 0, "%s", e.text);
    cr_assert_eq(tok_open(&s->tok, "models/tiny", &e), 0, "%s", e.text);
    struct gen_opts o = {
        .rows = 4, .positions_max = 200, .stop = { stop }, .stops = stop != NULL
    };
    cr_assert_eq(gen_create(&s->gen, s->model, s->tok, &o, &e), 0, "%s", e.text);
    const struct chat_message m = {
        "user", "Tom has 3 apples and buys 4 more. How many apples does he have?"
    };
    struct str text;
    str_init(&text);
    cr_assert_eq(tok_chat(s->tok, NULL, &m, 1, true, &text, &e), 0, "%s", e.text);
    tok_encode(s->tok, text.s, text.len, true, &s->prompt);
    str_release(&text);
}

static void scene_close(struct scene *s) {
    gen_destroy(&s->gen);
    tok_close(&s->tok);
    model_close(&s->model);
    pool_destroy(&s->pool);
    free(s->prompt.id);
}

static struct gen_request request(const struct scene *s, uint64_t uid, float temperature) {
    return (struct gen_request){ .tag = uid,
                                 .prompt = s->prompt.id,
                                 .prompt_n = s->prompt.n,
                                 .samples = 6,
                                 .new_max = 60,
                                 .temperature = temperature,
                                 .top_p = 1,
                                 .key = { 1, 2 },
                                 .prompt_uid = uid };
}

struct seen { struct scene *s; const char *stop; int n, eos, strings, extra; };

static void take(void *ud, const struct gen_sample *g) {
    struct seen *seen = ud;
    struct str text, before;
    str_init(&text);
    str_init(&before);
    tok_decode(seen->s->tok, g->ids, g->n, false, &text);
    tok_decode(seen->s->tok, g->ids, g->n - 1, false, &before);
    str_add(&text, "", 0);
    str_add(&before, "", 0);
    seen->n++;
    seen->eos += g->stop == GEN_STOP_EOS;
    seen->strings += g->stop == GEN_STOP_STRING;
    if (seen->stop) {
        const bool has = strstr(text.s, seen->stop) != NULL;
        cr_expect(!strstr(before.s, seen->stop), "went on after '%s' in '%s'", seen->stop, text.s);
        cr_expect(g->stop == GEN_STOP_EOS || has == (g->stop == GEN_STOP_STRING),
                  "stop %s with '%s'", gen_stop_name[g->stop], text.s);
    }
    /* a caller may submit from inside the callback */
    if (seen->extra > 0) {
        struct gen_request r = request(seen->s, 1000u + (uint64_t)seen->extra--, 1);
        cr_expect_eq(gen_submit(seen->s->gen, &r, NULL), 0);
    }
    str_release(&text);
    str_release(&before);
}

static void run(struct seen *seen, float temperature) {
    struct err e = { 0 };
    struct gen_request r = request(seen->s, 7, temperature);
    cr_assert_eq(gen_submit(seen->s->gen, &r, &e), 0, "%s", e.text);
    while (!gen_idle(seen->s->gen))
        cr_assert_eq(gen_step(seen->s->gen, take, seen, &e), 0, "%s", e.text);
}

Test(gen_text, answers_end_with_the_turn) {
    struct scene s;
    scene_open(&s, NULL);
    struct seen seen = { .s = &s };
    run(&seen, 0);
    cr_expect(seen.n == 6 && seen.eos == 6, "%d samples, %d ended themselves", seen.n, seen.eos);
    scene_close(&s);
}

Test(gen_text, a_stop_string_ends_a_sample_with_the_token_that_completes_it) {
    struct scene s;
    scene_open(&s, " a");
    struct seen seen = { .s = &s, .stop = " a" };
    run(&seen, 1.3f);
    cr_expect_eq(seen.n, 6);
    cr_expect_gt(seen.strings, 0);
    scene_close(&s);
}

Test(gen_text, requests_from_inside_the_callback_are_served) {
    struct scene s;
    scene_open(&s, NULL);
    struct seen seen = { .s = &s, .extra = 3 };
    run(&seen, 1);
    cr_expect_eq(seen.n, 24);
    scene_close(&s);
}
