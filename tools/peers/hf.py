# hf.py - a transformers model of a shape with random weights, and its LoRA r 32 on all seven projections.
# SPDX-License-Identifier: Apache-2.0
import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from shapes import SHAPES


def model(name):
    s = SHAPES[name]
    config, kind = (Qwen2Config, Qwen2ForCausalLM) if s["arch"] == "qwen2" else (LlamaConfig, LlamaForCausalLM)
    torch.manual_seed(1)
    torch.set_default_dtype(torch.bfloat16)
    m = kind(config(vocab_size=s["vocab"], hidden_size=s["dim"], intermediate_size=s["ffn"], num_hidden_layers=s["layers"],
                    num_attention_heads=s["heads"], num_key_value_heads=s["kv_heads"], head_dim=s["head_dim"],
                    max_position_embeddings=s["positions"], rms_norm_eps=s["eps"], tie_word_embeddings=True,
                    bos_token_id=None, eos_token_id=None, pad_token_id=None))
    torch.set_default_dtype(torch.float32)
    return m


def lora():
    return LoraConfig(r=32, lora_alpha=32, lora_dropout=0, task_type="CAUSAL_LM",
                      target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
