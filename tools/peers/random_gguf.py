#!/usr/bin/env python3
# random_gguf.py SHAPE FILE - a GGUF file (f16, tied head, no tokenizer) of a shape, with random weights.
# SPDX-License-Identifier: Apache-2.0
import sys

import gguf
import numpy as np

from shapes import SHAPES


def main(name, path):
    s = SHAPES[name]
    rng = np.random.default_rng(1)
    pool = rng.standard_normal(1 << 22, dtype=np.float32)
    w = gguf.GGUFWriter(path, s["arch"])
    w.add_block_count(s["layers"])
    w.add_context_length(s["positions"])
    w.add_embedding_length(s["dim"])
    w.add_feed_forward_length(s["ffn"])
    w.add_head_count(s["heads"])
    w.add_head_count_kv(s["kv_heads"])
    w.add_key_length(s["head_dim"])
    w.add_value_length(s["head_dim"])
    w.add_rope_dimension_count(s["head_dim"])
    w.add_rope_freq_base(s["theta"])
    w.add_layer_norm_rms_eps(s["eps"])
    w.add_vocab_size(s["vocab"])
    w.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    w.add_tokenizer_model("no_vocab")

    def matrix(key, out, width):
        at = int(rng.integers(1 << 20))
        v = np.resize(np.roll(pool, at), out * width) / np.sqrt(width)
        w.add_tensor(key + ".weight", v.astype(np.float16).reshape(out, width))

    def vector(key, n, value):
        w.add_tensor(key, np.full(n, value, np.float32))

    q, kv = s["heads"] * s["head_dim"], s["kv_heads"] * s["head_dim"]
    matrix("token_embd", s["vocab"], s["dim"])
    vector("output_norm.weight", s["dim"], 1)
    for i in range(s["layers"]):
        b = f"blk.{i}."
        vector(b + "attn_norm.weight", s["dim"], 1)
        vector(b + "ffn_norm.weight", s["dim"], 1)
        for part, out, width in (("attn_q", q, s["dim"]), ("attn_k", kv, s["dim"]), ("attn_v", kv, s["dim"]),
                                 ("attn_output", s["dim"], q), ("ffn_gate", s["ffn"], s["dim"]),
                                 ("ffn_up", s["ffn"], s["dim"]), ("ffn_down", s["dim"], s["ffn"])):
            matrix(b + part, out, width)
        if s["bias"]:
            for part, n in (("attn_q", q), ("attn_k", kv), ("attn_v", kv)):
                vector(b + part + ".bias", n, 0.01)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


main(*sys.argv[1:3])
