# Makefile - the front door: make help.
#
# One archive obj/libqerl.a holds lib/ and kernels/; each program is its own folder's files linked with it.
# SIMD files get their instruction set by folder and file name only; nothing is built with -march=native.
# SPDX-License-Identifier: Apache-2.0

CC      ?= gcc
comma   := ,
Q       := $(if $(V),,@)
O       := obj$(if $(SAN),-san)
PKG     := libzmq $(shell pkg-config --exists msgpack-c 2>/dev/null && echo msgpack-c || echo msgpack) jansson libutf8proc libprotobuf-c
WARN    := -Wall -Wextra -Wshadow -Wconversion -Wno-sign-conversion -Werror=implicit-function-declaration $(if $(CI),-Werror)
SANF    := $(if $(SAN),-fsanitize=address$(comma)undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer)
# -ffp-contract=off: a fused multiply-add happens where the code says fma and nowhere else, or bits would
# depend on the compiler's mood.
CFLAGS  ?= -O2 -g
PKG_CFLAGS := $(shell pkg-config --cflags $(PKG) 2>/dev/null)
PKG_LIBS   := $(shell pkg-config --libs $(PKG) 2>/dev/null)
ALL_CFLAGS = -std=c11 $(CFLAGS) -ffp-contract=off $(WARN) $(SANF) -I. -I$(O) $(PKG_CFLAGS)
LIBS    = $(PKG_LIBS) -lpthread -lm -ldl
COMMIT  := $(shell git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)
PREFIX  ?= /usr/local
BIN     := bin$(if $(SAN),-san)

LIB_SRC := $(wildcard lib/*/*.c kernels/*.c kernels/*/*.c)
LIB_OBJ := $(LIB_SRC:%.c=$(O)/%.o)
PROGRAMS := qerl-rollout qerl-reward qerl-learner qerl-eval qerl-model qerl-bench qerl-pipe
folder   = $(if $(filter qerl-pipe,$1),pipe,$(if $(filter qerl-model qerl-bench,$1),tools,stages)/$(1:qerl-%=%))

.PHONY: all
all: $(if $(PKG_LIBS),$(PROGRAMS:%=$(BIN)/%),without-libraries) $(if $(CUDA),$(BIN)/qerl-cuda.so)

.PHONY: without-libraries
without-libraries:
	@echo "some libraries are missing: tools/setup says which and installs them (make demo and make check call it)" >&2; exit 4

.PHONY: help
help:
	@echo "make            build the programs into bin/"
	@echo "make CUDA=1     also the plugin for NVIDIA GPUs, bin/qerl-cuda.so; NVCC= or CUDA_HOME= say where CUDA is"
	@echo "make demo       install what is missing, build, run the quickstart on the embedded model (minutes)"
	@echo "make check      the same set-up, then lint and every test; SAN=1 with ASan and UBSan"
	@echo "make check-gpu  what only a real GPU can show, in one run; JSON=FILE keeps the report"
	@echo "make bench-gpu  what a real GPU reaches of its limits, targets beside, in five minutes; JSON=FILE keeps the report"
	@echo "make tests      build the tests only; then obj/tests/unit/run --list, --filter, ..."
	@echo "make bench      the machine's limits and what the product reaches of them (minutes); JSON=FILE keeps the report"
	@echo "make lint       include arrows, banned functions, lengths"
	@echo "make install    programs, pipelines and the embedded model under PREFIX (default /usr/local)"
	@echo "make clean      remove what was built"
	@echo "V=1 shows the commands; CI=1 makes warnings errors"

.PHONY: demo
demo:
	$(Q)tools/setup
	$(Q)$(MAKE) --no-print-directory all
	$(Q)bin/qerl-pipe pipelines/quickstart.pipe

.PHONY: check
check:
	$(Q)tools/setup
	$(Q)$(MAKE) --no-print-directory all tests SAN=$(SAN)
	$(Q)$(MAKE) --no-print-directory lint
	$(Q)SAN=$(SAN) tests/run

.PHONY: check-gpu
check-gpu:
	$(Q)$(MAKE) --no-print-directory CUDA=1 all tests
	$(Q)tools/check-gpu $(JSON)

.PHONY: bench-gpu
bench-gpu:
	$(Q)$(MAKE) --no-print-directory CUDA=1 all
	$(Q)tools/bench-gpu $(JSON)

.PHONY: lint
lint:
	$(Q)tools/lint

.PHONY: bench
bench: all
	$(Q)bin/qerl-bench $(if $(JSON),--json $(JSON)) $(BENCH)

.PHONY: install
install: all
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/share/qerl-pipe
	install -m 755 $(PROGRAMS:%=bin/%) $(if $(CUDA),bin/qerl-cuda.so) $(DESTDIR)$(PREFIX)/bin
	cp -r pipelines $(DESTDIR)$(PREFIX)/share/qerl-pipe/
	install -d $(DESTDIR)$(PREFIX)/share/qerl-pipe/models
	cp -r models/tiny $(DESTDIR)$(PREFIX)/share/qerl-pipe/models/

.PHONY: clean
clean:
	rm -rf obj obj-san bin-san $(PROGRAMS:%=bin/%) bin/qerl-cuda.so

# Elsewhere these files are empty.
ifneq ($(findstring x86_64,$(shell $(CC) -dumpmachine)),)
AVX512 := -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mprefer-vector-width=512
$(O)/kernels/simd/avx2.o:   ISA := -mavx2 -mfma
$(O)/kernels/simd/avx512.o: ISA := $(AVX512)
$(O)/kernels/simd/avx512bf16.o: ISA := $(AVX512) -mavx512vbmi -mavx512bf16
# Tile instructions are inline assembly: the compiler itself must not know of them.
$(O)/kernels/amx/amx.o $(O)/kernels/amx/emulated.o $(O)/tests/kernels/amx.o: ISA := $(AVX512) -mavx512vbmi
$(O)/tools/bench/probe_avx2.o:   ISA := -mavx2 -mfma
$(O)/tools/bench/probe_avx512.o: ISA := -mavx512f
$(O)/tools/bench/probe_bf16.o:   ISA := -mavx512f -mavx512bf16
endif

$(O)/%.o: %.c
	$(if $(V),,@echo "  CC    $<")
	$(Q)mkdir -p $(@D)
	$(Q)$(CC) $(ALL_CFLAGS) $(ISA) -MMD -MP -c $< -o $@

# lib/base/tb.proto -> $(O)/lib/base/tb.pb-c.{c,h}; generated code is not held to our warnings.
LIB_OBJ += $(O)/lib/base/tb.pb-c.o
$(O)/%.pb-c.c $(O)/%.pb-c.h &: %.proto
	$(if $(V),,@echo "  PROTO $<")
	$(Q)mkdir -p $(@D)
	$(Q)protoc-c --c_out=$(O) $<
$(O)/lib/base/tb.pb-c.o: $(O)/lib/base/tb.pb-c.c
	$(Q)$(CC) $(ALL_CFLAGS) -w -c $< -o $@
$(O)/lib/base/tb.o $(O)/tests/unit/tb_file.o: $(O)/lib/base/tb.pb-c.h

# The commit goes into three files; the stamp changes only when the commit does.
$(O)/commit: FORCE
	$(Q)mkdir -p $(@D); echo '$(COMMIT)' | cmp -s - $@ || echo '$(COMMIT)' > $@
.PHONY: FORCE
$(O)/lib/stage/stage.o $(O)/pipe/main.o $(O)/pipe/manifest.o: ALL_CFLAGS += -DQERL_COMMIT='"$(COMMIT)"'
$(O)/lib/stage/stage.o $(O)/pipe/main.o $(O)/pipe/manifest.o: $(O)/commit

$(O)/libqerl.a: $(LIB_OBJ)
	$(if $(V),,@echo "  AR    $@")
	$(Q)rm -f $@ && ar qcs $@ $^

define program
$(BIN)/$1: $(patsubst %.c,$(O)/%.o,$(wildcard $(call folder,$1)/*.c)) $(O)/libqerl.a
	$$(if $$(V),,@echo "  LINK  $$@")
	$$(Q)mkdir -p $$(@D)
	$$(Q)$$(CC) $$(ALL_CFLAGS) $$^ $$(LIBS) -o $$@
endef
$(foreach p,$(PROGRAMS),$(if $(wildcard $(call folder,$p)/*.c),$(eval $(call program,$p))))

# The plugin for NVIDIA GPUs is asked for (CUDA=1), never probed. -fmad=false: as -ffp-contract=off above.
CUDA_HOME ?= /usr/local/cuda
NVCC      ?= $(firstword $(wildcard $(CUDA_HOME)/bin/nvcc) $(shell command -v nvcc))
CUDA_ARCH ?= 80 90 100 120
# Machine code for these, and PTX of the oldest, which a driver compiles for any other.
NVCCFLAGS = -std=c++17 -O3 -fmad=false -prec-div=true -prec-sqrt=true -ftz=false -I. -Werror all-warnings -Xptxas -v \
    -Xcompiler -fPIC,-fvisibility=hidden,-ffp-contract=off,-Wall,-Wextra -cudart static \
    $(foreach a,$(CUDA_ARCH),-gencode arch=compute_$a$(comma)code=sm_$a) \
    -gencode arch=compute_$(firstword $(CUDA_ARCH))$(comma)code=compute_$(firstword $(CUDA_ARCH))
CUDA_OBJ := $(patsubst kernels/cuda/%.cu,$(O)/cuda/%.o,$(wildcard kernels/cuda/*.cu))

.PHONY: nvcc
nvcc:
	@test -n "$(NVCC)" || { echo "make CUDA=1 needs nvcc, which is neither in $(CUDA_HOME)/bin nor in PATH: name it with" \
	    "NVCC=FILE or CUDA_HOME=FOLDER; docs/gpu.md says how to get it" >&2; exit 4; }

# Other architectures, another nvcc: every object anew. The stamp changes only when they do.
$(O)/cuda/flags: FORCE
	$(Q)mkdir -p $(@D); echo '$(NVCC) $(NVCCFLAGS)' | cmp -s - $@ || echo '$(NVCC) $(NVCCFLAGS)' > $@

# What ptxas says (registers, spills) is kept beside the object: tests/pipes/cuda_build.test prints it as a table.
$(O)/cuda/%.o: kernels/cuda/%.cu Makefile $(O)/cuda/flags | nvcc
	$(if $(V),,@echo "  NVCC  $<")
	$(Q)mkdir -p $(@D)
	$(Q)$(NVCC) $(NVCCFLAGS) -MMD -MP -MF $(@:.o=.d) -c $< -o $@ > $(@:.o=.ptxas) 2>&1 || { cat $(@:.o=.ptxas) >&2; exit 1; }

$(BIN)/qerl-cuda.so: $(CUDA_OBJ) | nvcc
	$(if $(V),,@echo "  LINK  $@")
	$(Q)mkdir -p $(@D)
	$(Q)$(NVCC) -shared -cudart static -Xlinker -rpath,'$$ORIGIN' -Xlinker -z,defs $(CUDA_OBJ) -o $@

# Tests: every folder tests/NAME is one Criterion program; tests/stages also links the stages' files but their main.c.
TEST_DIRS := unit kernels stages pipes cuda
TEST_PROGRAMS := $(foreach d,$(TEST_DIRS),$(if $(wildcard tests/$d/*.c),$(O)/tests/$d/run))
STAGE_PARTS := $(patsubst %.c,$(O)/%.o,$(filter-out %/main.c,$(wildcard stages/*/*.c)))
define test_program
$(O)/tests/$1/run: $(patsubst %.c,$(O)/%.o,$(wildcard tests/$1/*.c)) $(if $(filter stages,$1),$(STAGE_PARTS)) $(O)/libqerl.a
	$$(if $$(V),,@echo "  LINK  $$@")
	$$(Q)$$(CC) $$(ALL_CFLAGS) $$^ $$(LIBS) -lcriterion -o $$@
endef
$(foreach d,$(TEST_DIRS),$(eval $(call test_program,$d)))

# Each tests/fuzz/fuzz_NAME.c is a program that replays files and bent copies of them (tests/fuzz/replay.h).
FUZZ_PROGRAMS := $(patsubst %.c,$(O)/%,$(wildcard tests/fuzz/fuzz_*.c))
$(FUZZ_PROGRAMS): $(O)/tests/fuzz/%: $(O)/tests/fuzz/%.o $(O)/libqerl.a
	$(if $(V),,@echo "  LINK  $@")
	$(Q)$(CC) $(ALL_CFLAGS) $^ $(LIBS) -o $@

# The CUDA plugin on a CPU (docs/cuda-emulation.md): kernels/cuda/*.cu by g++ with NVIDIA's headers and no GPU, into
# cuda-emu; into cuda-race with a call before every access, which tests/cuda/emu/race.cc answers.
CXX       ?= g++
EMU_HERE  := $(and $(wildcard $(CUDA_HOME)/include/cuda_runtime.h),$(findstring x86_64,$(shell $(CC) -dumpmachine)))
CXX_WARN  := -Wall -Wextra -Wno-unknown-pragmas $(if $(CI),-Werror)
EMU_CXX    = -std=c++17 $(CFLAGS) -fPIC -ffp-contract=off $(CXX_WARN) -DQERL_CUDA_EMU -I. -isystem $(CUDA_HOME)/include
EMU_CU    := $(patsubst %.cu,%.o,$(wildcard kernels/cuda/*.cu))
EMU_RUN   := $(patsubst %.cc,%.o,$(wildcard tests/cuda/emu/*.cc))
EMU_C     := lib/base/err.o
# $1: cuda-emu or cuda-race; $2: how kernels are compiled; $3: how the emulator is. It is never sanitised: it switches
# stacks and fills what sanitizers guard, and gcc must not turn its loops into memset.
define emulated
$(O)/$1/%.o: %.cu tests/cuda/emu/shared
	$$(if $$(V),,@echo "  EMU   $$< ($1)")
	$$(Q)mkdir -p $$(@D)
	$$(Q)$$(CXX) $$(EMU_CXX) $2 -DEMU_FILE=$$(basename $$(<F)) -fno-gnu-unique -fdata-sections -include tests/cuda/emu/cudacpu.h \
	    -MMD -MP -x c++ -c $$< -o $$@
	$$(Q)tests/cuda/emu/shared $$@ emu_shared_$$(basename $$(<F))
$(O)/$1/%.o: %.cc
	$$(if $$(V),,@echo "  EMU   $$< ($1)")
	$$(Q)mkdir -p $$(@D)
	$$(Q)$$(CXX) $$(EMU_CXX) $3 -fno-builtin -fno-tree-loop-distribute-patterns -MMD -MP -c $$< -o $$@
$(O)/$1/%.o: %.c
	$$(Q)mkdir -p $$(@D)
	$$(Q)$$(CC) $$(ALL_CFLAGS) -fPIC -MMD -MP -c $$< -o $$@
$(O)/$1/qerl-cuda.so: $(addprefix $(O)/$1/,$(EMU_CU) $(EMU_RUN) $(EMU_C))
	$$(if $$(V),,@echo "  LINK  $$@")
	$$(Q)$$(CXX) -shared $$(SANF) $$(if $$(SAN),,-Wl$$(comma)-z$$(comma)defs) $$^ -lpthread -ldl -o $$@
$(O)/$1/tests/cuda/%: $(O)/$1/tests/cuda/%.o $(addprefix $(O)/$1/,$(EMU_RUN))
	$$(if $$(V),,@echo "  LINK  $$@")
	$$(Q)$$(CXX) $$(SANF) $$^ -lpthread -ldl -o $$@
endef
EMU_SAN = $(SANF) $(if $(SAN),-fsanitize-sections=emu_shared_*)
$(eval $(call emulated,cuda-emu,$$(EMU_SAN),$(if $(SAN),-DEMU_ASAN)))
EMU_WATCH := -fsanitize=thread --param tsan-instrument-func-entry-exit=0 -DEMU_RACE
$(if $(SAN),,$(eval $(call emulated,cuda-race,$(EMU_WATCH),-DEMU_RACE)))
EMU_BUILDS := cuda-emu $(if $(SAN),,cuda-race)
EMU_LIBS := $(and $(wildcard $(CUDA_HOME)/include/cublas_v2.h),$(wildcard $(CUDA_HOME)/include/nccl.h))
EMU_TESTS := $(filter-out $(if $(EMU_LIBS),,libraries),$(patsubst tests/cuda/%.cu,%,$(wildcard tests/cuda/*.cu)))
EMU_ALL := $(if $(EMU_HERE),$(foreach b,$(EMU_BUILDS),$(O)/$b/qerl-cuda.so $(EMU_TESTS:%=$(O)/$b/tests/cuda/%)))
.SECONDARY: $(foreach b,$(EMU_BUILDS),$(EMU_TESTS:%=$(O)/$b/tests/cuda/%.o))

.PHONY: tests
tests: $(TEST_PROGRAMS) $(FUZZ_PROGRAMS) $(EMU_ALL)

-include $(shell find $(O) -name '*.d' 2>/dev/null)
