#!/usr/bin/env python3
"""Makes tests/vectors/gguf: what PyPI's gguf package says about random blocks and tiny models.

  blocks.bin          random blocks of every type we read, and the floats gguf.quants gives for them
  llama.gguf, llama/  one random Llama: as llama.cpp's converter stores it (q and k rows interleaved), and as HF stores it
  qwen2.gguf, qwen2/  one random Qwen2 (biases, tied head), F16 and F32 in the GGUF file

Weights are multiples of 1/64 below 2, exact in every format used. Needs: pip install gguf numpy
Run from the repository's root: python3 tests/vectors/make_gguf.py
SPDX-License-Identifier: Apache-2.0
"""
import json
import os
import struct

import numpy as np
from gguf import GGMLQuantizationType as T
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize

OUT = "tests/vectors/gguf"
rng = np.random.default_rng(20240229)

# Where a block's float16 fields stand: they get finite values (subnormals and both zeros included), all else is random bits.
HALVES = {T.Q4_0: [0], T.Q4_1: [0, 2], T.Q5_0: [0], T.Q5_1: [0, 2], T.Q8_0: [0], T.Q4_K: [0, 2], T.Q5_K: [0, 2],
          T.Q6_K: [208], T.F16: [0]}
TYPES = [T.F32, T.F16, T.BF16, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.Q4_K, T.Q5_K, T.Q6_K, T.MXFP4]


def halves(n):
    bits = rng.integers(0, 1 << 16, n, dtype=np.uint16)
    bits[(bits & 0x7C00) == 0x7C00] &= 0xBFFF                  # no infinity, no NaN
    bits[:4] = [0, 0x8000, 1, 0x8001]
    return bits


def blocks(t):
    size, width = GGML_QUANT_SIZES[t]
    n = 1024 // size if size > 1 else 128
    raw = rng.integers(0, 256, (n, width), dtype=np.uint8)
    for at in HALVES.get(t, []):
        raw[:, at:at + 2] = halves(n)[rng.permutation(n)].view(np.uint8).reshape(n, 2)
    if t == T.MXFP4:
        raw[:, 0] = rng.integers(2, 240, n)
    if t in (T.F32, T.BF16):                                     # finite: keep the exponent below its top
        raw[:, -1] &= 0xBF
    return raw


def make_blocks():
    with open(f"{OUT}/blocks.bin", "wb") as f:
        f.write(b"GGBV" + struct.pack("<I", len(TYPES)))
        for t in TYPES:
            raw = blocks(t)
            if t == T.F32:
                want = raw.reshape(-1).view(np.float32)
            elif t == T.F16:
                want = raw.reshape(-1).view(np.float16).astype(np.float32)
            else:
                want = dequantize(raw.reshape(1, -1), t).reshape(-1)
            f.write(struct.pack("<III", int(t), want.size, raw.size))
            f.write(raw.tobytes() + want.astype("<f4").tobytes())


def weight(*shape):
    return (rng.integers(-127, 128, shape) / 64).astype(np.float32)


def bf16(x):
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def safetensors(path, tensors):
    head, at, data = {}, 0, b""
    for name, x in tensors.items():
        raw = bf16(x).tobytes()
        head[name] = {"dtype": "BF16", "shape": list(x.shape), "data_offsets": [at, at + len(raw)]}
        at += len(raw)
        data += raw
    text = json.dumps(head, separators=(",", ":")).encode()
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + data)


def interleave(w, heads):
    """convert_hf_to_gguf.py, LlamaModel.permute"""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def model(arch, layers, kind):
    dim, heads, kv, hd, ffn, vocab = 32, 4, 2, 8, 64, 40
    tied = arch == "qwen2"
    t = {"model.embed_tokens.weight": weight(vocab, dim), "model.norm.weight": weight(dim)}
    if not tied:
        t["lm_head.weight"] = weight(vocab, dim)
    for i in range(layers):
        p = f"model.layers.{i}."
        for name, shape in [("input_layernorm", (dim,)), ("post_attention_layernorm", (dim,)),
                            ("self_attn.q_proj", (heads * hd, dim)), ("self_attn.k_proj", (kv * hd, dim)),
                            ("self_attn.v_proj", (kv * hd, dim)), ("self_attn.o_proj", (dim, heads * hd)),
                            ("mlp.gate_proj", (ffn, dim)), ("mlp.up_proj", (ffn, dim)), ("mlp.down_proj", (dim, ffn))]:
            t[p + name + ".weight"] = weight(*shape)
        if arch == "qwen2":
            for name, n in [("q", heads * hd), ("k", kv * hd), ("v", kv * hd)]:
                t[p + f"self_attn.{name}_proj.bias"] = weight(n)
    os.makedirs(f"{OUT}/{arch}", exist_ok=True)
    safetensors(f"{OUT}/{arch}/model.safetensors", t)
    with open(f"{OUT}/{arch}/config.json", "w") as f:
        json.dump({"model_type": arch, "vocab_size": vocab, "hidden_size": dim, "intermediate_size": ffn,
                   "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv,
                   "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
                   "tie_word_embeddings": tied, "bos_token_id": 1, "eos_token_id": 2}, f, indent=1)
        f.write("\n")

    w = GGUFWriter(f"{OUT}/{arch}.gguf", arch)
    w.add_block_count(layers)
    w.add_context_length(128)
    w.add_embedding_length(dim)
    w.add_feed_forward_length(ffn)
    w.add_head_count(heads)
    w.add_head_count_kv(kv)
    w.add_rope_freq_base(10000.0)
    w.add_rope_dimension_count(hd)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    for name, x in t.items():
        if arch == "llama" and ".q_proj." in name:
            x = interleave(x, heads)
        if arch == "llama" and ".k_proj." in name:
            x = interleave(x, kv)
        short = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
                 "lm_head.weight": "output.weight"}.get(name)
        if not short:
            _, _, layer, rest = name.split(".", 3)
            stem, leaf = rest.rsplit(".", 1)
            short = f"blk.{layer}.{NAMES[stem]}.{leaf}"
        if x.ndim == 1:
            w.add_tensor(short, x.astype(np.float32))
        elif kind == T.BF16:
            w.add_tensor(short, bf16(x).view(np.uint8), raw_dtype=T.BF16)
        else:
            w.add_tensor(short, x.astype(np.float16))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


os.makedirs(OUT, exist_ok=True)
make_blocks()
model("llama", 2, T.BF16)
model("qwen2", 1, T.F16)
