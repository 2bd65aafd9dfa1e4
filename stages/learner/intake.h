/* intake.h - where groups come from: leased as tickets to rollouts, or found in the journal or in a
 * recorded tape.
 *
 * The learner is the only committer. A group that arrives is checked, appended to the journal
 * (tape/groups.tape), made durable, and only then acknowledged; so an acknowledged group is never
 * lost and never made twice. Which groups a step wants is decided by the caller from committed
 * state; who makes them, and in which order they arrive, changes nothing. Leases are kept in memory
 * only: after a restart they are "wanted minus journalled".
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_INTAKE_H
#define QERL_INTAKE_H
#include "lib/base/fs.h"
#include "lib/base/hash.h"
#include "lib/task/task.h"
#include "lib/wire/tape.h"
#include "stages/learner/conf.h"

struct intake;
struct intake_policy {               /* what the groups of a step must have been made with */
    int64_t for_step;                /* the step that wants them: completed steps before it */
    int64_t step, version;           /* completed steps behind the adapter that samples */
    char adapter[FS_PATH_MAX], adapter_sha256[SHA256_HEX];
    double sigma;
    uint64_t noise_seed;
};
/* Opens the journal in DIR/tape when there is a ticket link; reads what it holds from group
 * `cursor` on. With a file on the group port everything comes from there and nothing is
 * journalled. */
int intake_open(struct intake **out, struct stage *s, const struct policy *p,
                struct task_set *train, int64_t fence, int64_t cursor, struct err *e);
void intake_close(struct intake **in);
/* From now on groups first .. first+count-1 are asked for, whatever intake_wave waits for; asking
 * again for what is asked for or here does nothing. At most LAG_MAX + 1 steps at a time; those of
 * earlier steps are leased first. */
void intake_ask(struct intake *in, const struct intake_policy *p, int64_t first, int count);
/* Asks for groups first .. first+count-1, waits for them and fills group[0 .. count-1] (lent until
 * intake_forget). What else was asked for is leased, as far as rollouts take tickets, before it
 * returns. 0 done, 1 asked to stop, -1 error. */
int intake_wave(struct intake *in, const struct intake_policy *p, int64_t first, int count,
                const struct rec_group **group, struct err *e);
/* Releases groups below `cursor`: no step wants them any more. */
void intake_forget(struct intake *in, int64_t cursor);
/* Tells the rollouts that no more will be asked for; waits shortly for their goodbye. */
void intake_end(struct intake *in);
struct intake_counts { int64_t leased, journalled, repeated, refused; };
struct intake_counts intake_counts(const struct intake *in);
#endif
