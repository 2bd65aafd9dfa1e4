/* fs.c - see fs.h. A failed fsync is never tried again: after it the kernel may have dropped the
 * data.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/base/fs.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

int fs_map(struct fs_map *m, const char *path, struct err *e) {
    *m = (struct fs_map){ 0 };
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return err_set(e, "cannot open '%s': %s", path, strerror(errno));
    struct stat st;
    if (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode)) {
        close(fd);
        return err_set(e, "'%s' is not a regular file", path);
    }
    if (st.st_size > 0) {
        void *p = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_SHARED, fd, 0);
        if (p == MAP_FAILED) {
            int failed = errno;
            close(fd);
            return err_set(e, "cannot map '%s': %s", path, strerror(failed));
        }
        m->data = p;
        m->bytes = (size_t)st.st_size;
    }
    close(fd);
    return 0;
}

void fs_unmap(struct fs_map *m) {
    if (m->data) munmap((void *)(uintptr_t)m->data, m->bytes);
    *m = (struct fs_map){ 0 };
}

int fs_read(struct str *out, const char *path, size_t bytes_max, struct err *e) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return err_set(e, "cannot open '%s': %s", path, strerror(errno));
    char buf[1 << 14];
    ssize_t n;
    str_clear(out);
    str_add(out, "", 0);
    while ((n = read(fd, buf, sizeof buf)) > 0) {
        str_add(out, buf, (size_t)n);
        if (out->len > bytes_max) {
            close(fd);
            return err_set(e, "'%s' is larger than %zu bytes", path, bytes_max);
        }
    }
    int failed = errno;
    close(fd);
    return n < 0 ? err_set(e, "cannot read '%s': %s", path, strerror(failed)) : 0;
}

static int sync_path(const char *path, int flags, struct err *e) {
    int fd = open(path, O_RDONLY | O_CLOEXEC | flags);
    if (fd < 0) return err_set(e, "cannot open '%s': %s", path, strerror(errno));
    int rc = fsync(fd), failed = errno;
    close(fd);
    return rc < 0 ? err_set(e, "cannot make '%s' durable: %s", path, strerror(failed)) : 0;
}

int fs_sync_dir(const char *dir, struct err *e) { return sync_path(dir, O_DIRECTORY, e); }
int fs_sync_file(const char *path, struct err *e) { return sync_path(path, 0, e); }

int fs_sync_parent(const char *path, struct err *e) {
    char dir[FS_PATH_MAX];
    snprintf(dir, sizeof dir, "%s", path);
    char *slash = strrchr(dir, '/');
    if (!slash) return fs_sync_dir(".", e);
    slash[slash == dir] = 0;
    return fs_sync_dir(dir, e);
}

int fs_replace(const char *path, const void *data, size_t bytes, struct err *e) {
    char tmp[FS_PATH_MAX];
    if ((size_t)snprintf(tmp, sizeof tmp, "%s.tmp", path) >= sizeof tmp)
        return err_set(e, "path too long: '%s'", path);
    int fd = open(tmp, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd < 0) return err_set(e, "cannot create '%s': %s", tmp, strerror(errno));
    const char *p = data;
    for (size_t left = bytes; left;) {
        ssize_t n = write(fd, p, left);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) {
            int failed = n < 0 ? errno : ENOSPC;
            close(fd);
            unlink(tmp);
            return err_set(e, "cannot write '%s': %s", tmp, strerror(failed));
        }
        p += n;
        left -= (size_t)n;
    }
    if (fsync(fd) < 0 || close(fd) < 0 || rename(tmp, path) < 0) {
        int failed = errno;
        unlink(tmp);
        return err_set(e, "cannot replace '%s': %s", path, strerror(failed));
    }
    return fs_sync_parent(path, e);
}

int fs_mkdirs(const char *dir, struct err *e) {
    char path[FS_PATH_MAX];
    if ((size_t)snprintf(path, sizeof path, "%s", dir) >= sizeof path)
        return err_set(e, "path too long: '%s'", dir);
    for (char *p = path + 1;; p++) {
        if (*p && *p != '/') continue;
        char kept = *p;
        *p = 0;
        if (mkdir(path, 0755) == 0) {
            if (fs_sync_parent(path, e) < 0) return -1;
        } else if (errno != EEXIST)
            return err_set(e, "cannot make folder '%s': %s", path, strerror(errno));
        *p = kept;
        if (!kept) return fs_is_dir(path) ? 0 : err_set(e, "'%s' is not a folder", path);
    }
}

int fs_remove_tree(const char *dir, struct err *e) {
    DIR *d = opendir(dir);
    if (!d) {
        if (errno == ENOENT) return 0;
        if (errno == ENOTDIR && unlink(dir) == 0) return 0;
        return err_set(e, "cannot remove '%s': %s", dir, strerror(errno));
    }
    struct dirent *entry;
    int rc = 0;
    while (rc == 0 && (entry = readdir(d))) {
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) continue;
        char path[FS_PATH_MAX];
        struct stat st;
        fs_join(path, sizeof path, dir, entry->d_name);
        if (lstat(path, &st) == 0 && S_ISDIR(st.st_mode)) rc = fs_remove_tree(path, e);
        else if (unlink(path) < 0) rc = err_set(e, "cannot remove '%s': %s", path, strerror(errno));
    }
    closedir(d);
    if (rc == 0 && rmdir(dir) < 0) rc = err_set(e, "cannot remove '%s': %s", dir, strerror(errno));
    return rc;
}

bool fs_exists(const char *path) { return access(path, F_OK) == 0; }

bool fs_is_dir(const char *path) {
    struct stat st;
    return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

int64_t fs_free_bytes(const char *dir) {
    struct statvfs v;
    return statvfs(dir, &v) < 0 ? -1 : (int64_t)v.f_bavail * (int64_t)v.f_frsize;
}

void fs_join(char *out, size_t size, const char *dir, const char *name) {
    int n = snprintf(out, size, "%s/%s", dir, name);
    assert(n >= 0 && (size_t)n < size);
    (void)n;
}
