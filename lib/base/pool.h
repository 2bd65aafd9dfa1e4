/* pool.h - threads inside one operation.
 *
 * pool_run calls fn(arg, part, parts) for part = 0 .. parts-1 on the caller and the workers and
 * returns when all are done. Who runs which part is not defined, so a part must own its outputs:
 * results then cannot depend on the number of threads. Workers spin for a bounded time (about 50
 * us) and then sleep on a futex; an idle pool costs nothing.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_POOL_H
#define QERL_POOL_H
#include "lib/base/sys.h"

enum { POOL_THREADS_MAX = 256 };
struct pool;
struct pool *pool_create(int threads);          /* 1 .. POOL_THREADS_MAX, the caller included */
void pool_destroy(struct pool **p);
int pool_threads(const struct pool *p);
void pool_run(struct pool *p, int parts, void (*fn)(void *arg, int part, int parts), void *arg);
/* Cores this process may use (affinity mask), at least 1. */
int pool_cores(void);
#endif
