#!/usr/bin/env python3
"""By hand: does peft load an adapter that qerl saved, and do both programs give the same log-probabilities?

    python3 tests/vectors/check_peft.py MODEL ADAPTER [--qerl bin/qerl-model] [--lengths 5,33,100]

MODEL is an HF folder, ADAPTER a folder as in runs/NAME/adapters/vNNNN. Random token ids are scored in fp32 by
`qerl-model logprobs` and by transformers + peft; prints the largest difference with and without the adapter, and exits
with 1 when one is above 1e-3 or when the adapter changes nothing in only one of the two.
"""
import argparse
import json
import shlex
import subprocess
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def ours(qerl, model, adapter, seqs):
    cmd = shlex.split(qerl) + ["logprobs", model, "--quant", "f32"] + (["--adapter", adapter] if adapter else [])
    lines = "\n".join(json.dumps(s) for s in seqs)
    out = subprocess.run(cmd, input=lines, capture_output=True, text=True)
    if out.returncode:
        sys.exit(out.stderr)
    return [torch.tensor(json.loads(line)["logprobs"][1:], dtype=torch.float64) for line in out.stdout.splitlines()]


def theirs(model, seqs):
    result = []
    with torch.no_grad():
        for s in seqs:
            x = torch.tensor(s)
            z = torch.log_softmax(model(x[None]).logits[0, :-1].double(), -1)
            result.append(z.gather(1, x[1:, None])[:, 0])
    return result


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model")
    p.add_argument("adapter")
    p.add_argument("--qerl", default="bin/qerl-model")
    p.add_argument("--lengths", default="5,33,100")
    a = p.parse_args()
    base = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32).eval()
    gen = torch.Generator().manual_seed(0)
    seqs = [torch.randint(0, base.config.vocab_size, (int(n),), generator=gen).tolist() for n in a.lengths.split(",")]
    plain = theirs(base, seqs)
    tuned = theirs(PeftModel.from_pretrained(base, a.adapter).eval(), seqs)
    failed = False
    for name, adapter, want in (("base", None, plain), ("adapter", a.adapter, tuned)):
        got = ours(a.qerl, a.model, adapter, seqs)
        worst = max((g - w).abs().max().item() for g, w in zip(got, want))
        effect = max((p - w).abs().max().item() for p, w in zip(plain, want))
        failed |= worst > 1e-3
        print(f"{name:8} tokens {sum(len(w) for w in want)}  largest difference {worst:.3g}  effect of the adapter {effect:.3g}")
    sys.exit(failed)


main()
