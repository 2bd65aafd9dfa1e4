# shapes.py - the shapes of tools/bench/shapes.c, for the peers.
# SPDX-License-Identifier: Apache-2.0
SHAPES = {
    "135m": dict(arch="llama", layers=30, dim=576, heads=9, kv_heads=3, head_dim=64, ffn=1536, vocab=49152,
                 eps=1e-5, theta=1e5, positions=8192, bias=False),
    "0.5b": dict(arch="qwen2", layers=24, dim=896, heads=14, kv_heads=2, head_dim=64, ffn=4864, vocab=151936,
                 eps=1e-6, theta=1e6, positions=32768, bias=True),
    "1.5b": dict(arch="qwen2", layers=28, dim=1536, heads=12, kv_heads=2, head_dim=128, ffn=8960, vocab=151936,
                 eps=1e-6, theta=1e6, positions=32768, bias=True),
}
