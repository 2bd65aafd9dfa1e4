/* compare.h - everything `qerl-pipe compare` found, before it is said: compare.c finds it,
 * compare_text.c, compare_json.c and picture.c say it.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_COMPARE_H
#define QERL_COMPARE_H
#include "pipe/contrast.h"

struct contrast {                            /* one arm beside the baseline */
    enum align align;
    struct look *look; int looks;
    struct effect *at;                       /* by look, at alpha / looks */
    bool ends;                               /* the last look is the last score of both */
    struct look last;                        /* the last look with something to test */
    struct effect final;                     /* there, at alpha / comparisons */
    const struct result *a, *b;              /* the adapters that stand for the arms */
    bool same_adapter;                       /* there their bytes are the same */
};
struct comparison {
    struct result *run; int runs;
    struct arm arm[ARMS_MAX]; int arms;      /* the first is the baseline */
    struct difference *difference; int differences;
    struct str factor_names; int factors;
    struct str reasons, notes;               /* lines: must not be compared; should be known */
    enum align align;                        /* of the picture; each contrast has its own */
    bool noisy;                              /* the scores under noise */
    struct contrast contrast[ARMS_MAX];      /* [0] is not used */
};
/* Level of one look's interval, so that all of them hold together (Bonferroni). */
double look_alpha(const struct contrast *c);
double final_alpha(const struct comparison *c);
/* "seeds 1, 2, 3" and the like: what the verdict speaks about. */
bool contrast_of_treatments(const struct effect *e);

/* The ID reward's difference to the baseline at a look; NAN = not known. Nothing tests it. */
double look_reward(const struct comparison *c, int arm, const struct look *l);

void compare_text(const struct comparison *c, bool markdown, FILE *to);
void compare_json(const struct comparison *c, FILE *to);
int compare_picture(const struct comparison *c, const char *path, struct err *e);
#endif
