"""rl_check.py - asks whether models/tiny can be taught: a plain-PyTorch twin of the quickstart.

    python tools/tiny/rl_check.py models/tiny --seed 1 [--steps 30] [--prompts 8] [--lr 1e-3]

LoRA on all seven projections over an MXFP4 base, groups of 8 at temperature 1, reward 1 for the strict
answer, groups that agree dropped, token-mean loss, one on-policy update a step (so every ratio is 1 and
no clip acts). It exists to choose the quickstart's settings and to prove the committed weights; the
product never runs it.
"""
import argparse
import json
import os
import random
import time

import torch

import net as N


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("folder")
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--steps", type=int, default=30)
    ap.add_argument("--prompts", type=int, default=8)
    ap.add_argument("--group", type=int, default=8)
    ap.add_argument("--lr", type=float, default=1e-3)
    ap.add_argument("--warmup", type=int, default=2)
    ap.add_argument("--rank", type=int, default=32)
    ap.add_argument("--alpha", type=float, default=32)
    ap.add_argument("--limit", type=int, default=64)
    ap.add_argument("--test", type=int, default=512)
    ap.add_argument("--every", type=int, default=10, help="evaluate after so many steps")
    ap.add_argument("--threads", type=int, default=1)
    a = ap.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(a.seed)
    pick, rng = random.Random(a.seed), torch.Generator().manual_seed(a.seed)
    net, tok = N.load(a.folder)
    read = lambda f: [json.loads(x) for x in open(os.path.join(a.folder, f), encoding="utf-8")]
    train, test = read("train.jsonl"), read("test.jsonl")[:a.test]
    net.requires_grad_(False)
    print("bf16  greedy", N.evaluate(net, tok, test), flush=True)
    net.quantise(True)
    print("mxfp4 greedy", N.evaluate(net, tok, test), flush=True)
    lora = []
    for _, m in net.linears():
        m.weight.data, m.quant = N.mxfp4(m.weight.data), False        # rounded once; the base never moves
        n_out, n_in = m.weight.shape
        down = (torch.randn(a.rank, n_in) * n_in ** -0.5).requires_grad_()
        up = torch.zeros(n_out, a.rank, requires_grad=True)
        m.lora = (down, up, a.alpha / a.rank)
        lora += [down, up]
    opt = torch.optim.AdamW(lora, lr=a.lr, weight_decay=0.0)
    eos, start = tok.token_to_id("<|im_end|>"), time.time()
    for step in range(a.steps):
        rows = [r for r in pick.sample(train, a.prompts) for _ in range(a.group)]
        prompts = [tok.encode(N.render(r["question"])).ids for r in rows]
        answers = N.generate(net, prompts, eos, a.limit, 1.0, rng)
        reward = torch.tensor([float(N.strict(tok.decode(x)) == N.strict(r["answer"]))
                               for x, r in zip(answers, rows)]).view(a.prompts, a.group)
        adv = ((reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-6)).view(-1)
        keep = [i for i in range(len(rows)) if adv[i] != 0]
        if keep:
            width = max(len(prompts[i]) + len(answers[i]) for i in keep)
            ids = torch.zeros(len(keep), width, dtype=torch.long)
            use = torch.zeros(len(keep), width - 1, dtype=torch.bool)
            for j, i in enumerate(keep):
                full = prompts[i] + answers[i]
                ids[j, :len(full)] = torch.tensor(full)
                use[j, len(prompts[i]) - 1:len(full) - 1] = True
            tri = torch.tril(torch.ones(width, width, dtype=torch.bool))
            h = net.hidden(ids, torch.arange(width).expand(len(keep), -1), tri[None, None])
            lp = torch.log_softmax(net.logits(h[:, :-1][use]), -1).gather(1, ids[:, 1:][use][:, None])[:, 0]
            w = adv[keep][:, None].expand(-1, width - 1)[use]
            loss = -(w * lp).mean()
            opt.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(lora, 1.0)
            for g in opt.param_groups:
                g["lr"] = a.lr * min(1, (step + 1) / max(1, a.warmup))
            opt.step()
        print(step + 1, f"reward {reward.mean():.3f} groups {len(keep) // a.group}/{a.prompts}",
              f"tokens {sum(map(len, answers)) / len(answers):.1f} {time.time() - start:.0f}s", flush=True)
        if (step + 1) % a.every == 0 or step + 1 == a.steps:
            print("mxfp4+lora greedy", N.evaluate(net, tok, test), flush=True)


if __name__ == "__main__":
    main()
