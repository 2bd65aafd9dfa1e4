#!/usr/bin/env python3
# trl_step.py SHAPE THREADS REPEATS TOKENIZER - seconds of GRPO steps of TRL (loss_type dapo): 2 prompts of about 100
# tokens, 8 answers of 200 tokens each, LoRA r 32, bf16. Prints one line of JSON last.
# SPDX-License-Identifier: Apache-2.0
import json
import sys
import tempfile
import time

import torch
import trl
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, TrainerCallback

import hf


class Clock(TrainerCallback):
    def __init__(self):
        self.seconds, self.begun = [], 0

    def on_step_begin(self, args, state, control, **kw):
        self.begun = time.monotonic()

    def on_step_end(self, args, state, control, **kw):
        self.seconds.append(time.monotonic() - self.begun)


def reward(completions, **kw):                       # answers alternate, so that every group teaches
    return [float(i % 2) for i in range(len(completions))]


def main(name, threads, repeats, tokenizer):
    torch.set_num_threads(int(threads))
    tok = PreTrainedTokenizerFast(tokenizer_file=tokenizer, padding_side="left")
    tok.pad_token = tok.eos_token = tok.convert_ids_to_tokens(0)
    prompt = "Tom has 3 pens"
    while len(tok(prompt)["input_ids"]) < 100:
        prompt += " and 4 more"
    with tempfile.TemporaryDirectory() as folder:
        args = trl.GRPOConfig(
            output_dir=folder, loss_type="dapo", num_generations=8, per_device_train_batch_size=4,
            gradient_accumulation_steps=4, max_completion_length=200, max_steps=1 + int(repeats), beta=0.0,
            temperature=1.0, learning_rate=1e-5, use_cpu=True, bf16=False, report_to=[], save_strategy="no",
            logging_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
            generation_kwargs={"min_new_tokens": 200})
        clock = Clock()
        trainer = trl.GRPOTrainer(model=hf.model(name), reward_funcs=reward, args=args, processing_class=tok,
                                  train_dataset=Dataset.from_list([{"prompt": prompt}] * 64), peft_config=hf.lora(),
                                  callbacks=[clock])
        trainer.train()
    print(json.dumps({"seconds": clock.seconds[1:], "trl": trl.__version__, "torch": torch.__version__}))


main(*sys.argv[1:5])
