/* wire_dir.h - a folder of its own for a test, short enough for ipc paths. For tests only.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_WIRE_DIR_H
#define QERL_WIRE_DIR_H
#include "lib/base/sys.h"

#include <criterion/criterion.h>

#include "lib/base/fs.h"

struct wire_dir { char path[64]; };
static inline void wire_dir_init(struct wire_dir *d) {
    snprintf(d->path, sizeof d->path, "/tmp/qerl.XXXXXX");
    cr_assert(mkdtemp(d->path));
}
static inline void wire_dir_release(struct wire_dir *d) { fs_remove_tree(d->path, NULL); }
/* "DIR/name", in one of four buffers taken in turn. */
static inline const char *wire_dir_file(const struct wire_dir *d, const char *name) {
    static char path[4][256];
    static int turn;
    turn = (turn + 1) % 4;
    snprintf(path[turn], sizeof path[turn], "%s/%s", d->path, name);
    return path[turn];
}
static inline void wire_dir_write(const char *path, const void *data, size_t bytes) {
    FILE *f = fopen(path, "w");
    cr_assert(f && fwrite(data, 1, bytes, f) == bytes);
    fclose(f);
}
#endif
