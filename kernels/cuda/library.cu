/* library.cu - see library.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/cuda/library.h"

#include <dlfcn.h>

#include "kernels/cuda/device.h"

static const char *file_of(const struct cuda_library *l) {
    const char *own = getenv(l->own);
    if (own && *own) return own;
#ifdef QERL_CUDA_EMU
    Dl_info self;                        /* the stand-in is linked into the emulated plugin */
    if (dladdr((const void *)file_of, &self)) return self.dli_fname;
#endif
    return l->file;
}

int cuda_library_load(const struct cuda_library *l, struct err *e) {
    const char *name = file_of(l);
    void *library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (!library)
        return cuda_fail(e, EXIT_ENV, "%s is not there (%s): install %s, or name the file in %s",
                         l->file, dlerror(), l->package, l->own);
    for (int i = 0; i < l->functions; i++) {
        const struct cuda_function *f = &l->function[i];
        if (!(*f->to = dlsym(library, f->name)))
            return cuda_fail(e, EXIT_ENV, "'%s' has no function %s: install %s, or name the file "
                                          "in %s", name, f->name, l->package, l->own);
    }
    return 0;
}
