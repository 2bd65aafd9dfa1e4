/* plugin.h - the one door between the programs (C, no CUDA in them) and bin/qerl-cuda.so.
 *
 * The plugin exports one symbol, qerl_cuda_plugin, that returns this table. Programs find it with
 * dlopen beside themselves, or where QERL_CUDA names it (an absolute path: tests put the emulated
 * plugin there). It is never unloaded.
 * Device memory stays behind kptr; a kern table that `open` filled is used by one thread, as any.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_CUDA_PLUGIN_H
#define QERL_CUDA_PLUGIN_H
#include "kernels/kern.h"

enum { CUDA_PLUGIN_ABI = 4, CUDA_DEVICES_MAX = 64 };
#define CUDA_PLUGIN_ENTRY "qerl_cuda_plugin"

struct cuda_device {
    char name[256];
    char arch[16];                                    /* "sm_90"; "emulated" */
    char pci[16];                                     /* "0000:1b:00.0" */
    size_t memory_bytes, free_bytes;
    uint64_t peers;                                   /* bit i: reads device i's memory directly */
};

/* Strict: kern.h's order of sums, the CPU's bits. Mma: products on tensor cores, bits of their own
 * (kernels/cuda/mma_tile.h); they differ from one architecture to the next. Blas: as mma for few
 * rows, cuBLAS for many: there a row's bits depend on how many come with it. */
enum cuda_form { CUDA_FORM_STRICT, CUDA_FORM_MMA, CUDA_FORM_BLAS };
/* Device memory of the form blas beside what the model takes: cuBLAS's workspace, then scratch for
 * a slab of unpacked weight and a block of activations, with what cuda_scratch adds. */
enum { CUDA_BLAS_WORKSPACE = 32 << 20, CUDA_BLAS_SLAB = 64 << 20,
       CUDA_BLAS_BYTES_MAX = CUDA_BLAS_WORKSPACE + CUDA_BLAS_SLAB / 2 * 5 };

/* What a device can do at most, for benchmarks. Read: the `bytes` at p, again and again; fma, mma:
 * multiply-adds of f32 and on tensor cores (bf16 with f32 sums) on every SM. */
enum cuda_probe { CUDA_PROBE_READ, CUDA_PROBE_FMA, CUDA_PROBE_MMA };
/* Ranks: processes that compute together, each on a device of its own, whose arrays meet by NCCL,
 * which is loaded when it is first asked for (libnccl.so.2, or the file that QERL_NCCL names).
 * Where it is missing: EXIT_ENV and one line that says what to install. */
struct cuda_ranks;                                    /* one rank's */
enum { CUDA_RANKS_ID_BYTES = 128 };
/* Called again and again while a call waits for the other ranks: -1 with the reason ends it, and
 * whatever the device still waits for. */
typedef int cuda_ranks_watch(void *ud, struct err *e);
struct cuda_ranks_opts {
    struct kern *kern;                                /* lent until close; its stream is used */
    const char *id;                                   /* of ranks_id */
    int rank, count;
    size_t piece;                                     /* floats of the largest gather */
    cuda_ranks_watch *watch;
    void *ud;
};

struct cuda_plugin {
    uint32_t abi;                                     /* CUDA_PLUGIN_ABI: read before all else */
    uint32_t kern_abi;                                /* KERN_ABI that it was built with */
    size_t kern_bytes;                                /* sizeof(struct kern), the same check */
    const char *versions;                             /* "CUDA 13.0, driver up to 13.1" */
    /* How many devices this process may use, CUDA_DEVICES_MAX at most, in CUDA_VISIBLE_DEVICES'
     * order; -1 (EXIT_ENV) with what is missing: the driver, or a device. */
    int (*count)(struct err *e);
    /* One of them; it takes some of the device's memory to ask. -1 (EXIT_ENV). */
    int (*describe)(struct cuda_device *d, int index, struct err *e);
    /* Overwrites every slot of the table for device `index`; -1 (EXIT_ENV) with the reason. */
    int (*open)(struct kern *k, int index, enum cuda_form form, struct err *e);
    /* Queues `turns` turns of a probe as an operation of k; bytes read or FLOPs done by all of it,
     * 0 after a latched error. */
    double (*probe)(struct kern *k, enum cuda_probe what, kptr p, size_t bytes, int turns);

    /* "2.28.9" of the NCCL that is there. */
    int (*ranks_version)(char out[16], struct err *e);
    /* One rank makes the name under which all then open; other programs carry it. */
    int (*ranks_id)(char id[CUDA_RANKS_ID_BYTES], struct err *e);
    int (*ranks_open)(struct cuda_ranks **out, const struct cuda_ranks_opts *o, struct err *e);
    /* Queued, in the order of the table's operations; all ranks with the same n <= piece.
     * gather: x[0, n) of every rank, to where add finds it; add: x[i] = their sum, f32, in rank
     * order from rank 0. */
    int (*ranks_gather)(struct cuda_ranks *r, kptr x, size_t n, struct err *e);
    void (*ranks_add)(struct cuda_ranks *r, kptr x, size_t n);
    /* Until all that was queued is done. */
    int (*ranks_wait)(struct cuda_ranks *r, struct err *e);
    void (*ranks_close)(struct cuda_ranks **r);
};
typedef const struct cuda_plugin *cuda_plugin_entry(void);

/* kernels/cuda/load.c, in the programs: NULL (EXIT_ENV) with one line that says whether the plugin,
 * what it links, or its ABI is missing. Loaded once a process. */
const struct cuda_plugin *cuda_load(struct err *e);
const char *cuda_plugin_path(void);                   /* of what was loaded, "" for nothing */
#endif
