# common.sh - what the loop tests share: a scratch folder, a short run of the real stages on the embedded model.
# SPDX-License-Identifier: Apache-2.0
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
bin=${BIN:-$root/bin}
box=$(mktemp -d /tmp/qerl-loop-XXXXXX)
trap 'pkill -9 -P $$ 2>/dev/null || true; rm -rf "$box"' EXIT
cd "$root"

fail() { echo "FAILED: $*" >&2; exit 1; }

# A pipeline of $2 steps named $1; further arguments are lines of it.
write_pipe() {
    name=$1; steps=$2; shift 2
    {
        echo "pipe 1"
        echo "base $root/pipelines/quickstart.pipe"
        echo "[run]"; echo "name = $name"; echo "steps = $steps"; echo "score_every = 3"; echo "runs_dir = $box/runs"
        echo "[noise.aqn]"; echo "stages = $steps"
        echo "[sample]"; echo "n = 4"; echo "new_max = 40"
        echo "[learner]" | sed 's/.*/[stage learner]/'; echo "exec = $bin/qerl-learner"; echo "batch = 4"; echo "save_every = 2"
        echo "[stage rollout]"; echo "exec = $bin/qerl-rollout"; echo "rows = 16"; echo "resend_seconds = 0.5"
        echo "[stage reward]"; echo "exec = $bin/qerl-reward"
        echo "[stage eval]"; echo "exec = $bin/qerl-eval"; echo "questions = 32"
        for line; do echo "$line"; done
    } > "$box/$name.pipe"
}

# sha256 of the last adapter of a run.
last_adapter() { find "$1/adapters" -maxdepth 1 -name 'v*' | sort | tail -1 | xargs -I{} sha256sum {}/adapter_model.safetensors | cut -d' ' -f1; }
