/* tape.h - a file of records that survives a kill.
 *
 * 16-byte header {"QERLTAPE", u32 version, u32 zero}, then frames {u32 length, u32 crc32c of
 * sequence and payload, u64 sequence, payload = MessagePack record}, all little endian. Sequence
 * counts from 0. A torn last frame (file shorter than the frame says, or its CRC wrong and nothing
 * follows) is cut on append-open, with a log line; a bad frame before the last is damage and is
 * refused with its offset.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_TAPE_H
#define QERL_TAPE_H
#include "lib/wire/rec.h"

struct tape;
/* Append: creates the file (durable name) or cuts a torn tail; frames already there can be read
 * with tape_read first. One appender at a time (flock): a second is refused with EXIT_ENV. */
int tape_append_open(struct tape **out, const char *path, struct err *e);
int tape_read_open(struct tape **out, const char *path, struct err *e);
void tape_close(struct tape **t);
/* buffered until tape_sync */
int tape_append(struct tape *t, const struct rec *r, struct err *e);
/* write only: survives a kill, not a power cut */
int tape_flush(struct tape *t, struct err *e);
/* write + fdatasync; an error is final */
int tape_sync(struct tape *t, struct err *e);
/* 1 = a record, 0 = end (asked again later: what was appended since), -1 = damage. */
int tape_read(struct tape *t, struct rec *r, struct err *e);
/* Frames read so far; the first append steps over all that were not read, so from then on it is the
 * length of the tape. */
uint64_t tape_frames(const struct tape *t);
/* Forgets frames from `frames` on (append mode, after reading): resume cuts what its checkpoint
 * does not know. */
int tape_truncate(struct tape *t, uint64_t frames, struct err *e);
#endif
