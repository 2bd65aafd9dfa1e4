/* cuda_load.c - what a program says when it cannot have its GPU: each missing piece by itself, one line, EXIT_ENV. Plugins
 * are made here by cc; no CUDA is needed. Each test is a process, and a plugin is loaded once a process.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/kern.h"

#include <criterion/criterion.h>
#include <unistd.h>

#include "lib/base/fs.h"

static char dir[] = "/tmp/qerl-plugin-XXXXXX", plugin[64];

static void begin(void) {
    cr_assert(mkdtemp(dir));
    snprintf(plugin, sizeof plugin, "%s/qerl-cuda.so", dir);
    setenv("QERL_CUDA", plugin, 1);
}
static void end(void) { fs_remove_tree(dir, NULL); }

/* Compiles `code` to the file `name` of the folder, with further words for cc. */
static void compile(const char *name, const char *code, const char *words) {
    char source[128], command[600];
    snprintf(source, sizeof source, "%s/%s.c", dir, name);
    cr_assert(fs_replace(source, code, strlen(code), NULL) == 0);
    snprintf(command, sizeof command, "cc -std=c11 -shared -fPIC -I. %s -o %s/%s -L%s %s 2>&1", source, dir, name, dir, words);
    if (system("cc --version > /dev/null 2>&1")) cr_skip_test("no cc here");
    cr_assert_eq(system(command), 0, "%s", command);
}

static const char FAKE[] =
    "#include \"kernels/cuda/plugin.h\"\n"
    "#ifndef ABI\n#define ABI CUDA_PLUGIN_ABI\n#endif\n#ifndef KERNELS\n#define KERNELS KERN_ABI\n#endif\n"
    "#ifndef BYTES\n#define BYTES sizeof(struct kern)\n#endif\n"
    "static int count(struct err *e) { (void)e; return 2; }\n"
    "static int describe(struct cuda_device *d, int i, struct err *e) { (void)d; (void)i; (void)e; return 0; }\n"
    "static int open(struct kern *k, int i, enum cuda_form f, struct err *e) {\n"
    "    if (i > 1) { e->code = EXIT_ENV; snprintf(e->text, sizeof e->text, \"no device %d\", i); return -1; }\n"
    "    *k = (struct kern){ .name = f == CUDA_FORM_BLAS ? \"cuda-blas:0\" : f ? \"cuda-mma:0\" : i ? \"cuda:1\" : \"cuda:0\", .bits = \"fake\", .abi = KERN_ABI }; return 0;\n}\n"
    "static const struct cuda_plugin p = { ABI, KERNELS, BYTES, \"fake\", count, describe, open };\n"
    "const struct cuda_plugin *qerl_cuda_plugin(void) { return &p; }\n";

/* kern_open fails with EXIT_ENV and one line that holds all of `parts`. */
static void expect_refused(const char *name, const char *const parts[]) {
    struct kern k;
    struct err e = { 0 };
    cr_assert_eq(kern_open(&k, name, NULL, &e), -1);
    cr_assert_eq(e.code, EXIT_ENV, "%d: %s", e.code, e.text);
    cr_assert_null(strchr(e.text, '\n'), "%s", e.text);
    for (int i = 0; parts[i]; i++) cr_assert(strstr(e.text, parts[i]), "'%s' is not in: %s", parts[i], e.text);
}
#define EXPECT_REFUSED(name, ...) expect_refused(name, (const char *const[]){ __VA_ARGS__, NULL })

TestSuite(cuda_load, .init = begin, .fini = end);

Test(cuda_load, no_file, .description = "the plugin is not there: which file, and how to make it") {
    EXPECT_REFUSED("cuda", "kernels 'cuda'", plugin, "make CUDA=1");
}

Test(cuda_load, relative_path, .description = "QERL_CUDA must be a full path: stages run in other folders") {
    setenv("QERL_CUDA", "obj/qerl-cuda.so", 1);
    EXPECT_REFUSED("cuda:0", "kernels 'cuda:0'", "QERL_CUDA = 'obj/qerl-cuda.so'", "full path");
}

Test(cuda_load, no_library, .description = "a library that the plugin links is gone: its name is said") {
    compile("libqerlgone.so", "int qerl_gone(void) { return 1; }\n", "");
    compile("qerl-cuda.so", "int qerl_gone(void);\nint f(void) { return qerl_gone(); }\n", "-lqerlgone");
    char gone[128];
    snprintf(gone, sizeof gone, "%s/libqerlgone.so", dir);
    cr_assert(unlink(gone) == 0);
    EXPECT_REFUSED("cuda", "cannot load the CUDA plugin", plugin, "libqerlgone.so");
}

Test(cuda_load, no_entry, .description = "a library that is no plugin") {
    compile("qerl-cuda.so", "int f(void) { return 1; }\n", "");
    EXPECT_REFUSED("cuda", "is no CUDA plugin", "qerl_cuda_plugin");
}

Test(cuda_load, no_library_at_all, .description = "a file that is no library") {
    cr_assert(fs_replace(plugin, "text", 4, NULL) == 0);
    EXPECT_REFUSED("cuda", "cannot load the CUDA plugin", plugin);
}

Test(cuda_load, other_abi, .description = "another version of the plugin's own table") {
    compile("qerl-cuda.so", FAKE, "-DABI=77");
    EXPECT_REFUSED("cuda", "plugin version 77", "make CUDA=1");
}

Test(cuda_load, other_kernels, .description = "another version of the table of operations") {
    compile("qerl-cuda.so", FAKE, "-DKERNELS=99");
    EXPECT_REFUSED("cuda", "kernels of version 99", "make CUDA=1");
}

Test(cuda_load, other_size, .description = "the same version, but a table of another size") {
    compile("qerl-cuda.so", FAKE, "-DBYTES=8");
    EXPECT_REFUSED("cuda", "a table of 8 bytes", "make CUDA=1");
}

Test(cuda_load, device_index, .description = "the plugin's own refusal passes through, and names are read strictly") {
    compile("qerl-cuda.so", FAKE, "");
    EXPECT_REFUSED("cuda:2", "kernels 'cuda:2': no device 2");
    static const char *const bad[] = { "cuda:", "cuda:x", "cuda:-1", "cuda:64", "cudax", "cuda:0x1", "cuda-", "cuda-mma:", "cuda-mmax", "cuda-blas:64", "cuda-blass" };
    for (size_t i = 0; i < COUNT_OF(bad); i++) EXPECT_REFUSED(bad[i], bad[i], "write cuda, cuda-mma or cuda-blas, and :N");
}

Test(cuda_load, opens, .description = "cuda is cuda:0; auto never takes a device, even where there is one") {
    compile("qerl-cuda.so", FAKE, "");
    struct kern k;
    struct err e = { 0 };
    cr_assert_eq(kern_open(&k, "cuda", NULL, &e), 0, "%s", e.text);
    cr_assert_str_eq(k.name, "cuda:0");
    cr_assert_eq(kern_open(&k, "cuda:1", NULL, &e), 0, "%s", e.text);
    cr_assert_str_eq(k.name, "cuda:1");
    cr_assert_eq(kern_open(&k, "cuda-mma", NULL, &e), 0, "%s", e.text);
    cr_assert_str_eq(k.name, "cuda-mma:0");
    cr_assert_eq(kern_open(&k, "cuda-blas:1", NULL, &e), 0, "%s", e.text);
    cr_assert_str_eq(k.name, "cuda-blas:0");
    cr_assert_eq(kern_open(&k, "auto", NULL, &e), 0, "%s", e.text);
    cr_assert_str_eq(k.bits, "cpu-tiles");
}
