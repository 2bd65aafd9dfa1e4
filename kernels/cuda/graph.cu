/* graph.cu - sequences of operations kept as CUDA graphs: captured once, then launched as one.
 *
 * Knows: that a graph holds addresses by value, so one that was recorded with another scratch is
 * dropped; that what waits, allocates or reads host memory cannot be captured: it spoils the
 * recording, which is then not kept. Does not know: what the operations are, what a key means.
 * The caller has run the same operations before: their kernels are loaded and the scratch has
 * grown.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/cuda/device.h"

bool cuda_spoils(struct kern *k) {
    struct cuda_graphs *g = &cuda_of(k)->graphs;
    g->spoilt |= g->recording;
    return g->recording;
}

static void drop(struct kern *k, struct cuda_graph *g) {
    if (g->exec) CUDA_TRY(k, "forget", cudaGraphExecDestroy(g->exec));
    memset(g, 0, sizeof *g);
}

static struct cuda_graph *find(struct cuda_graphs *all, uint64_t key) {
    for (int i = 0; i < CUDA_GRAPHS_MAX; i++)
        if (all->kept[i].exec && all->kept[i].key == key) return &all->kept[i];
    return NULL;
}
/* A place that is free, or whose graph cannot be launched any more. NULL: none. Nothing makes room:
 * sizes that take turns would else be recorded again and again. */
static struct cuda_graph *place(struct kern *k) {
    struct cuda_state *c = cuda_of(k);
    for (struct cuda_graph *g = c->graphs.kept; g < c->graphs.kept + CUDA_GRAPHS_MAX; g++)
        if (!g->exec || g->scratch != c->scratch) return g;
    return NULL;
}

/* Only this thread's calls are held to what may be captured: other tables go on. */
void cuda_record(struct kern *k) {
    struct cuda_graphs *all = &cuda_of(k)->graphs;
    assert(!all->recording);
    all->recording = true;
    all->spoilt = !CUDA_TRY(k, "record", cudaStreamBeginCapture(cuda_stream(k),
                                                                cudaStreamCaptureModeThreadLocal));
}

bool cuda_keep(struct kern *k, uint64_t key) {
    struct cuda_graphs *all = &cuda_of(k)->graphs;
    cudaGraph_t graph = NULL;
    cudaGraphExec_t exec = NULL;
    assert(all->recording);
    all->recording = false;
    bool ok = CUDA_TRY(k, "keep", cudaStreamEndCapture(cuda_stream(k), &graph)) && !all->spoilt &&
              !k->latched.text[0];
    struct cuda_graph *old = find(all, key), *to = old ? old : place(k);
    if (ok && to) ok = CUDA_TRY(k, "keep", cudaGraphInstantiate(&exec, graph, 0));
    if (graph) CUDA_TRY(k, "keep", cudaGraphDestroy(graph));
    if (!ok || !to) return false;
    drop(k, to);
    to->key = key;
    to->exec = exec;
    to->scratch = cuda_of(k)->scratch;
    return true;
}

bool cuda_replay(struct kern *k, uint64_t key) {
    struct cuda_graphs *all = &cuda_of(k)->graphs;
    struct cuda_graph *g = find(all, key);
    if (!g) return false;
    if (g->scratch != cuda_of(k)->scratch) {
        drop(k, g);
        return false;
    }
    CUDA_TRY(k, "replay", cudaGraphLaunch(g->exec, cuda_stream(k)));
    return true;
}

/* A graph under way is freed when it has ended (CUDA's reference, cudaGraphExecDestroy). */
void cuda_forget(struct kern *k) {
    for (int i = 0; i < CUDA_GRAPHS_MAX; i++) drop(k, &cuda_of(k)->graphs.kept[i]);
}
