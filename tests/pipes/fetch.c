/* fetch.c - tools/fetch, one test a case of tests/pipes/fetch.sh; and the table that it reads.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/base/fs.h"

#include <criterion/criterion.h>

static void run(const char *name) {
    char command[128];
    snprintf(command, sizeof command, "sh tests/pipes/fetch.sh %s", name);
    cr_expect(system(command) == 0, "%s", command);
}

Test(fetch, brings_an_intact_mirror) { run("intact"); }
Test(fetch, refuses_a_truncated_file) { run("truncated"); }
Test(fetch, refuses_an_altered_file) { run("altered"); }
Test(fetch, refuses_a_wrong_number_of_lines) { run("lines"); }
Test(fetch, refuses_an_empty_file) { run("empty"); }
Test(fetch, refuses_a_mirror_that_lacks_a_file) { run("missing"); }
Test(fetch, leaves_nothing_when_interrupted) { run("interrupted"); }
Test(fetch, recovers_after_a_kill) { run("killed"); }
Test(fetch, says_that_the_network_refused) { run("refused"); }
Test(fetch, keeps_what_was_there_when_it_fails) { run("kept"); }
Test(fetch, says_aloud_what_it_could_not_verify) { run("unverified"); }
Test(fetch, answers_wrong_command_lines) { run("usage"); }

/* Eight fields a row; sizes and sums are numbers and hex, or "-" where the row says untested. */
Test(fetch, has_a_table_that_programs_can_read) {
    struct str text;
    struct err e = { 0 };
    int rows = 0;
    str_init(&text);
    cr_assert(fs_read(&text, "tools/fetch.table", 1 << 20, &e) == 0, "%s", e.text);
    for (char *line = strtok(text.s, "\n"); line; line = strtok(NULL, "\n")) {
        char *field[8] = { line };
        int n = 1;
        if (*line == '#') continue;
        for (char *tab; (tab = strchr(field[n - 1], '\t')) && n < 8; n++) {
            *tab = 0;
            field[n] = tab + 1;
        }
        int64_t number;
        bool hashed = strcmp(field[4], "-");
        cr_assert(n == 8, "row '%s' has %d fields", line, n);
        cr_expect(hashed || strcmp(field[6], "untested") == 0);
        cr_expect(!hashed ||
                  (strlen(field[4]) == 64 && strspn(field[4], "0123456789abcdef") == 64));
        cr_expect(!hashed || (str_to_i64(field[2], &number) && number > 0));
        cr_expect(str_starts(field[5], "models/") || str_starts(field[5], "data/"));
        rows++;
    }
    cr_expect(rows == 13);
    str_release(&text);
}
