/* rec_forms.c - records survive MessagePack and JSON bit by bit; what people write by hand works;
 * errors say where.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/wire/rec.h"

#include <criterion/criterion.h>
#include <math.h>
#include <msgpack.h>

#include "tests/unit/rec_any.h"

enum { ROUNDS = 300 };

static void expect_same(const struct rec *x, const struct rec *y, const char *form, int round) {
    const char *field = any_differs(x, y);
    cr_assert(!field, "%s as %s, round %d: field '%s' differs", rec_name[x->type], form, round,
              field ? field : "");
}

Test(rec, every_record_survives_messagepack_bit_by_bit) {
    struct any a = { 1 };
    for (int t = REC_NONE + 1; t < REC_TYPE_COUNT; t++)
        for (int i = 0; i < ROUNDS; i++) {
            struct rec x, y;
            struct str b = { 0 };
            struct err e = { 0 };
            any_fill(&x, (enum rec_type)t, &a);
            cr_assert(rec_check(&x, &e) == 0, "%s", e.text);
            rec_pack(&b, &x);
            cr_assert(rec_unpack(&y, b.s, b.len, &e) == 0, "%s", e.text);
            expect_same(&x, &y, "MessagePack", i);
            str_release(&b);
            rec_release(&x);
            rec_release(&y);
        }
}

/* Runs of version 1 can be read: their scores and groups have no evidence. */
Test(rec, version_1_lacks_evidence_and_version_2_may_not) {
    struct any a = { 9 };
    for (int i = 0; i < 2; i++) {
        struct rec x, y;
        struct str b = { 0 };
        struct err e = { 0 };
        any_fill(&x, i ? REC_GROUP : REC_SCORE, &a);
        char **evidence = i ? &x.group.evidence : &x.score.evidence;
        free(*evidence);
        *evidence = NULL;
        rec_pack(&b, &x);
        char *at = memmem(b.s, b.len, "\xA8" "evidence\xA0", 10), *v = memmem(b.s, b.len, "\xA1v\x02", 3);
        cr_assert(at && v && (uint8_t)b.s[0] == 0xDE);
        memmove(at, at + 10, b.len - 10 - (size_t)(at - b.s));
        b.len -= 10;
        b.s[2]--;
        cr_expect(rec_unpack(&y, b.s, b.len, &e) < 0);
        cr_expect(strstr(e.text, "'evidence' is missing"), "%s", e.text);
        v[2] = 1;
        cr_assert(rec_unpack(&y, b.s, b.len, &e) == 0, "%s", e.text);
        cr_expect_str_eq(i ? y.group.evidence : y.score.evidence, "");
        rec_release(&y);
        rec_release(&x);
        str_release(&b);
    }
}

Test(rec, every_record_survives_json_bit_by_bit) {
    struct any a = { 2 };
    for (int t = REC_NONE + 1; t < REC_TYPE_COUNT; t++)
        for (int i = 0; i < ROUNDS; i++) {
            struct rec x, y;
            struct str b = { 0 };
            struct err e = { 0 };
            any_fill(&x, (enum rec_type)t, &a);
            rec_to_json(&b, &x);
            cr_assert(b.s[b.len - 1] == '\n' && strchr(b.s, '\n') == b.s + b.len - 1,
                      "one record, one line");
            cr_assert(rec_from_json(&y, b.s, b.len, REC_NONE, "test:1", &e) == 0, "%s\n%s", e.text,
                      b.s);
            expect_same(&x, &y, "JSON", i);
            str_release(&b);
            rec_release(&x);
            rec_release(&y);
        }
}

Test(rec, another_messagepack_reader_understands_us) {
    struct any a = { 3 };
    for (int t = REC_NONE + 1; t < REC_TYPE_COUNT; t++) {
        struct rec x;
        struct str b = { 0 };
        any_fill(&x, (enum rec_type)t, &a);
        rec_pack(&b, &x);
        msgpack_unpacked u;
        msgpack_unpacked_init(&u);
        size_t at = 0;
        cr_assert(msgpack_unpack_next(&u, b.s, b.len, &at) == MSGPACK_UNPACK_SUCCESS &&
                  at == b.len);
        cr_assert(u.data.type == MSGPACK_OBJECT_MAP);
        cr_assert(u.data.via.map.ptr[0].val.via.str.size == strlen(rec_name[t]));
        msgpack_unpacked_destroy(&u);
        str_release(&b);
        rec_release(&x);
    }
}

Test(rec, every_float32_exponent_survives_json) {
    float v[256 * 16];
    int n = 0;
    for (uint32_t exponent = 0; exponent < 255; exponent++)
        for (uint32_t i = 0; i < 16; i++) {
            uint32_t bits = exponent << 23 | (i < 8 ? i : 0x7FFFFF - i * 104729) | (i & 1) << 31;
            memcpy(&v[n++], &bits, sizeof bits);
        }
    int32_t ids[COUNT_OF(v)] = { 0 };
    struct rec_sample s = { .ids = { ids, n }, .lp = { v, n }, .stop = (char[]){ "eos" } };
    struct rec x = { .type = REC_TRAJ, .group = { .sample = &s, .samples = 1 } }, y;
    struct str b = { 0 };
    struct err e = { 0 };
    rec_to_json(&b, &x);
    cr_assert(rec_from_json(&y, b.s, b.len, REC_TRAJ, "test:1", &e) == 0, "%s", e.text);
    cr_assert(memcmp(y.group.sample[0].lp.v, v, (size_t)n * sizeof *v) == 0);
    rec_release(&y);
    str_release(&b);
}

Test(rec, a_hand_written_ticket_needs_a_question_only) {
    static const char line[] = "{\"question\":\"What is 2+2?\",\"answer\":\"4\"}";
    struct rec r;
    struct err e = { 0 };
    cr_assert(rec_from_json(&r, line, strlen(line), REC_TICKET, "q.jsonl:1", &e) == 0, "%s",
              e.text);
    const struct rec_ticket *t = &r.ticket;
    cr_assert_str_eq(t->question, "What is 2+2?");
    cr_assert_str_eq(t->answer, "4");
    cr_assert_str_eq(t->run, "");
    cr_assert_str_eq(t->treatment.hash, "");
    cr_assert_str_eq(t->treatment.ops, "none");
    cr_assert_str_eq(t->adapter, "");
    cr_assert(t->group == 0 && t->fence == 0 && t->step == 0 && t->version == 0 &&
              t->samples == 0 && t->new_max == 0);
    cr_assert(t->temperature == -1 && t->top_p == 1 && t->top_k == 0 && t->seed == 0 &&
              t->prompt_ids.n == 0);
    rec_release(&r);
}

Test(rec, seeds_above_int64_are_strings_in_json) {
    struct rec x = { .type = REC_TICKET,
                     .ticket = { .question = (char[]){ "q" }, .seed = UINT64_MAX } },
               y;
    struct str b = { 0 };
    struct err e = { 0 };
    rec_to_json(&b, &x);
    cr_assert(strstr(b.s, "\"seed\":\"18446744073709551615\""));
    cr_assert(rec_from_json(&y, b.s, b.len, REC_NONE, "t:1", &e) == 0, "%s", e.text);
    cr_assert(y.ticket.seed == UINT64_MAX);
    rec_release(&y);
    str_clear(&b);
    x.ticket.seed = INT64_MAX;
    rec_to_json(&b, &x);
    cr_assert(strstr(b.s, "\"seed\":9223372036854775807,"));
    str_release(&b);
}

Test(rec, broken_text_of_a_model_is_replaced_not_refused) {
    char text[] = "ok \xFF\xC3 \xE2\x82 end\xF0\x9F";
    struct rec_sample s = { .text = text, .stop = (char[]){ "eos" } };
    struct rec x = { .type = REC_TRAJ,
                     .group = { .sample = &s, .samples = 1, .answer = (char[]){ "4" } } },
               y, z;
    struct str b = { 0 }, j = { 0 };
    struct err e = { 0 };
    cr_assert(rec_check(&x, &e) == 0, "%s", e.text);
    rec_pack(&b, &x);
    cr_assert(rec_unpack(&y, b.s, b.len, &e) == 0, "%s", e.text);
    rec_to_json(&j, &x);
    cr_assert(rec_from_json(&z, j.s, j.len, REC_TRAJ, "t:1", &e) == 0, "%s", e.text);
    cr_assert_str_eq(
        y.group.sample[0].text,
        "ok \xEF\xBF\xBD\xEF\xBF\xBD \xEF\xBF\xBD\xEF\xBF\xBD end\xEF\xBF\xBD\xEF\xBF\xBD");
    cr_assert_str_eq(z.group.sample[0].text, y.group.sample[0].text,
                     "both forms replace the same bytes");
    rec_release(&y);
    rec_release(&z);
    str_release(&b);
    str_release(&j);
}

Test(rec, check_finds_what_a_reader_would_refuse) {
    struct err e = { 0 };
    float lp[1] = { NAN };
    int32_t ids[1] = { 5 };
    struct rec_sample s = { .stop = (char[]){ "eos" }, .ids = { ids, 1 }, .lp = { lp, 1 } };
    struct rec r = { .type = REC_TRAJ, .group = { .sample = &s, .samples = 1 } };
    cr_assert(rec_check(&r, &e) < 0 && strstr(e.text, "'lp'[0] is not finite") &&
                  strstr(e.text, "sample 0"),
              "%s", e.text);
    lp[0] = -1;
    cr_assert(rec_check(&r, &e) == 0);
    s.stop = (char[]){ "bored" };
    cr_assert(rec_check(&r, &e) < 0 && strstr(e.text, "eos|stop_string|length"), "%s", e.text);
    s.stop = (char[]){ "eos" };
    s.lp.n = 0;
    s.lp_raw = (struct rec_f32){ lp, 1 };
    cr_assert(rec_check(&r, &e) == 0);
    ids[0] = -1;
    cr_assert(rec_check(&r, &e) < 0 && strstr(e.text, "'ids'[0] is negative"), "%s", e.text);
    ids[0] = 0;
    r.group.temperature = INFINITY;
    cr_assert(rec_check(&r, &e) < 0 && strstr(e.text, "'temperature' is not finite"), "%s", e.text);
    r.group.temperature = 1;
    r.group.samples = REC_SAMPLES_MAX + 1;
    cr_assert(rec_check(&r, &e) < 0 && strstr(e.text, "257 entries"), "%s", e.text);
    struct rec score = { .type = REC_SCORE, .score = { .n = 3, .right = 4 } };
    cr_assert(rec_check(&score, &e) < 0 && strstr(e.text, "than the 3"), "%s", e.text);
}

static const struct { const char *line, *says; enum rec_type expected;
} wrong[] = {
    { "", "t.jsonl:7:0: not valid JSON", REC_TICKET },
    { "{\"question\":\"x\"", "t.jsonl:7:15: not valid JSON", REC_TICKET },
    { "[1]", "t.jsonl:7: a record is a JSON object", REC_TICKET },
    { "{\"question\":\"x\"} {}", "not valid JSON: end of file expected", REC_TICKET },
    { "{\"question\":\"x\",\"question\":\"y\"}", "duplicate object key", REC_TICKET },
    { "{\"qestion\":\"x\"}", "t.jsonl:7: ticket: unknown field 'qestion', did you mean 'question'?",
      REC_TICKET },
    { "{\"question\":3}", "t.jsonl:7: ticket: field 'question' must be a string", REC_TICKET },
    { "{\"question\":\"a\\u0000b\"}", "must not hold a NUL", REC_TICKET },
    { "{\"question\":\"\xFF\"}", "not valid JSON: unable to decode byte 0xff", REC_TICKET },
    { "{\"answer\":\"4\"}", "t.jsonl:7: ticket: one of 'question', 'prompt' and 'prompt_ids'",
      REC_TICKET },
    { "{\"question\":\"x\",\"samples\":257}", "'samples' must be a whole number from 0 to 256",
      REC_TICKET },
    { "{\"question\":\"x\",\"samples\":1.0}", "'samples' must be a whole number", REC_TICKET },
    { "{\"question\":\"x\",\"step\":-1}", "'step' must be a whole number from 0", REC_TICKET },
    { "{\"question\":\"x\",\"seed\":-1}", "'seed' must be a whole number from 0 to 2^64-1",
      REC_TICKET },
    { "{\"question\":\"x\",\"seed\":\"18446744073709551616\"}", "'seed' must be", REC_TICKET },
    { "{\"question\":\"x\",\"seed\":\"+1\"}", "'seed' must be", REC_TICKET },
    { "{\"question\":\"x\",\"temperature\":\"1\"}", "'temperature' must be a number", REC_TICKET },
    { "{\"question\":\"x\",\"temperature\":1e999}", "not valid JSON: real number overflow",
      REC_TICKET },
    { "{\"question\":\"x\",\"temperature\":null}", "'temperature' must be a number", REC_TICKET },
    { "{\"prompt_ids\":[1,-2]}", "'prompt_ids' must hold whole numbers >= 0", REC_TICKET },
    { "{\"prompt_ids\":[4294967296]}", "'prompt_ids' must hold whole numbers >= 0", REC_TICKET },
    { "{\"prompt_ids\":{}}", "'prompt_ids' must be an array", REC_TICKET },
    { "{\"question\":\"x\",\"treatment\":{\"hsh\":\"\"}}",
      "unknown field 'hsh', did you mean 'hash'?", REC_TICKET },
    { "{\"rec\":\"traj\",\"question\":\"x\"}", "a record 'traj' where 'ticket' is expected",
      REC_TICKET },
    { "{\"rec\":\"tickt\"}", "unknown kind of record 'tickt'", REC_TICKET },
    { "{\"question\":\"x\"}", "field 'rec' is missing", REC_NONE },
    { "{\"question\":\"x\",\"v\":3}", "ticket: field 'v' must be 2", REC_TICKET },
    { "{\"answer\":\"4\"}", "traj: field 'samples' is missing", REC_TRAJ },
    { "{\"answer\":\"4\",\"samples\":[{}]}", "traj: field 'samples[0].text' is missing", REC_TRAJ },
    { "{\"answer\":\"4\",\"samples\":[{\"text\":\"x\"},{\"text\":\"x\",\"score\":1}]}",
      "unknown field 'score'", REC_TRAJ },
    { "{\"answer\":\"4\",\"samples\":[{\"text\":\"x\",\"stop\":\"end\"}]}",
      "'samples[0].stop' must be one of eos|stop_string|length", REC_TRAJ },
    { "{\"answer\":\"4\",\"samples\":[{\"text\":\"x\",\"ids\":[1,2],\"lp\":[0]}]}",
      "1 log-probs for 2 tokens", REC_TRAJ },
    { "{\"answer\":\"4\",\"samples\":[{\"text\":\"x\",\"ids\":[1],\"lp\":[1e39]}]}",
      "finite float32 numbers", REC_TRAJ },
    { "{\"prompt_ids\":[1],\"samples\":[{\"ids\":[1]}]}", "'samples[0].score' is missing",
      REC_GROUP },
    { "{\"version\":1,\"path\":\"x\",\"final\":1}", "'final' must be true or false", REC_ADAPTER },
    { "{\"stage\":\"x\",\"state\":\"idle\"}", "'state' must be one of start|ready|work|wait|done",
      REC_BEAT },
};

Test(rec, wrong_json_names_file_line_and_field) {
    for (size_t i = 0; i < COUNT_OF(wrong); i++) {
        struct rec r;
        struct err e = { 0 };
        int rc = rec_from_json(&r, wrong[i].line, strlen(wrong[i].line), wrong[i].expected,
                               "t.jsonl:7", &e);
        cr_expect(rc < 0, "accepted: %s", wrong[i].line);
        cr_expect(strstr(e.text, wrong[i].says), "for %s\n  said: %s\n  want: %s", wrong[i].line,
                  e.text, wrong[i].says);
        cr_expect(str_starts(e.text, "t.jsonl:7:"), "%s", e.text);
        rec_release(&r);
    }
}
