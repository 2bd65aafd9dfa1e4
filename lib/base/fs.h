/* fs.h - files: mapped, read whole, replaced atomically, made durable.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_FS_H
#define QERL_FS_H
#include "lib/base/err.h"
#include "lib/base/str.h"

struct fs_map {                 /* a read-only mapping; fs_map lends data until fs_unmap */
    const uint8_t *data;
    size_t bytes;
};
/* regular files only; an empty file maps to bytes 0 */
int fs_map(struct fs_map *m, const char *path, struct err *e);
void fs_unmap(struct fs_map *m);

/* whole file; refuses a larger one */
int fs_read(struct str *out, const char *path, size_t bytes_max, struct err *e);
/* path.tmp, write, fsync, rename, fsync of the folder: after success the new bytes survive power
 * loss, after failure (disk full included) the old file is untouched and path.tmp is gone. */
int fs_replace(const char *path, const void *data, size_t bytes, struct err *e);
int fs_sync_dir(const char *dir, struct err *e);
int fs_sync_parent(const char *path, struct err *e);   /* the folder that holds path */
int fs_sync_file(const char *path, struct err *e);
int fs_mkdirs(const char *dir, struct err *e);                       /* mkdir -p */
/* rm -rf; an absent tree is fine */
int fs_remove_tree(const char *dir, struct err *e);
bool fs_exists(const char *path);
bool fs_is_dir(const char *path);
int64_t fs_free_bytes(const char *dir);                              /* -1 if unknown */
void fs_join(char *out, size_t size, const char *dir,
             const char *name); /* "dir/name"; asserts that it fits */
enum { FS_PATH_MAX = 1024 };
#endif
