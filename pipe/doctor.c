/* doctor.c - ten checks of this machine, each one line: ok, warn or fail, and what to do.
 * SPDX-License-Identifier: Apache-2.0 */
#include "pipe/commands.h"

#include <errno.h>
#include <stdarg.h>
#include <sys/sysinfo.h>
#include <sys/un.h>
#include <unistd.h>
#include <zmq.h>

#include "lib/base/fs.h"
#include "lib/base/hash.h"
#include "pipe/proc.h"
#include "pipe/report.h"

enum verdict { VERDICT_OK, VERDICT_WARN, VERDICT_FAIL };
static int worst;

static void say(enum verdict v, const char *fmt, ...) PRINTF_LIKE(2, 3);
static void say(enum verdict v, const char *fmt, ...) {
    static const char *const word[] = { "ok:  ", "warn:", "fail:" };
    va_list ap;
    va_start(ap, fmt);
    printf("%s ", word[v]);
    vprintf(fmt, ap);
    putchar('\n');
    va_end(ap);
    if ((int)v > worst) worst = (int)v;
}

static void check_cores(void) {
    struct place_machine m;
    char cores[400];
    place_machine(&m);
    place_cores_text(cores, sizeof cores, &m.cores);
    int n = CPU_COUNT(&m.cores);
    if (n < 2) say(VERDICT_WARN, "cores: only core %s; runs work, stages take turns on it", cores);
    else say(VERDICT_OK, "cores: %d usable (%s)", n, cores);
}

static void check_kernels(void) {
    char path[FS_PATH_MAX], list[160] = "";
    struct about a;
    struct err e = { 0 };
    if (proc_find(path, sizeof path, "qerl-rollout") < 0 || about_ask(&a, path, &e) < 0) {
        say(VERDICT_FAIL, "kernels: cannot ask qerl-rollout: %s", *e.text ? e.text : "run make");
        return;
    }
    json_t *all = json_object_get(a.json, "kernels");
    const char *best = json_string_value(json_array_get(all, 0));
    for (size_t i = 0; i < json_array_size(all); i++)
        snprintf(list + strlen(list), sizeof list - strlen(list), "%s%s", i ? ", " : "",
                 json_string_value(json_array_get(all, i)));
    if (!best || !strcmp(best, "ref"))
        say(VERDICT_WARN,
            "kernels: only the slow reference path (%s: neither AVX2 nor AVX-512); use a newer CPU",
            *cpu_flags() ? cpu_flags() : "unknown CPU");
    else
        say(VERDICT_OK, "kernels: %s (run.kernels can be %s); instructions %s", best, list,
            cpu_flags());
    about_release(&a);
}

static void check_memory(void) {
    struct sysinfo si;
    char have[32];
    if (sysinfo(&si) < 0) {
        say(VERDICT_WARN, "memory: unknown");
        return;
    }
    double total = (double)si.totalram * si.mem_unit;
    bytes_text(have, sizeof have, total);
    if (total < 2e9)
        say(VERDICT_WARN, "memory: %s; enough for models/tiny, real models need more", have);
    else say(VERDICT_OK, "memory: %s", have);
}

static void check_disk(const char *runs_dir) {
    const char *dir = fs_is_dir(runs_dir) ? runs_dir : ".";
    int64_t free_bytes = fs_free_bytes(dir);
    char have[32];
    bytes_text(have, sizeof have, (double)free_bytes);
    if (access(dir, W_OK | X_OK) < 0)
        say(VERDICT_FAIL, "disk: cannot write into '%s': %s; run elsewhere or set run.runs_dir",
            dir, strerror(errno));
    else if (free_bytes < 0) say(VERDICT_WARN, "disk: free space of '%s' unknown", dir);
    else if (free_bytes < 1 << 30)
        say(VERDICT_WARN, "disk: %s free; a run keeps adapters and tapes: make room", have);
    else say(VERDICT_OK, "disk: %s free, '%s' can be written", have, dir);
}

static void check_zmq(void) {
    int a, b, c;
    zmq_version(&a, &b, &c);
    if (a * 10000 + b * 100 + c < 40303)
        say(VERDICT_FAIL,
            "libzmq %d.%d.%d has known holes: install 4.3.3 or newer (apt-get install libzmq3-dev)",
            a, b, c);
    else say(VERDICT_OK, "libzmq %d.%d.%d", a, b, c);
}

static void check_stages(void) {
    static const char *const name[] = { "qerl-rollout", "qerl-reward", "qerl-learner",
                                        "qerl-eval" };
    struct str bad;
    str_init(&bad);
    for (size_t i = 0; i < COUNT_OF(name); i++) {
        char path[FS_PATH_MAX];
        struct about a;
        struct err e = { 0 };
        if (proc_find(path, sizeof path, name[i]) < 0)
            str_printf(&bad, "%s%s is not built", bad.len ? ", " : "", name[i]);
        else if (about_ask(&a, path, &e) < 0) str_printf(&bad, "%s%s", bad.len ? ", " : "", e.text);
        else about_release(&a);
    }
    if (bad.len) say(VERDICT_FAIL, "stages: %s: run make", bad.s);
    else say(VERDICT_OK, "stages: rollout, reward, learner and eval describe themselves");
    str_release(&bad);
}

static void check_sockets(void) {
    char dir[] = "/tmp/qerl-XXXXXX";
    size_t room = sizeof ((struct sockaddr_un *)0)->sun_path;
    if (!mkdtemp(dir)) {
        say(VERDICT_FAIL, "sockets: cannot make a folder in /tmp: %s; make /tmp writable",
            strerror(errno));
        return;
    }
    void *ctx = zmq_ctx_new(), *socket = zmq_socket(ctx, ZMQ_PULL);
    char url[200];
    snprintf(url, sizeof url, "ipc://%s/probe", dir);
    int rc = zmq_bind(socket, url);
    if (rc < 0)
        say(VERDICT_FAIL,
            "sockets: cannot bind in /tmp: %s; a file system with sockets is needed there",
            zmq_strerror(errno));
    else say(VERDICT_OK, "sockets: /tmp takes them, paths up to %zu bytes", room - 1);
    zmq_close(socket);
    zmq_ctx_term(ctx);
    fs_remove_tree(dir, NULL);
}

/* "HASH  model.safetensors" in models/tiny/SHA256SUMS, as sha256sum writes it. */
static void recorded_hash(char out[SHA256_HEX]) {
    struct str text;
    str_init(&text);
    out[0] = 0;
    if (fs_read(&text, "models/tiny/SHA256SUMS", 1 << 16, NULL) == 0) {
        char *save = NULL;
        for (char *line = strtok_r(text.s, "\n", &save); line; line = strtok_r(NULL, "\n", &save))
            if (str_ends(line, "model.safetensors")) snprintf(out, SHA256_HEX, "%.64s", line);
    }
    str_release(&text);
}

static void check_files(void) {
    static const char model[] = "models/tiny/model.safetensors";
    char is[SHA256_HEX], asked[SHA256_HEX];
    bool data = fs_exists("data/gsm8k/test.jsonl") && fs_exists("data/gsm8k/train.jsonl");
    recorded_hash(asked);
    if (sha256_file(model, is, NULL) < 0)
        say(VERDICT_WARN,
            "files: '%s' is not here; run in the folder of the clone, or git checkout models/tiny",
            model);
    else if (*asked && strcmp(asked, is) != 0)
        say(VERDICT_FAIL, "files: '%s' is altered: git checkout models/tiny", model);
    else if (!data)
        say(VERDICT_WARN,
            "files: models/tiny is intact (sha256 %.12s...); no GSM8K in data/gsm8k: tools/fetch "
            "gsm8k",
            is);
    else
        say(VERDICT_OK, "files: models/tiny is intact (sha256 %.12s...), GSM8K is in data/gsm8k",
            is);
}

/* One line of a small file in /proc or /sys, "" where there is none. */
static const char *system_line(char out[200], const char *path) {
    FILE *f = fopen(path, "re");
    out[0] = 0;
    if (f && fgets(out, 200, f)) out[strcspn(out, "\n")] = 0;
    if (f) fclose(f);
    return out;
}

/* "reaches 1,3 directly": the others whose memory it reads without the host. */
static void reach_text(char *out, size_t size, const json_t *device, size_t devices) {
    const json_t *peers = json_object_get(device, "peers");
    uint64_t set = 0;
    char ids[200];
    for (size_t i = 0; i < json_array_size(peers); i++)
        set |= 1ull << (json_integer_value(json_array_get(peers, i)) & 63);
    place_gpus_text(ids, sizeof ids, set);
    if (devices < 2) out[0] = 0;
    else if (set) snprintf(out, size, ", reaches %s directly", ids);
    else snprintf(out, size, ", reaches the others through the host");
}

static void print_gpu(size_t index, const json_t *device, size_t devices) {
    char all[32], left[32], reach[240], node[200], path[120];
    const char *pci = json_string_value(json_object_get(device, "pci"));
    bytes_text(all, sizeof all, json_number_value(json_object_get(device, "memory_bytes")));
    bytes_text(left, sizeof left, json_number_value(json_object_get(device, "free_bytes")));
    reach_text(reach, sizeof reach, device, devices);
    snprintf(path, sizeof path, "/sys/bus/pci/devices/%.40s/numa_node", pci ? pci : "");
    system_line(node, path);
    printf("      gpu:%zu %s, %s, %s, %s free, PCI %s%s%s%s\n", index,
           json_string_value(json_object_get(device, "name")),
           json_string_value(json_object_get(device, "arch")), all, left, pci ? pci : "unknown",
           *node && *node != '-' ? ", NUMA node " : "", *node == '-' ? "" : node, reach);
}

/* What is there, as the plugin sees it; the driver's own version is the kernel module's. */
static void check_gpu(void) {
    struct place_machine m;
    struct err e = { 0 };
    char path[FS_PATH_MAX], gpus[200], module[200];
    place_machine(&m);
    place_gpus_text(gpus, sizeof gpus, m.gpus);
    const char *named = getenv("QERL_CUDA");
    const bool plugin = (named && *named) || proc_find(path, sizeof path, "qerl-cuda.so") == 0;
    json_t *o = plugin ? place_devices(&e) : NULL, *all = json_object_get(o, "devices");
    const char *error = json_string_value(json_object_get(o, "error")),
               *versions = json_string_value(json_object_get(o, "versions")),
               *nccl = json_string_value(json_object_get(o, "nccl"));
    const size_t n = json_array_size(all);
    system_line(module, "/sys/module/nvidia/version");
    if (plugin && !o) error = e.text;
    if (n) {
        say(m.emulated || (n > 1 && !nccl) ? VERDICT_WARN : VERDICT_OK, "GPU: %zu%s; %s%s%s%s%s",
            n, m.emulated ? " EMULATED on the CPU, for tests only (QERL_CUDA is set)" : "",
            versions, *module ? ", kernel module " : "", module, nccl ? ", NCCL " : "",
            nccl    ? nccl
            : n > 1 ? ", no NCCL, which a learner on several needs: install libnccl2"
                    : "");
        for (size_t i = 0; i < n; i++) print_gpu(i, json_array_get(all, i), n);
    } else if (m.gpus && !plugin) {
        say(VERDICT_WARN, "GPU: %s, but no qerl-cuda.so: build it with make CUDA=1", gpus);
    } else if (m.gpus || (error && named && *named)) {
        say(VERDICT_FAIL, "GPU: %s: %s", m.gpus ? gpus : "none", error);
    } else {
        say(VERDICT_OK, "GPU: none here%s%s%s; a place 'gpu:N' takes its next alternative",
            error ? " (" : "", error ? error : "", error ? ")" : "");
    }
    json_decref(o);
}

static void check_stale(const char *runs_dir) {
    char **ids;
    struct str stale;
    str_init(&stale);
    int n = folder_list(runs_dir, &ids);
    for (int i = 0; i < n; i++) {
        struct folder f;
        if (folder_find(&f, runs_dir, ids[i], NULL) == 0 &&
            folder_state(&f, NULL, 0) == RUN_STATE_RUNNING && !folder_holder(&f))
            str_printf(&stale, "%s%s", stale.len ? ", " : "", ids[i]);
        free(ids[i]);
    }
    free(ids);
    if (stale.len)
        say(VERDICT_WARN,
            "runs: %s say 'running', but no process works on them: qerl-pipe resume RUN", stale.s);
    else say(VERDICT_OK, "runs: %d in '%s', none abandoned", n, runs_dir);
    str_release(&stale);
}

int command_doctor(const struct command_line *c) {
    worst = VERDICT_OK;
    check_cores();
    check_kernels();
    check_memory();
    check_disk(c->runs_dir);
    check_zmq();
    check_stages();
    check_sockets();
    check_files();
    check_gpu();
    check_stale(c->runs_dir);
    return worst == VERDICT_FAIL ? EXIT_ENV : EXIT_DONE;
}
