/* stream.cc - streams, events and graphs of the emulated runtime: when work runs.
 *
 * Work runs at once, or with EMU_DEFER=1 only when something waits for it, and then no more of it
 * than that wait needs: whoever forgot to wait reads what was there before. The default stream
 * waits for all others of its device and they for it, as CUDA's legacy one.
 * A graph is the list of what one stream was given while it was captured; work that joins several
 * streams in one capture is refused. EMU_GRAPHS=0: no graph can be launched.
 * Order: queues, streams, events, graphs.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/cuda/emu/emu.h"

#include <algorithm>
#include <chrono>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

/* ---- queues ---- */

struct node {                                         /* work that a graph may run many times */
    struct emu_work w;
    explicit node(const struct emu_work &from) : w(from) {}
    ~node() { w.launch.drop(w.launch.args); }
    node(const node &) = delete;
    node &operator=(const node &) = delete;
};
struct queue;
struct item {                                         /* runs `work`, or waits for other work */
    std::shared_ptr<node> work;
    std::shared_ptr<queue> other;
    uint64_t upto;
    std::shared_ptr<double> stamp;                    /* an event's time, ms */
};
struct queue {
    int device = 0;
    bool blocking = true;                             /* takes part in the default stream's order */
    std::deque<item> items;
    uint64_t given = 0, done = 0;
};
struct CUgraph_st { std::vector<std::shared_ptr<node>> nodes; };
struct CUgraphExec_st { std::vector<std::shared_ptr<node>> nodes; };
struct CUstream_st { std::shared_ptr<queue> q; struct CUgraph_st *capture; bool spoilt; };
struct CUevent_st { std::shared_ptr<queue> q; uint64_t upto; std::shared_ptr<double> stamp; };

static bool faulted;                                  /* by EMU_FAULT; it stays so, as on a GPU */
static std::recursive_mutex lock;
typedef std::lock_guard<std::recursive_mutex> hold;
static std::vector<std::weak_ptr<queue>> queues;
static std::shared_ptr<queue> defaults[64];           /* of each device */
static std::vector<cudaStream_t> captures;            /* streams under capture */

static size_t queued;                                 /* items of all queues */

static bool deferring(void) {
    static const bool yes = emu_setting("EMU_DEFER", 0) != 0;
    return yes;
}
bool emu_deferred(void) {
    hold h(lock);
    return deferring() || queued;
}
/* As CUDA in the modes global and thread-local: the call fails, and so does the capture. */
cudaError_t emu_no_capture(const char *what) {
    hold h(lock);
    if (captures.empty()) return cudaSuccess;
    for (cudaStream_t s : captures) s->spoilt = true;
    return emu_error(cudaErrorStreamCaptureUnsupported, "%s while a stream is captured", what);
}
static double now_ms(void) {
    using namespace std::chrono;
    return duration<double, std::milli>(steady_clock::now().time_since_epoch()).count();
}
static void note_fault(const char *kernel) {
    static const char *const bad = getenv("EMU_FAULT");
    if (bad && !strcmp(kernel, bad)) faulted = true;
}
/* Whether what the item waits for has come; `stay`: waits for it. */
static bool came(const item &it, bool stay);
/* Until upto, or, unless `stay`, until something that waits for another process. */
static void run_upto(const std::shared_ptr<queue> &q, uint64_t upto, bool stay) {
    while (q->done < upto && !q->items.empty()) {
        if (!came(q->items.front(), stay)) return;
        item it = std::move(q->items.front());
        q->items.pop_front();
        queued--;
        q->done++;
        if (it.stamp) *it.stamp = now_ms();
        if (!it.work) continue;
        const struct emu_work *w = &it.work->w;
        emu_unlock(w->launch.kernel ? w->device : -1);
        if (w->launch.kernel) emu_run(&w->launch, w->device), note_fault(w->launch.name);
        else w->launch.run(w->launch.args);
        emu_relock();
    }
}
static bool came(const item &it, bool stay) {
    if (it.other) {
        run_upto(it.other, it.upto, stay);
        if (it.other->done < it.upto) return false;
    }
    if (!it.work || !it.work->w.ready) return true;
    emu_unlock(-1);
    bool yes;
    while (!(yes = it.work->w.ready(it.work->w.launch.args)) && stay)
        std::this_thread::sleep_for(std::chrono::microseconds(50));
    emu_relock();
    return yes;
}
static void push(const std::shared_ptr<queue> &q, item &&it) {
    q->items.push_back(std::move(it));
    q->given++;
    queued++;
    if (!deferring()) run_upto(q, q->given, false);
}
static void push_wait(const std::shared_ptr<queue> &q, const std::shared_ptr<queue> &other) {
    if (other != q && other->done < other->given) push(q, { nullptr, other, other->given, nullptr });
}
static std::shared_ptr<queue> queue_of(cudaStream_t s) {
    if (s && s != cudaStreamLegacy) return s->q;
    int device;
    cudaGetDevice(&device);
    if (!defaults[device]) {
        defaults[device] = std::make_shared<queue>();
        defaults[device]->device = device;
    }
    return defaults[device];
}
/* The default stream's order: what must come before something in q. */
static void push_order(const std::shared_ptr<queue> &q) {
    if (!emu_deferred() || !q->blocking) return;
    bool is_default = q == defaults[q->device];
    if (!is_default && defaults[q->device]) push_wait(q, defaults[q->device]);
    if (is_default)
        for (const auto &weak : queues)
            if (auto other = weak.lock())
                if (other->blocking && other->device == q->device) push_wait(q, other);
}
static cudaError_t wrong_device(cudaStream_t s, int device) {
    return emu_error(cudaErrorInvalidResourceHandle,
                     "work for device %d in a stream of device %d", device, s->q->device);
}
cudaError_t emu_queue(cudaStream_t s, const struct emu_work *w) {
    hold h(lock);
    auto work = std::make_shared<node>(*w);
    if (s && s != cudaStreamLegacy && w->launch.kernel && s->q->device != w->device)
        return wrong_device(s, w->device);
    if (s && s != cudaStreamLegacy && s->capture) {
        s->capture->nodes.push_back(work);
        return cudaSuccess;
    }
    if (!captures.empty() && (!s || s == cudaStreamLegacy))
        return emu_no_capture("work in the default stream");
    auto q = queue_of(s);
    push_order(q);
    push(q, { work, nullptr, 0, nullptr });
    return cudaSuccess;
}

/* ---- streams ---- */

static cudaError_t settle(cudaStream_t s, const char *what) {
    if (s && s != cudaStreamLegacy && s->capture) {
        s->spoilt = true;
        return emu_error(cudaErrorStreamCaptureUnsupported, "%s of a stream that is captured", what);
    }
    auto q = queue_of(s);
    push_order(q);
    run_upto(q, q->given, true);
    emu_check_edges();
    return faulted ? emu_error(cudaErrorIllegalAddress, "%s: an earlier kernel failed", what)
                   : cudaSuccess;
}
extern "C" cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags) {
    hold h(lock);
    *s = new CUstream_st{ std::make_shared<queue>(), nullptr, false };
    (*s)->q->blocking = !(flags & cudaStreamNonBlocking);
    queues.push_back((*s)->q);
    return cudaGetDevice(&(*s)->q->device);
}
extern "C" cudaError_t cudaStreamCreate(cudaStream_t *s) { return cudaStreamCreateWithFlags(s, 0); }
extern "C" cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int) {
    return cudaStreamCreateWithFlags(s, flags);
}
extern "C" cudaError_t cudaStreamDestroy(cudaStream_t s) {
    hold h(lock);
    cudaError_t e = settle(s, "cudaStreamDestroy");
    if (!e) delete s;
    return e;
}
extern "C" cudaError_t cudaStreamSynchronize(cudaStream_t s) {
    hold h(lock);
    return settle(s, "cudaStreamSynchronize");
}
extern "C" cudaError_t cudaStreamQuery(cudaStream_t s) {
    hold h(lock);
    auto q = queue_of(s);
    if (q->done < q->given) run_upto(q, q->done + 1, false);     /* or a loop of queries would not end */
    return q->done < q->given ? cudaErrorNotReady : cudaSuccess;
}
extern "C" cudaError_t cudaDeviceSynchronize(void) {
    hold h(lock);
    cudaError_t e = emu_no_capture("cudaDeviceSynchronize");
    int device;
    if (e || (e = cudaGetDevice(&device))) return e;
    for (size_t i = queues.size(); i-- > 0;)              /* the youngest first: no order is promised */
        if (auto q = queues[i].lock()) {
            if (q->device == device) run_upto(q, q->given, true);
        } else queues.erase(queues.begin() + (long)i);
    return settle(nullptr, "cudaDeviceSynchronize");
}

/* ---- events ---- */

extern "C" cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned) {
    *e = new CUevent_st{ nullptr, 0, std::make_shared<double>(0.0) };
    return cudaSuccess;
}
extern "C" cudaError_t cudaEventCreate(cudaEvent_t *e) { return cudaEventCreateWithFlags(e, 0); }
extern "C" cudaError_t cudaEventDestroy(cudaEvent_t e) {
    delete e;
    return cudaSuccess;
}
static bool captured(cudaStream_t s) { return s && s != cudaStreamLegacy && s->capture; }
extern "C" cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
    hold h(lock);
    if (captured(s))
        return emu_error(cudaErrorNotSupported, "an event in a captured stream: not emulated");
    e->q = queue_of(s);
    e->stamp = std::make_shared<double>(0.0);
    push_order(e->q);
    push(e->q, { nullptr, nullptr, 0, e->stamp });
    e->upto = e->q->given;
    return cudaSuccess;
}
extern "C" cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned) {
    hold h(lock);
    if (captured(s))
        return emu_error(cudaErrorNotSupported, "a wait in a captured stream: not emulated");
    if (e->q) push(queue_of(s), { nullptr, e->q, e->upto, nullptr });
    return cudaSuccess;
}
extern "C" cudaError_t cudaEventSynchronize(cudaEvent_t e) {
    hold h(lock);
    if (e->q) run_upto(e->q, e->upto, true);
    return cudaSuccess;
}
extern "C" cudaError_t cudaEventQuery(cudaEvent_t e) {
    hold h(lock);
    if (e->q && e->q->done < e->upto) run_upto(e->q, e->q->done + 1, false);
    return e->q && e->q->done < e->upto ? cudaErrorNotReady : cudaSuccess;
}
extern "C" cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) {
    hold h(lock);
    if (!from->q || !to->q)
        return emu_error(cudaErrorInvalidResourceHandle, "time between events never recorded");
    if (from->q->done < from->upto || to->q->done < to->upto) return cudaErrorNotReady;
    *ms = (float)(*to->stamp - *from->stamp);
    return cudaSuccess;
}

/* ---- graphs ---- */

extern "C" cudaError_t cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode) {
    hold h(lock);
    if (!s || s == cudaStreamLegacy || s->capture)
        return emu_error(cudaErrorIllegalState, "capture of %s",
                         s && s != cudaStreamLegacy ? "a captured stream" : "the default stream");
    s->capture = new CUgraph_st;
    s->spoilt = false;
    captures.push_back(s);
    return cudaSuccess;
}
extern "C" cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *g) {
    hold h(lock);
    *g = nullptr;
    if (!captured(s)) return emu_error(cudaErrorIllegalState, "end of a capture that never began");
    *g = s->capture;
    s->capture = nullptr;
    captures.erase(std::find(captures.begin(), captures.end(), s));
    if (!s->spoilt) return cudaSuccess;
    delete *g;
    *g = nullptr;
    return emu_error(cudaErrorStreamCaptureInvalidated, "the capture failed on the way");
}
extern "C" cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *out) {
    hold h(lock);
    *out = captured(s) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
extern "C" cudaError_t cudaGraphInstantiate(cudaGraphExec_t *x, cudaGraph_t g, unsigned long long) {
    *x = new CUgraphExec_st{ g->nodes };
    return cudaSuccess;
}
extern "C" cudaError_t cudaGraphLaunch(cudaGraphExec_t x, cudaStream_t s) {
    hold h(lock);
    if (!emu_setting("EMU_GRAPHS", 1))
        return emu_error(cudaErrorNotSupported, "cudaGraphLaunch while EMU_GRAPHS=0");
    if (captured(s)) {
        for (const auto &n : x->nodes) s->capture->nodes.push_back(n);
        return cudaSuccess;
    }
    auto q = queue_of(s);
    push_order(q);
    for (const auto &n : x->nodes) push(q, { n, nullptr, 0, nullptr });
    return cudaSuccess;
}
extern "C" cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }
extern "C" cudaError_t cudaGraphGetNodes(cudaGraph_t g, cudaGraphNode_t *nodes, size_t *n) {
    if (nodes) return emu_error(cudaErrorNotSupported, "a graph's nodes: only their number is");
    *n = g->nodes.size();
    return cudaSuccess;
}
extern "C" cudaError_t cudaGraphExecDestroy(cudaGraphExec_t x) {
    delete x;
    return cudaSuccess;
}
extern "C" cudaError_t cudaGraphDestroy(cudaGraph_t g) {
    delete g;
    return cudaSuccess;
}
