#!/usr/bin/env python3
"""Makes tests/vectors/net_qwen2 and net_llama: small random models, their logits and LoRA gradients by PyTorch.

Each folder: config.json, model.safetensors (values exact in bf16), adapter/ as peft saves it, want.safetensors:
  ids.S           token ids of sequence S (int32); prompt lengths in `prompts`
  base.S, lora.S  logits [tokens, vocab], fp32, without and with the adapter
  weights.S       dL/dlp of each response token; L = sum of weight * log-prob at temperature 1
  lp.S            log-prob of each response token with the adapter
  grad.NAME       dL/d(tensor) for each adapter tensor, by autograd
Run: python3 tests/vectors/make_net.py   (torch, transformers, peft, safetensors)
"""
import copy
import json
import pathlib
import shutil

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

HERE = pathlib.Path(__file__).parent
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LENGTHS, PROMPTS = [37, 12, 50], [10, 1, 33]


def qwen2():
    c = Qwen2Config(hidden_size=48, num_attention_heads=6, num_key_value_heads=2, intermediate_size=80, vocab_size=131,
                    num_hidden_layers=3, max_position_embeddings=256, tie_word_embeddings=True, rms_norm_eps=1e-6,
                    rope_theta=1000000.0, bos_token_id=1, eos_token_id=2)
    return Qwen2ForCausalLM(c), TARGETS


def llama():
    c = LlamaConfig(hidden_size=40, num_attention_heads=4, num_key_value_heads=1, head_dim=10, intermediate_size=72,
                    vocab_size=97, num_hidden_layers=2, max_position_embeddings=256, tie_word_embeddings=False,
                    rms_norm_eps=1e-5, rope_theta=10.0, bos_token_id=1, eos_token_id=[2, 3],
                    rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                  "original_max_position_embeddings": 32, "rope_theta": 10.0})
    return LlamaForCausalLM(c), ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def randomise(model, gen):
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.copy_(1 + 0.2 * torch.randn(p.shape, generator=gen))
            elif name.endswith("bias"):
                p.copy_(0.3 * torch.randn(p.shape, generator=gen))
            else:
                p.copy_(0.25 * torch.randn(p.shape, generator=gen))
            p.copy_(p.to(torch.bfloat16).float())


def make(name, build, seed):
    out = HERE / f"net_{name}"
    shutil.rmtree(out, ignore_errors=True)
    gen = torch.Generator().manual_seed(seed)
    model, targets = build()
    model = model.float().eval()
    randomise(model, gen)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out)      # a copy: .to() would round the rope table too
    want = {"prompts": torch.tensor(PROMPTS, dtype=torch.int32)}
    ids = [torch.randint(0, model.config.vocab_size, (n,), generator=gen) for n in LENGTHS]
    with torch.no_grad():
        for s, x in enumerate(ids):
            want[f"ids.{s}"] = x.to(torch.int32)
            want[f"base.{s}"] = model(x[None]).logits[0].contiguous()
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for n, p in peft.named_parameters():
            if "lora_" in n:
                p.copy_(0.15 * torch.randn(p.shape, generator=gen))
    peft.eval()
    loss = 0
    for s, x in enumerate(ids):
        logits = peft(x[None]).logits[0]
        lp = torch.log_softmax(logits.float(), -1)[:-1].gather(1, x[1:, None])[PROMPTS[s] - 1:, 0]
        w = 0.2 * torch.randn(lp.shape, generator=gen)
        loss = loss + (w * lp).sum()
        want[f"lora.{s}"], want[f"lp.{s}"], want[f"weights.{s}"] = logits.detach().contiguous(), lp.detach(), w
    loss.backward()
    for n, p in peft.named_parameters():
        if "lora_" in n:
            want["grad." + n.replace(".default", "")] = p.grad.contiguous()
    save_file(want, out / "want.safetensors")
    peft.save_pretrained(out / "adapter")
    (out / "adapter" / "README.md").unlink(missing_ok=True)
    config = out / "adapter" / "adapter_config.json"
    j = json.loads(config.read_text())
    j["target_modules"] = sorted(j["target_modules"])                 # a set in peft: its order varies
    config.write_text(json.dumps(j, indent=2, sort_keys=True) + "\n")
    print(name, sum(f.stat().st_size for f in out.rglob("*") if f.is_file()), "bytes")


make("qwen2", qwen2, 1)
make("llama", llama, 2)
