/* treatment.h - the noise on operators and modules as tables: what the stages plan, and what was
 * measured in a step.
 *
 * Knows: the rows that stages print with --plan ("phase", "kind", "name", "direction", "type",
 * "intended", "sites", "note") and the names of their metrics. Does not know what any of it means.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_TREATMENT_H
#define QERL_TREATMENT_H
#include "pipe/plan.h"

/* Rows of all stages, each once. The caller owns the array. */
json_t *treatment_rows(const struct plan *pl, int stages);
/* A line for each phase x {operator, module} x {forward, backward} that is noised. `metrics`: the
 * newest line of metrics.jsonl, NULL = only what is intended. Every line begins with `indent`. */
void treatment_print(const json_t *rows, const json_t *metrics, const char *indent, FILE *to);
#endif
