/* aqn.h - AQN as the shared configuration says it: schedule, targets, words and plan. What stages
 * apply of it: treatment.h.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_AQN_H
#define QERL_AQN_H
#include "lib/base/json.h"
#include "lib/base/str.h"
#include "lib/model/noise.h"
#include "lib/stage/shared.h"

/* EXIT_CONFIG: what noise_schedule_check has to say. */
int aqn_check(const struct shared *c, struct err *e);
struct noise_schedule aqn_schedule(const struct shared *c);
/* The weights that are hit in that step. EXIT_CONFIG as noise_target_make. */
int aqn_target(struct noise_target *t, const struct shared *c, int64_t done,
               const struct model_conf *m, struct err *e);
/* One form for one treatment, "none" when off: for records and hashes. Appends. */
void aqn_text(const struct shared *c, struct str *out);
/* The same in few words, for labels: "norms", "linears in layers 14-17 others 0 #5c1f03aa9d42".
 * Long lists are cut; where more than names of targets counts, a hash of the multipliers that a
 * model of that shape has after `step` completed steps says whether two are the same. Appends. */
void aqn_target_text(const struct shared *c, const struct model_conf *m, int64_t step,
                     struct str *out);
/* Draws the strongest view of the run once: noise larger than the weights is refused (EXIT_CONFIG)
 * before the first step, above NOISE_STRONG of them it is worth a warning. */
int aqn_try(const struct shared *c, const struct model *m, struct err *e);
/* The same for --plan, before anything is packed, for the largest and the smallest noise of a run:
 * what is larger than its weights or too small to change one is refused, naming the key. */
int aqn_try_source(const struct shared *c, const struct model_conf *m, struct err *e);
/* Memory that noise on linear weights takes in a stage that computes under it. */
size_t aqn_bytes(const struct shared *c, const struct model_conf *m);
/* For --plan: "sigma", an array of {"from","to","sigma"} in completed steps (continuous schedules:
 * "sigma_to" at the end of each part), and, where the model is known and noise is on, "aqn":
 * {"norms","linears","elements","zones"}, zones an array of {"from","layers"}: the multipliers from
 * that step on, "" = 1 everywhere. m may be NULL. */
int aqn_plan(json_t *out, const struct shared *c, const struct model_conf *m, struct err *e);
#endif
