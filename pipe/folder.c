/* folder.c - see folder.h: names, lock, state. What is written into a new folder is in manifest.c.
 * SPDX-License-Identifier: Apache-2.0 */
#include "pipe/folder.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "lib/base/fs.h"

const char *const run_state_name[] = { "running", "done",       "stopped",
                                       "failed",  "incomplete", "unknown" };

/* "e6b-0012" of name "e6b" -> 12; 0 if it is not one. */
static int number_of(const char *id, const char *name) {
    size_t n = strlen(name), digits = 0;
    if (strncmp(id, name, n) != 0 || id[n] != '-') return 0;
    for (const char *c = id + n + 1; *c; c++, digits++)
        if (!isdigit((unsigned char)*c)) return 0;
    return digits >= 4 && digits <= 8 ? (int)strtol(id + n + 1, NULL, 10) : 0;
}

static int newest(const char *runs_dir, const char *name) {
    DIR *d = opendir(runs_dir);
    int most = 0;
    for (struct dirent *entry; d && (entry = readdir(d));) {
        int n = number_of(entry->d_name, name);
        if (n > most) most = n;
    }
    if (d) closedir(d);
    return most;
}

static int set_name(struct folder *f, const char *runs_dir, const char *name, int number) {
    snprintf(f->id, sizeof f->id, "%.120s-%04d", name, number);
    int n = snprintf(f->dir, sizeof f->dir, "%s/%s", runs_dir, f->id);
    return n > 0 && (size_t)n < sizeof f->dir ? 0 : -1;
}

void folder_next(struct folder *f, const char *runs_dir, const char *name) {
    f->lock_fd = -1;
    set_name(f, runs_dir, name, newest(runs_dir, name) + 1);
}

int folder_create(struct folder *f, const char *runs_dir, const char *name, struct err *e) {
    static const char *const sub[] = { "conf", "log", "tape", "adapters", "ckpt", "tensorboard" };
    f->lock_fd = -1;
    if (fs_mkdirs(runs_dir, e) < 0) {
        if (e) e->code = EXIT_ENV;
        return err_wrap(e, "no place for runs");
    }
    int number = newest(runs_dir, name) + 1;
    /* two launchers at once: one of them gets the next number */
    for (;; number++) {
        if (set_name(f, runs_dir, name, number) < 0)
            return err_code(e, EXIT_CONFIG, "the path of the run folder is too long");
        if (mkdir(f->dir, 0755) == 0) break;
        if (errno != EEXIST)
            return err_code(e, EXIT_ENV, "cannot make run folder '%s': %s", f->dir,
                            strerror(errno));
    }
    for (size_t i = 0; i < COUNT_OF(sub); i++) {
        char path[FS_PATH_MAX];
        fs_join(path, sizeof path, f->dir, sub[i]);
        if (mkdir(path, 0755) < 0)
            return err_code(e, EXIT_ENV, "cannot make folder '%s': %s", path, strerror(errno));
    }
    return folder_lock(f, e);
}

static bool is_run(const char *dir) {
    char path[FS_PATH_MAX];
    if (strlen(dir) > 580) return false;
    fs_join(path, sizeof path, dir, "resolved.pipe");
    return fs_exists(path);
}

static void set_dir(struct folder *f, const char *dir) {
    snprintf(f->dir, sizeof f->dir, "%s", dir);
    for (size_t n = strlen(f->dir); n > 1 && f->dir[n - 1] == '/';) f->dir[--n] = 0;
    const char *slash = strrchr(f->dir, '/');
    snprintf(f->id, sizeof f->id, "%.150s", slash ? slash + 1 : f->dir);
}

int folder_find(struct folder *f, const char *runs_dir, const char *run, struct err *e) {
    char path[600];
    f->lock_fd = -1;
    if (is_run(run)) {
        set_dir(f, run);
        return 0;
    }
    snprintf(path, sizeof path, "%s/%s", runs_dir, run);
    if (is_run(path)) {
        set_dir(f, path);
        return 0;
    }
    int number = newest(runs_dir, run);
    if (number && set_name(f, runs_dir, run, number) == 0 && is_run(f->dir)) return 0;
    char **ids;
    int n = folder_list(runs_dir, &ids);
    const char *near = str_nearest(run, (const char *const *)ids, (size_t)n);
    err_code(e, EXIT_USAGE, "there is no run '%s': neither a run folder nor a name in '%s'%s%s%s",
             run, runs_dir,
             near ? "; did you mean '"
             : n  ? "; qerl-pipe status lists them"
                  : "",
             near ? near : "", near ? "'?" : "");
    for (int i = 0; i < n; i++) free(ids[i]);
    free(ids);
    return -1;
}

static int by_name(const void *a, const void *b) {
    return strcmp(*(char *const *)a, *(char *const *)b);
}

int folder_list(const char *runs_dir, char ***ids) {
    int n = 0;
    *ids = NULL;
    DIR *d = opendir(runs_dir);
    for (struct dirent *entry; d && (entry = readdir(d));) {
        char path[600];
        if ((size_t)snprintf(path, sizeof path, "%s/%s", runs_dir, entry->d_name) >= sizeof path ||
            !is_run(path))
            continue;
        *ids = mem_grow(*ids, (size_t)(n + 1) * sizeof **ids);
        (*ids)[n++] = mem_dup(entry->d_name);
    }
    if (d) closedir(d);
    if (n) qsort(*ids, (size_t)n, sizeof **ids, by_name);
    return n;
}

/* ---- lock ---- */

static const char sockets_prefix[] = "/tmp/qerl-";

/* The second line of the lock names the folder of the sockets; a launcher that was killed could not
 * remove it. */
static void remove_left_sockets(int fd) {
    char text[300];
    ssize_t n = pread(fd, text, sizeof text - 1, 0);
    text[n > 0 ? n : 0] = 0;
    char *dir = strchr(text, '\n'), *end = dir ? strchr(++dir, '\n') : NULL;
    if (!end || !str_starts(dir, sockets_prefix)) return;
    *end = 0;
    if (strlen(dir) == sizeof sockets_prefix - 1 + 6 &&
        !strchr(dir + sizeof sockets_prefix - 1, '/'))
        fs_remove_tree(dir, NULL);
}

void folder_note_sockets(const struct folder *f, const char *dir) {
    char text[300];
    int n = snprintf(text, sizeof text, "%d\n%s\n", (int)getpid(), dir);
    /* only a courtesy to /tmp */
    if (pwrite(f->lock_fd, text, (size_t)n, 0) != n) return;
}

int folder_lock(struct folder *f, struct err *e) {
    char path[FS_PATH_MAX], pid[32];
    fs_join(path, sizeof path, f->dir, "run.lock");
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    if (fd < 0) return err_code(e, EXIT_ENV, "cannot open '%s': %s", path, strerror(errno));
    for (int tries = 0; flock(fd, LOCK_EX | LOCK_NB) < 0; tries++) {
        int64_t holder = folder_holder(f);
        if (tries == 50 || (holder > 1 && tries == 5)) {
            close(fd);
            return err_code(e, EXIT_FAILED,
                            "run '%s' is being worked on by process %lld: qerl-pipe stop %s",
                            f->dir, (long long)holder, f->dir);
        }
        nanosleep(&(struct timespec){ .tv_nsec = 100000000 }, NULL);
    }
    remove_left_sockets(fd);
    int n = snprintf(pid, sizeof pid, "%d\n", (int)getpid());
    if (ftruncate(fd, 0) < 0 || pwrite(fd, pid, (size_t)n, 0) != n) {
        int failed = errno;
        close(fd);
        return err_code(e, EXIT_ENV, "cannot write '%s': %s", path, strerror(failed));
    }
    f->lock_fd = fd;
    return 0;
}

void folder_unlock(struct folder *f) {
    if (f->lock_fd >= 0) close(f->lock_fd);
    f->lock_fd = -1;
}

int64_t folder_holder(const struct folder *f) {
    char path[FS_PATH_MAX], text[32] = "";
    fs_join(path, sizeof path, f->dir, "run.lock");
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return 0;
    bool held = flock(fd, LOCK_SH | LOCK_NB) < 0 && errno == EWOULDBLOCK;
    ssize_t n = read(fd, text, sizeof text - 1);
    close(fd);
    if (!held) return 0;
    int64_t pid = n > 0 ? atoll(text) : 0;
    return pid > 1 && kill((pid_t)pid, 0) == 0 ? pid : 1;
}

/* ---- state ---- */

int folder_set_state(const struct folder *f, enum run_state s, const char *reason, struct err *e) {
    char path[FS_PATH_MAX], line[1200];
    fs_join(path, sizeof path, f->dir, "state");
    int n = snprintf(line, sizeof line - 1, "%s%s%.1000s", run_state_name[s],
                     reason && *reason ? ": " : "", reason ? reason : "");
    for (int i = 0; i < n; i++)
        if (line[i] == '\n') line[i] = ' ';
    line[n++] = '\n';
    return fs_replace(path, line, (size_t)n, e);
}

enum run_state folder_state(const struct folder *f, char *reason, size_t size) {
    char path[FS_PATH_MAX];
    struct str text;
    enum run_state s = RUN_STATE_UNKNOWN;
    fs_join(path, sizeof path, f->dir, "state");
    str_init(&text);
    if (size) reason[0] = 0;
    if (fs_read(&text, path, 4096, NULL) == 0) {
        for (size_t n = text.len; n && text.s[n - 1] == '\n';) text.s[--n] = 0;
        for (int i = 0; i < RUN_STATE_UNKNOWN; i++) {
            size_t n = strlen(run_state_name[i]);
            if (strncmp(text.s, run_state_name[i], n) != 0 || (text.s[n] && text.s[n] != ':'))
                continue;
            s = (enum run_state)i;
            if (size && text.s[n]) snprintf(reason, size, "%s", text.s + n + 2);
        }
    }
    str_release(&text);
    return s;
}
