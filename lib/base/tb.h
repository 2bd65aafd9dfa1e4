/* tb.h - writes TensorBoard event files: scalars by tag and step.
 *
 * A file is records {u64 length, u32 masked crc32c of the length, payload, u32 masked crc32c of the
 * payload}, little endian; a payload is one Event of tb.proto, the first says "brain.Event:2". A
 * kill can tear the last record; readers stop there. Ownership: copies what it is given.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_TB_H
#define QERL_TB_H
#include "lib/base/err.h"

struct tb;
/* Creates DIR/events.out.tfevents.TIME.HOST.PID (the folder must exist; each call makes a new file,
 * which readers merge). */
int tb_open(struct tb **out, const char *dir, struct err *e);
/* One scalar. wall_time in seconds since 1970; value may be any float, NaN included (TensorBoard
 * shows it as such). Buffered. After a failure nothing more is written, and tb_flush says why. */
void tb_scalar(struct tb *t, const char *tag, int64_t step, double wall_time, double value);
int tb_flush(struct tb *t, struct err *e);       /* hands what is buffered to the system */
int tb_close(struct tb **t, struct err *e);      /* flushes; NULL is fine */
const char *tb_path(const struct tb *t);
#endif
