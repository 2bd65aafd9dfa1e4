/* task.c - the rules that read answers, shaping, intervals, order. The table is the algorithm
 * specification's own.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/task/task.h"
#include "lib/base/stat.h"

#include <criterion/criterion.h>
#include <math.h>
#include <unistd.h>

static const struct {
    const char *text, *gold;
    int right[TASK_RULE_COUNT];      /* strict, flexible, lm-strict, lm-flexible */
} answers[] = {
    { "She makes 9 * 2 = 18.\n#### 18", "18", { 1, 1, 1, 1 } },
    { "#### 18.", "18", { 0, 0, 1, 1 } },
    { "#### $18", "18", { 0, 1, 0, 1 } },
    { "####18", "18", { 0, 1, 0, 1 } },
    { "The answer is 18.", "18", { 0, 0, 0, 1 } },
    { "The answer is 18", "18", { 0, 1, 0, 1 } },
    { "The answer is 18.0", "18", { 0, 0, 0, 0 } },
    { "Total 1,000.\n#### 1,000", "1000", { 1, 0, 1, 1 } },
    { "#### 12\nWait.\n#### 18", "18", { 1, 1, 0, 1 } },
    { "#### 18\n\nQuestion: ...\nAnswer: 3\n#### 3", "18", { 0, 0, 1, 1 } },
    { "<answer>18</answer>", "18", { 0, 1, 0, 1 } },
    { "So 5 apples.", "5", { 0, 1, 0, 1 } },
    { "It is -3\n#### -3", "-3", { 1, 1, 1, 1 } },
    { "", "18", { 0, 0, 0, 0 } },
    { "no number at all", "18", { 0, 0, 0, 0 } },
    { "#### ", "", { 0, 0, 0, 0 } },
    { "#### .", "18", { 0, 0, 0, 0 } },
    { "#### 99999999999999999999999999999999999999",
      "99999999999999999999999999999999999999",
      { 1, 1, 1, 1 } },
    /* Arabic digits are no digits here */
    { "\xd9\xa1\xd9\xa8 #### 18", "18", { 1, 1, 1, 1 } },
    { "\xff\xfe broken utf-8 #### 18", "18", { 1, 1, 1, 1 } },
};

Test(task, rules_read_the_answers_of_the_table) {
    for (size_t i = 0; i < COUNT_OF(answers); i++)
        for (int r = 0; r < TASK_RULE_COUNT; r++)
            cr_expect(task_right((enum task_rule)r, answers[i].text, answers[i].gold, NULL) ==
                          (bool)answers[i].right[r],
                      "rule %s on '%s' (gold %s)", task_rule_name[r], answers[i].text,
                      answers[i].gold);
}

Test(task, an_answer_too_far_from_the_end_is_not_seen) {
    struct str text;
    str_init(&text);
    str_puts(&text, "#### 18");
    for (int i = 0; i < 320; i++) str_puts(&text, "x");
    cr_expect_not(task_right(TASK_RULE_STRICT, text.s, "18", NULL));
    cr_expect_not(task_right(TASK_RULE_FLEXIBLE, text.s, "18", NULL));
    cr_expect(task_right(TASK_RULE_LM_STRICT, text.s, "18", NULL));
    cr_expect(task_right(TASK_RULE_LM_FLEXIBLE, text.s, "18", NULL));
    /* 293 two-byte characters after it: still within 300 characters */
    str_clear(&text);
    str_puts(&text, "#### 18");
    for (int i = 0; i < 293; i++) str_puts(&text, "\xc3\xa9");
    cr_expect(task_right(TASK_RULE_STRICT, text.s, "18", NULL));
    str_puts(&text, "\xc3\xa9");
    cr_expect_not(task_right(TASK_RULE_STRICT, text.s, "18", NULL));
    str_release(&text);
}

Test(task, extracted_is_what_was_compared) {
    struct str got;
    str_init(&got);
    task_right(TASK_RULE_STRICT, "a #### 1,234 b", "x", &got);
    cr_expect_str_eq(got.s, "1234");
    task_right(TASK_RULE_STRICT, "nothing", "x", &got);
    cr_expect_str_eq(got.s, "");
    str_release(&got);
}

Test(task, overlong_is_linear_in_the_buffer) {
    static const struct { int64_t tokens, max, buffer; double want;
    } t[] = {
        { 16383, 20480, 4096, 0 },
        { 16384, 20480, 4096, 0 },
        { 16385, 20480, 4096, -.000244140625 },
        { 17408, 20480, 4096, -.25 },
        { 18432, 20480, 4096, -.5 },
        { 19456, 20480, 4096, -.75 },
        { 20479, 20480, 4096, -.999755859375 },
        { 20480, 20480, 4096, -1 },
        { 1536, 2048, 512, 0 },
        { 1537, 2048, 512, -.001953125 },
        { 1664, 2048, 512, -.25 },
        { 1792, 2048, 512, -.5 },
        { 1920, 2048, 512, -.75 },
        { 2048, 2048, 512, -1 },
    };
    for (size_t i = 0; i < COUNT_OF(t); i++) {
        cr_expect_eq(task_overlong(t[i].tokens, t[i].max, t[i].buffer, 1), t[i].want);
        cr_expect_eq(task_overlong(t[i].tokens, t[i].max, t[i].buffer, .5), t[i].want / 2);
    }
    cr_expect_not(signbit(task_overlong(1536, 2048, 512, 1)), "+0 at the edge");
    cr_expect_eq(task_overlong(5000, 2048, 0, 1), 0., "buffer 0 is off");
}

Test(task, pass_at_k_is_unbiased) {
    cr_expect_float_eq(task_pass_at(8, 2, 1), .25, 1e-12);
    cr_expect_float_eq(task_pass_at(8, 2, 4), .785714, 1e-6);
    cr_expect_float_eq(task_pass_at(8, 2, 8), 1, 1e-12);
    cr_expect_float_eq(task_pass_at(16, 3, 8), .9, 1e-12);
}

Test(task, interval_is_wilsons) {
    double low, high;
    stat_interval(50, 100, &low, &high);            /* R: prop.test(50, 100, correct = FALSE) */
    cr_expect_float_eq(low, .4038315, 1e-6);
    cr_expect_float_eq(high, .5961685, 1e-6);
    stat_interval(0, 10, &low, &high);
    cr_expect_eq(low, 0.);
    cr_expect_float_eq(high, .2775328, 1e-6);
}

Test(task, order_is_a_fresh_permutation_each_epoch) {
    struct task_order o, again;
    task_order_init(&o, 7, 101);
    task_order_init(&again, 7, 101);
    int seen[101] = { 0 }, moved = 0, first[101];
    for (int i = 0; i < 101; i++) seen[first[i] = task_order_at(&o, i)]++;
    for (int i = 0; i < 101; i++) {
        cr_expect_eq(seen[i], 1);
        moved += task_order_at(&o, 101 + i) != first[i];
    }
    cr_expect_gt(moved, 50);
    cr_expect_eq(task_order_at(&again, 250), task_order_at(&o, 250), "a position needs no history");
    task_order_release(&o);
    task_order_release(&again);
}

static void load_says(const char *text, const char *want) {
    char path[] = "/tmp/qerl-task-XXXXXX";
    int fd = mkstemp(path);
    cr_assert_geq(fd, 0);
    cr_assert_eq(write(fd, text, strlen(text)), (ssize_t)strlen(text));
    close(fd);
    struct task_set s;
    struct err e = { 0 };
    int rc = task_load(&s, path, "test", 0, &e);
    if (want) {
        cr_expect_eq(rc, -1);
        cr_expect_eq(e.code, EXIT_ENV);
        cr_expect(strstr(e.text, want), "'%s' does not hold '%s'", e.text, want);
    } else cr_expect_eq(rc, 0, "%s", e.text);
    task_release(&s);
    unlink(path);
}

Test(task, bad_question_files_name_the_line) {
    load_says("{\"question\": \"a\", \"answer\": \"b #### 1,2\"}\n", NULL);
    load_says("{\"question\": \"a\", \"answer\": \"#### 1\"}\n{\"question\": 3}\n",
              ":2: field 'question' must be a string");
    load_says("{\"question\": \"a\"}\n", ":1: field 'answer' is missing");
    load_says("{\"question\": \"a\", \"answer\": \"12\"}\n", ":1: field 'answer' has no \"#### \"");
    load_says("{\"question\": \n", ":1");
    load_says("[1]\n", ":1: not a JSON object");
    load_says("\n\n", "holds no question");
}
