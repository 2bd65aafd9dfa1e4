/* load.c - see plugin.h. Finds and loads bin/qerl-cuda.so, once a process, and says in one line
 * what is missing.
 *
 * Knows: where the plugin lies, the two versions that must agree. Does not know: CUDA.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/cuda/plugin.h"

#include <dlfcn.h>
#include <pthread.h>
#include <unistd.h>

#include "kernels/cpu.h"
#include "lib/base/fs.h"
#include "lib/base/str.h"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static const struct cuda_plugin *loaded;
static char loaded_path[FS_PATH_MAX];

/* QERL_CUDA, or qerl-cuda.so beside this program. */
static int plugin_path(char path[FS_PATH_MAX], struct err *e) {
    const char *own = getenv("QERL_CUDA");
    if (own && *own) {
        if (own[0] == '/' && strlen(own) < FS_PATH_MAX) {
            snprintf(path, FS_PATH_MAX, "%s", own);
            return 0;
        }
        return err_code(e, EXIT_ENV, "QERL_CUDA = '%s' must be the full path of a plugin", own);
    }
    ssize_t n = readlink("/proc/self/exe", path, FS_PATH_MAX - 1);
    path[n > 0 ? n : 0] = 0;
    char *slash = strrchr(path, '/');
    static const char name[] = "/qerl-cuda.so";
    if (!slash || (size_t)(slash - path) + sizeof name > FS_PATH_MAX)
        return err_code(e, EXIT_ENV, "cannot tell where this program lies: set QERL_CUDA");
    memcpy(slash, name, sizeof name);
    return 0;
}

static int check(const struct cuda_plugin *p, const char *path, struct err *e) {
    if (p && p->abi == CUDA_PLUGIN_ABI && p->kern_abi == KERN_ABI &&
        p->kern_bytes == sizeof(struct kern))
        return 0;
    /* of another ABI, nothing behind the first number can be read */
    if (!p || p->abi != CUDA_PLUGIN_ABI)
        return err_code(e, EXIT_ENV,
                        "'%s' has plugin version %u, this program needs %d: build both again with "
                        "make CUDA=1",
                        path, p ? p->abi : 0, CUDA_PLUGIN_ABI);
    return err_code(e, EXIT_ENV,
                    "'%s' has kernels of version %u (a table of %zu bytes), this program needs %d "
                    "(%zu bytes): build both again with make CUDA=1",
                    path, p->kern_abi, p->kern_bytes, KERN_ABI, sizeof(struct kern));
}

static const struct cuda_plugin *load(struct err *e) {
    char path[FS_PATH_MAX];
    if (plugin_path(path, e) < 0) return NULL;
    if (!fs_exists(path)) {
        err_code(e, EXIT_ENV, "the CUDA plugin '%s' is not there: build it with make CUDA=1", path);
        return NULL;
    }
    void *file = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!file) {
        err_code(e, EXIT_ENV, "cannot load the CUDA plugin '%s': %s", path, dlerror());
        return NULL;
    }
    cuda_plugin_entry *entry;
    *(void **)&entry = dlsym(file, CUDA_PLUGIN_ENTRY);       /* as POSIX writes it */
    if (!entry) {
        err_code(e, EXIT_ENV, "'%s' is no CUDA plugin: it has no symbol %s", path,
                 CUDA_PLUGIN_ENTRY);
        return NULL;
    }
    const struct cuda_plugin *p = entry();
    if (check(p, path, e) < 0) return NULL;
    snprintf(loaded_path, sizeof loaded_path, "%s", path);
    return p;
}

const char *cuda_plugin_path(void) { return loaded_path; }

const struct cuda_plugin *cuda_load(struct err *e) {
    pthread_mutex_lock(&lock);
    if (!loaded) loaded = load(e);
    const struct cuda_plugin *p = loaded;
    pthread_mutex_unlock(&lock);
    return p;
}

/* Kernels by name: what stands before a colon and a device's number. */
static const struct { const char *name; enum cuda_form form; } forms[] = {
    { "cuda", CUDA_FORM_STRICT }, { "cuda-mma", CUDA_FORM_MMA }, { "cuda-blas", CUDA_FORM_BLAS },
};

static int read_name(const char *name, enum cuda_form *form, int64_t *index) {
    const size_t n = strcspn(name, ":");
    *index = 0;
    for (size_t i = 0; i < COUNT_OF(forms); i++) {
        if (strlen(forms[i].name) != n || memcmp(forms[i].name, name, n) != 0) continue;
        *form = forms[i].form;
        const bool number = name[n] && str_to_i64(name + n + 1, index) && *index >= 0 &&
                            *index < CUDA_DEVICES_MAX;
        return !name[n] || number ? 0 : -1;
    }
    return -1;
}

int cuda_open(struct kern *k, const char *name, struct pool *pool, struct err *e) {
    enum cuda_form form;
    int64_t index;
    if (read_name(name, &form, &index) < 0)
        return err_code(e, EXIT_ENV, "kernels '%s': write cuda, cuda-mma or cuda-blas, and :N "
                                     "behind it for device N, from 0", name);
    const struct cuda_plugin *p = cuda_load(e);
    if (!p || p->open(k, (int)index, form, e) < 0) return err_wrap(e, "kernels '%s'", name);
    k->pool = pool;
    return 0;
}
