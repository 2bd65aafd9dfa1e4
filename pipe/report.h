/* report.h - what a run found, read from its files alone: the table at the end, runs/SUMMARY.md,
 * status.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_REPORT_H
#define QERL_REPORT_H
#include "pipe/folder.h"
#include "pipe/scores.h"

/* The last line of metrics.jsonl, or NULL. The caller owns it. */
json_t *report_last_metrics(const struct folder *f);
void report_results(const struct folder *f, FILE *to);
int report_summary(const char *runs_dir, struct err *e);
void report_status(const struct folder *f, bool details, FILE *to);
#endif
