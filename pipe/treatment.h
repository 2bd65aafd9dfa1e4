/* treatment.h - the noise on operators and modules as tables: what the stages plan, and what was
 * measured in a step.
 *
 * Knows: the rows that stages print with --plan ("phase", "key", "kind", "name", "direction",
 * "type", "intended" or "threshold" or neither, "sites", "layers", "note"), the names of metrics.
 * Does not know what any of it means.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_TREATMENT_H
#define QERL_TREATMENT_H
#include "pipe/plan.h"

/* Rows of all stages, each once. The caller owns the array. */
json_t *treatment_rows(const struct plan *pl, int stages);
/* Every "noise/.../warning" of a line of metrics, e.g. that what was intended came to nothing. */
void treatment_warnings(const json_t *metrics, const char *indent, FILE *to);
/* Adds the evidence of the run's newest noisy score to metrics, under the names that the phases of
 * training have: "noise/eval/op/matmul/forward/realised". */
void treatment_add_score(json_t *metrics, const char *run_dir);
/* A line for each phase x {operator, module} x {forward, backward} that is noised. `metrics`: the
 * newest line of metrics.jsonl, NULL = only what is intended. Every line begins with `indent`. */
void treatment_print(const json_t *rows, const json_t *metrics, const char *indent, FILE *to);
#endif
