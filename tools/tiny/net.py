"""net.py - the tiny Qwen2 network in PyTorch, its prompt, its 4-bit rounding and its scoring.

Knows: the transformer (parameter names are those of the Hugging Face file), MXFP4, greedy and sampled
decoding with a cache, the two GSM8K scoring rules.
Does not know: how it is trained; train.py and rl_check.py do.
"""
import json
import os
import re

import torch
import torch.nn.functional as F
from torch import nn

SYSTEM = "You are a helpful assistant."
ASK = ' Let\'s think step by step and output the final answer after "####".'


def render(question):
    """The prompt as the product renders it: chat template, default system text, generation prompt."""
    return (f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{question}{ASK}<|im_end|>\n"
            "<|im_start|>assistant\n")


def strict(text):
    m = re.findall(r"#### (\-?[0-9\.\,]+)", text)
    return m[-1].replace(",", "").rstrip(".") if m else None


def flexible(text):
    m = [x for x in re.findall(r"(\-?[0-9\.\,]+)", text) if x not in ("", ".", ",")]
    return m[-1].replace(",", "").rstrip(".") if m else None


def mxfp4(w):
    """Rounds w[out, in] to MXFP4: blocks of 32 along in, scale 2^(floor(log2 amax) - 2), E2M1 to nearest
    even, saturating at 6. A block of zeros stays zero."""
    b = w.reshape(-1, 32)
    amax = b.abs().amax(1, keepdim=True)
    scale = torch.ldexp(torch.ones_like(amax), torch.frexp(amax).exponent - 3)
    x = b / scale
    a = x.abs()
    step = torch.where(a < 2, 0.5, torch.where(a < 4, 1.0, 2.0))
    q = (torch.round(a / step) * step).clamp(max=6.0) * torch.sign(x) * scale
    return torch.where(amax > 0, q, torch.zeros_like(q)).reshape(w.shape)


class Linear(nn.Module):
    """quant: the weight is rounded to MXFP4 in the forward pass; gradients pass straight through.
    lora: (A, B, scale) added to it, as the product adds its adapter to the rounded base."""

    def __init__(self, n_in, n_out, bias=False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in) * n_in ** -0.5)
        self.bias = nn.Parameter(torch.zeros(n_out)) if bias else None
        self.quant, self.lora = False, None

    def forward(self, x):
        w = self.weight
        if self.quant:
            w = w + (mxfp4(w) - w).detach()
        if self.lora:
            a, b, s = self.lora
            w = w + s * (b @ a)
        return F.linear(x, w, self.bias)


class Norm(nn.Module):
    def __init__(self, n, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(n)), eps

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.nh, self.nkv = c["num_attention_heads"], c["num_key_value_heads"]
        self.hd = c["hidden_size"] // self.nh
        self.q_proj = Linear(c["hidden_size"], self.nh * self.hd, True)
        self.k_proj = Linear(c["hidden_size"], self.nkv * self.hd, True)
        self.v_proj = Linear(c["hidden_size"], self.nkv * self.hd, True)
        self.o_proj = Linear(self.nh * self.hd, c["hidden_size"])

    def forward(self, x, rope, mask, cache, at):
        n, t, _ = x.shape
        cos, sin = rope

        def turn(y, heads):
            y = y.view(n, t, heads, self.hd).transpose(1, 2)
            h = self.hd // 2
            return y * cos + torch.cat((-y[..., h:], y[..., :h]), -1) * sin

        q, k = turn(self.q_proj(x), self.nh), turn(self.k_proj(x), self.nkv)
        v = self.v_proj(x).view(n, t, self.nkv, self.hd).transpose(1, 2)
        if cache is not None:
            cache[0][:, :, at:at + t], cache[1][:, :, at:at + t] = k, v
            k, v = cache[0][:, :, :at + t], cache[1][:, :, :at + t]
        r = self.nh // self.nkv
        k, v = k.repeat_interleave(r, 1), v.repeat_interleave(r, 1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(y.transpose(1, 2).reshape(n, t, -1))


class Mlp(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c["hidden_size"], c["intermediate_size"])
        self.up_proj = Linear(c["hidden_size"], c["intermediate_size"])
        self.down_proj = Linear(c["intermediate_size"], c["hidden_size"])

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn, self.mlp = Attention(c), Mlp(c)
        self.input_layernorm = Norm(c["hidden_size"], c["rms_norm_eps"])
        self.post_attention_layernorm = Norm(c["hidden_size"], c["rms_norm_eps"])

    def forward(self, x, *a):
        x = x + self.self_attn(self.input_layernorm(x), *a)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        nn.init.normal_(self.embed_tokens.weight, std=0.05)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"]))
        self.norm = Norm(c["hidden_size"], c["rms_norm_eps"])


class Net(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c, self.model = c, Body(c)
        for layer in self.model.layers:                      # a deep residual sum starts quiet
            with torch.no_grad():
                layer.self_attn.o_proj.weight.mul_(0.3)
                layer.mlp.down_proj.weight.mul_(0.3)

    def linears(self):
        return [(n, m) for n, m in self.named_modules() if isinstance(m, Linear)]

    def quantise(self, on):
        for _, m in self.linears():
            m.quant = on

    def hidden(self, ids, pos, mask, cache=None, at=0):
        """ids, pos [n, t]; mask bool [n, 1, t, keys], true where a query may look."""
        hd = self.c["hidden_size"] // self.c["num_attention_heads"]
        freq = self.c["rope_theta"] ** (-torch.arange(0, hd, 2).float() / hd)
        ang = (pos[..., None].float() * freq).repeat(1, 1, 2)[:, None]
        rope, x = (ang.cos(), ang.sin()), self.model.embed_tokens(ids)
        for i, layer in enumerate(self.model.layers):
            x = layer(x, rope, mask, cache[i] if cache else None, at)
        return self.model.norm(x)

    def logits(self, h):
        return h @ self.model.embed_tokens.weight.T


def load(folder):
    from safetensors.torch import load_file
    from tokenizers import Tokenizer
    c = json.load(open(os.path.join(folder, "config.json")))
    net = Net(c)
    state = load_file(os.path.join(folder, "model.safetensors"))
    net.load_state_dict({k: v.float() for k, v in state.items()})
    return net, Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))


@torch.no_grad()
def generate(net, prompts, eos, limit=80, temperature=0.0, rng=None):
    """One answer (list of ids, eos included if reached) per prompt (list of ids), left-padded, cached."""
    n, width = len(prompts), max(map(len, prompts))
    c = net.c
    shape = (n, c["num_key_value_heads"], width + limit, c["hidden_size"] // c["num_attention_heads"])
    cache = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(c["num_hidden_layers"])]
    ids = torch.zeros(n, width, dtype=torch.long)
    pad = torch.tensor([width - len(p) for p in prompts])
    for i, p in enumerate(prompts):
        ids[i, width - len(p):] = torch.tensor(p)
    keys = torch.arange(width + limit)
    pos = (keys[:width][None] - pad[:, None]).clamp(min=0)
    seen = keys[None] >= pad[:, None]
    tri = torch.tril(torch.ones(width, width, dtype=torch.bool))
    mask = (tri[None] & seen[:, None, :width]) | torch.eye(width, dtype=torch.bool)[None]
    h = net.hidden(ids, pos, mask[:, None], cache, 0)[:, -1]
    out, live = [[] for _ in range(n)], torch.ones(n, dtype=torch.bool)
    for t in range(limit):
        z = net.logits(h)
        if temperature == 0:
            nxt = z.argmax(-1)
        else:
            nxt = torch.multinomial(torch.softmax(z / temperature, -1), 1, generator=rng)[:, 0]
        for i in torch.nonzero(live)[:, 0].tolist():
            out[i].append(int(nxt[i]))
        live &= nxt != eos
        if not live.any() or t == limit - 1:
            return out
        at = width + t
        h = net.hidden(nxt[:, None], (at - pad)[:, None], seen[:, None, None, :at + 1], cache, at)[:, -1]
    return out


def evaluate(net, tok, rows, temperature=0.0, seed=0):
    """(strict, flexible, mean tokens, share that works step by step, all in per cent but the tokens)"""
    eos = tok.token_to_id("<|im_end|>")
    prompts = [tok.encode(render(r["question"])).ids for r in rows]
    rng = torch.Generator().manual_seed(seed)
    good = [0, 0]
    tokens = worked = 0
    for i in range(0, len(rows), 128):
        for r, ids in zip(rows[i:i + 128], generate(net, prompts[i:i + 128], eos, 80, temperature, rng)):
            text, want = tok.decode(ids), strict(r["answer"])
            good[0] += strict(text) == want
            good[1] += flexible(text) == want
            tokens += len(ids)
            worked += text.startswith("First")
    n = len(rows)
    return [round(100 * good[0] / n, 1), round(100 * good[1] / n, 1), round(tokens / n, 1),
            round(100 * worked / n, 1)]
