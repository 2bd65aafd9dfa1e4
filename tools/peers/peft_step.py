#!/usr/bin/env python3
# peft_step.py SHAPE THREADS REPEATS - seconds of LoRA steps with PyTorch and PEFT: forward, backward and AdamW over 4
# sequences of 300 tokens, the last 200 of each in the loss. Prints one line of JSON.
# SPDX-License-Identifier: Apache-2.0
import json
import sys
import time

import torch
from peft import get_peft_model

import hf


def main(name, threads, repeats):
    torch.set_num_threads(int(threads))
    m = get_peft_model(hf.model(name), hf.lora())
    m.train()
    opt = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-5)
    ids = torch.randint(0, m.config.vocab_size, (4, 300))
    labels = ids.clone()
    labels[:, :100] = -100
    seconds = []
    for i in range(1 + int(repeats)):
        begun = time.monotonic()
        m(input_ids=ids, labels=labels, use_cache=False).loss.backward()
        opt.step()
        opt.zero_grad()
        if i > 0:
            seconds.append(time.monotonic() - begun)
    print(json.dumps({"seconds": seconds, "torch": torch.__version__}))


main(*sys.argv[1:4])
