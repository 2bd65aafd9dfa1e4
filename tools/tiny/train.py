"""train.py - makes models/tiny: tokenizer, pretraining on two styles of answer, bf16 export.

    python tools/tiny/train.py OUT [--settle FOLDER --habit STORY,...] [--steps N] [--lr X] [--threads N]

Knows: the recipe, every number of it below. Does not know: reinforcement learning (rl_check.py).
Order: tokenizer, batches, optimiser, loop, export.

Each question is shown with both answers at once, the worked one and the shortcut, behind one shared
prompt; neither sees the other. Only the first token of an answer chooses the style, so the mixture is
a weight on that one token and both styles are learnt at full speed. Shorter runs then settle the
habits: the stories named by --habit are mostly worked, all others mostly not. Greedy decoding takes
the likelier style, and a shortcut by this network is wrong more often than not; sampling finds the
other style. That is the room that reinforcement learning is given: arithmetic, never format.
"""
import argparse
import json
import os
import random
import time

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers import processors, trainers

import data
import net as N

SEED = 7
VOCAB = 624
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "torch_dtype": "bfloat16",
    "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": True, "hidden_act": "silu",
    "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True, "use_sliding_window": False,
    "sliding_window": None, "max_window_layers": 6,
}
WORKED = 0.30                            # chance of the worked style while learning
HABIT = 0.75                             # ... and, when settling, in the stories named by --habit
SHORTCUT_WEIGHT = 0.3                    # of the shortcut's tokens when settling: its sums stay guesses
ROWS = 32                                # questions a batch
DRILL_ROWS = 32                          # rows of DRILL_LEN tokens of bare steps, where a batch is a drill
DRILL_LEN = 128
QUANT_FROM = 0.3                         # from this share of the run every other batch is in MXFP4
QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
              r"|\s*[\r\n]+|\s+(?!\S)|\s+")
TEMPLATE = (
    "{%- if messages[0]['role'] == 'system' %}\n"
    "    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n"
    "{%- else %}\n"
    "    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}\n"
    "{%- endif %}\n"
    "{%- for message in messages %}\n"
    "    {%- if (message.role == \"user\") or (message.role == \"system\" and not loop.first) or "
    "(message.role == \"assistant\") %}\n"
    "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n"
    "    {%- endif %}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n' }}\n"
    "{%- endif %}\n")


def make_tokenizer():
    """Byte-level BPE in the exact shape of Qwen2's; special tokens stand after the merges as there."""
    tok = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix=""))
    tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated", invert=False),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)])
    tok.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tok.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    texts = []
    for p in data.test_and_train()[1]:
        plain = N.render(p.question) + p.worked() + "\n" + p.shortcut()
        for s in SPECIALS:
            plain = plain.replace(s, "\0")
        texts += plain.split("\0")
    trainer = trainers.BpeTrainer(vocab_size=VOCAB - len(SPECIALS), show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tok.train_from_iterator([t for t in texts if t], trainer)
    assert tok.get_vocab_size() == VOCAB - len(SPECIALS), tok.get_vocab_size()
    tok.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    return tok


class Batches:
    """Endless batches of questions with both answers, of similar length, and of drills."""

    def __init__(self, tok, taken, settle, habit):
        self.tok, self.taken, self.settle, self.habit = tok, taken, settle, habit
        self.r = random.Random(SEED + settle)
        self.end = tok.token_to_id("<|im_end|>")
        self.queue = []

    def refill(self):
        rows = []
        while len(rows) < ROWS * 24:
            p = data.problem(self.r)
            if p.question not in self.taken:
                enc = lambda s: self.tok.encode(s).ids
                w = HABIT if p.story in self.habit else WORKED
                rows.append((enc(N.render(p.question)), enc(p.worked()) + [self.end],
                             enc(p.shortcut()) + [self.end], w))
        rows.sort(key=lambda x: len(x[0]) + len(x[1]))
        self.queue = [rows[i:i + ROWS] for i in range(0, len(rows), ROWS)]
        self.r.shuffle(self.queue)

    def questions(self):
        """ids, pos, mask, then flat (row, column, target, weight) of every predicted token."""
        if not self.queue:
            self.refill()
        rows = self.queue.pop()
        width = max(len(p) + len(a) + len(b) for p, a, b, _ in rows)
        ids, pos = torch.zeros(ROWS, width, dtype=torch.long), torch.zeros(ROWS, width, dtype=torch.long)
        seg = torch.full((ROWS, width), 3)                     # 0 prompt, 1 worked, 2 shortcut, 3 padding
        at, less = [], SHORTCUT_WEIGHT if self.settle else 1.0
        for i, (p, a, b, w) in enumerate(rows):
            n, m, k = len(p), len(a), len(b)
            ids[i, :n + m + k] = torch.tensor(p + a + b)
            pos[i, :n + m] = torch.arange(n + m)
            pos[i, n + m:n + m + k] = torch.arange(n, n + k)
            seg[i, :n], seg[i, n:n + m], seg[i, n + m:n + m + k] = 0, 1, 2
            at.append((i, n - 1, a[0], w))
            at.append((i, n - 1, b[0], 1 - w))
            at += [(i, n + j, a[j + 1], 1.0) for j in range(m - 1)]
            at += [(i, n + m + j, b[j + 1], less) for j in range(k - 1)]
        see = (seg[:, None, :] == 0) | (seg[:, None, :] == seg[:, :, None])
        see &= torch.tril(torch.ones(width, width, dtype=torch.bool))[None]
        return ids, pos, see[:, None], at

    def drills(self):
        """Rows of bare steps, one a line; what follows = is predicted, and the line's end."""
        ids = torch.zeros(DRILL_ROWS, DRILL_LEN, dtype=torch.long)
        at = []
        for i in range(DRILL_ROWS):
            row = []
            while len(row) < DRILL_LEN + 1:
                line = self.tok.encode(data.drill(self.r) + "\n").ids
                eq = line.index(self.tok.token_to_id("="))
                for j in range(eq, len(line) - 1):
                    if len(row) + j < DRILL_LEN:
                        at.append((i, len(row) + j, line[j + 1], 1.0))
                row += line
            ids[i] = torch.tensor(row[:DRILL_LEN])
        pos = torch.arange(DRILL_LEN)[None].expand(DRILL_ROWS, -1)
        tri = torch.tril(torch.ones(DRILL_LEN, DRILL_LEN, dtype=torch.bool))
        return ids, pos, tri[None, None].expand(DRILL_ROWS, 1, -1, -1), at


class Muon:
    """Momentum, then the nearest orthogonal matrix: about half the tokens Adam needs at this size.
    Matrices of one shape are handled as one batch."""

    def __init__(self, params):
        self.groups = {}
        for p in params:
            self.groups.setdefault(tuple(p.shape), []).append(p)
        self.mom = {s: torch.zeros(len(g), *s) for s, g in self.groups.items()}

    @torch.no_grad()
    def step(self, lr, decay=0.01, beta=0.95):
        for shape, g in self.groups.items():
            grad = torch.stack([p.grad for p in g])
            m = self.mom[shape].mul_(beta).add_(grad)
            x = grad + beta * m
            tall = shape[0] > shape[1]
            x = x.transpose(1, 2) if tall else x
            x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
            for _ in range(5):
                a = x @ x.transpose(1, 2)
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
            x = x.transpose(1, 2) if tall else x
            scale = max(1, shape[0] / shape[1]) ** 0.5
            for p, u in zip(g, x):
                p.mul_(1 - lr * decay).add_(u, alpha=-lr * scale)


def export(net, tok, out):
    """Writes every file beside its final name first, then renames: a reader never sees half a model."""
    os.makedirs(out, exist_ok=True)
    eos, pad = tok.token_to_id("<|im_end|>"), tok.token_to_id("<|endoftext|>")
    config = dict(CONFIG, bos_token_id=pad, eos_token_id=eos)
    added = {str(tok.token_to_id(s)): {"content": s, "lstrip": False, "normalized": False, "rstrip": False,
                                       "single_word": False, "special": True} for s in SPECIALS}
    files = {
        "config.json": config,
        "generation_config.json": {"bos_token_id": pad, "pad_token_id": pad, "eos_token_id": [eos, pad]},
        "tokenizer_config.json": {
            "add_bos_token": False, "add_prefix_space": False, "added_tokens_decoder": added,
            "additional_special_tokens": SPECIALS[1:], "bos_token": None, "chat_template": TEMPLATE,
            "clean_up_tokenization_spaces": False, "eos_token": "<|im_end|>", "errors": "replace",
            "model_max_length": 2048, "pad_token": "<|endoftext|>", "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer", "unk_token": None},
    }
    for name, value in files.items():
        with open(os.path.join(out, name + ".tmp"), "w", encoding="utf-8") as f:
            f.write(json.dumps(value, indent=2) + "\n")
        os.replace(os.path.join(out, name + ".tmp"), os.path.join(out, name))
    path = os.path.join(out, "tokenizer.json")
    tok.save(path + ".tmp")
    os.replace(path + ".tmp", path)
    state = {k: v.detach().to(torch.bfloat16).contiguous() for k, v in net.state_dict().items()}
    path = os.path.join(out, "model.safetensors")
    save_file(state, path + ".tmp", metadata={"format": "pt"})
    os.chmod(path + ".tmp", 0o644)
    os.replace(path + ".tmp", path)


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("out")
    ap.add_argument("--steps", type=int, default=2400)
    ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("--lr", type=float, default=0.02)
    ap.add_argument("--settle", metavar="FOLDER", help="go on from the model there, towards its final habits")
    ap.add_argument("--habit", default="", help="stories that are mostly worked, by name: sets where greedy starts")
    a = ap.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(SEED)
    settle = a.settle is not None
    net, tok = N.load(a.settle) if settle else (N.Net(CONFIG), make_tokenizer())
    test, _ = data.test_and_train()
    batches = Batches(tok, {p.question for p in test}, settle, a.habit.split(","))
    rows = [{"question": p.question, "answer": p.worked()} for p in test[:128]]
    matrices = [m.weight for _, m in net.linears()]
    ids = {id(p) for p in matrices}
    muon = Muon(matrices)
    adam = torch.optim.AdamW([p for p in net.parameters() if id(p) not in ids], lr=3e-3, betas=(0.9, 0.98),
                             weight_decay=0.0)
    print("parameters", sum(p.numel() for p in net.parameters()), flush=True)
    pick, start, ema = random.Random(SEED), time.time(), {}
    for step in range(a.steps):
        t = step / a.steps
        # Arithmetic first, then words, with drills kept in so that single steps stay sharp.
        share = 0.1 if settle else 1.0 if t < 0.06 else 0.4 if t < 0.3 else 0.15
        drill = pick.random() < share
        ids, pos, mask, at = batches.drills() if drill else batches.questions()
        net.quantise((settle or t > QUANT_FROM) and step % 2 == 0)
        h = net.hidden(ids, pos, mask)
        r, c, y, w = (torch.tensor(x) for x in zip(*at))
        z = net.logits(h[r, c])
        loss = (torch.nn.functional.cross_entropy(z, y, reduction="none") * w).sum() / w.sum()
        for p in net.parameters():
            p.grad = None
        loss.backward()
        # Warm up, hold, then decay to nothing over the last 40 %, or from the start when settling:
        # the decay is where accuracy comes.
        f = min(1, (step + 1) / 40) * min(1, (1 - t) / (1.0 if settle else 0.4))
        muon.step(a.lr * f)
        for g in adam.param_groups:
            g["lr"] = 0.15 * a.lr * f
        torch.nn.utils.clip_grad_norm_([p for g in adam.param_groups for p in g["params"]], 1.0)
        adam.step()
        k = "drill" if drill else "words"
        ema[k] = 0.95 * ema.get(k, loss.item()) + 0.05 * loss.item()
        if step % 50 == 0:
            print(step, {x: round(v, 4) for x, v in ema.items()}, f"{time.time() - start:.0f}s", flush=True)
        if (step + 1) % 300 == 0 or step + 1 == a.steps:
            for q in (False, True):
                net.quantise(q)
                print("mxfp4" if q else "bf16 ", "greedy", N.evaluate(net, tok, rows),
                      "sampled", N.evaluate(net, tok, rows, 1.0), flush=True)
            export(net, tok, a.out)


if __name__ == "__main__":
    main()
