#!/usr/bin/env python3
"""Makes tests/vectors/nvfp4.jsonl: values, and the codes and scales that NVFP4's definition gives for them.

Exact fractions and searches over whole grids, so that nothing is shared with the C code: E4M3 and E2M1 are the nearest
value of a list, the even code among equals. Rounding "seed" follows the earlier system: three mantissa bits without
carry, no scale below 2^-6, ties between codes to the smaller magnitude.
Run from the repository's root: python3 tests/vectors/make_nvfp4.py
SPDX-License-Identifier: Apache-2.0
"""
import json
import random
import struct
from fractions import Fraction as F

OUT = "tests/vectors/nvfp4.jsonl"
E2M1 = [F(0), F(1, 2), F(1), F(3, 2), F(2), F(3), F(4), F(6)]
E4M3 = [F(c & 7, 512) if c < 8 else F(8 + (c & 7), 8) * F(2) ** ((c >> 3) - 7) for c in range(0x7F)]
rng = random.Random(20260101)


def f32(x):
    """The nearest f32 of a fraction, ties to even."""
    if x == 0:
        return F(0)
    bits = struct.unpack("<i", struct.pack("<f", float(x)))[0]
    near = [struct.unpack("<f", struct.pack("<i", b))[0] for b in (bits - 1, bits, bits + 1)]
    return F(min(near, key=lambda v: (abs(F(v) - x), struct.unpack("<i", struct.pack("<f", v))[0] & 1)))


def bf16(x):
    bits = struct.unpack("<I", struct.pack("<f", x))[0]
    return struct.unpack("<f", struct.pack("<I", (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000))[0]


def nearest(grid, x, tie):
    return min(range(len(grid)), key=lambda c: (abs(grid[c] - x), tie(c)))


def seed_scale(amax):
    r = f32(max(amax, f32(F("1e-10"))) / 6)
    e = min(max(next(k for k in range(200, -200, -1) if F(2) ** k <= r), -6), 8)
    eighths = f32(8 * r / F(2) ** e)
    m = int(eighths)
    rest = eighths - m
    m += rest > F(1, 2) or (rest == F(1, 2) and m & 1)
    return (e + 6) * 8 + min(max(m, 8), 15)


def quantise(x, rounding, ts):
    if rounding == "seed":
        scale = seed_scale(max(map(abs, x)))
        codes = [nearest(E2M1, f32(min(abs(v) / E4M3[scale], F(6))), lambda c: c) for v in x]
    else:
        scale = nearest(E4M3, max(map(abs, x)) / 6 / ts, lambda c: c & 1)
        unit = E4M3[scale] * ts
        codes = [nearest(E2M1, abs(v) / unit, lambda c: c & 1) if unit else 0 for v in x]
    return scale, [c | (8 if v < 0 and c else 0) for c, v in zip(codes, x)]


def case(name, rows, rounding):
    rows = [[F(v) for v in r] for r in rows]
    amax = max(abs(v) for r in rows for v in r)
    ts = f32(amax / 2688) if rounding == "ocp" and amax else F(1)
    codes, scales = [], []
    for r in rows:
        for i in range(0, len(r), 16):
            s, c = quantise(r[i:i + 16], rounding, ts)
            scales.append(s)
            codes += c
    return json.dumps({"name": name, "rounding": rounding, "out": len(rows), "in": len(rows[0]), "tensor_scale": float(ts),
                       "values": [float(v) for r in rows for v in r], "scales": scales, "codes": codes})


def normal(out, width, sigma):
    return [[bf16(rng.gauss(0, sigma)) for _ in range(width)] for _ in range(out)]


def block(*head):
    return list(head) + [0.0] * (16 - len(head))


UP, DOWN = 1 + 2 ** -20, 1 - 2 ** -20
TIES = [.25, .75, 1.25, 1.75, 2.5, 3.5, 5]
# the tensor's scale is 1: a block's scale is the E4M3 nearest to its largest over 6
ties = [block(2688) + block(6, *TIES, *[-t for t in TIES]),
        block(6, *[t * UP for t in TIES]) + block(-6, *[t * DOWN for t in TIES])]
scales = [block(2688) + block(5.9, 1, -3) + block(6 * 1.0625, 6, 1) + block(6 * 1.1875, 6, 1),
          block(6 * 2 ** -9, 2 ** -9) + block(9 * 2 ** -9, .001) + block(3 * 2 ** -9, .001) + block(6 * 7.5 / 512, .01),
          block(2600, 100) + block(1e-30) + block() + block(6.2 / 64, .01)]
page = [block(1, .1), block(6, 1), block(5.9, 1), block(3, 1), block(7, 1), block(.12, .03), block(.1, .03),
        block(.05, .003), block(.02, .01), block(2688, 7)]
single = [[struct.unpack("<f", struct.pack("<f", v))[0] for v in r] for r in page]

with open(OUT, "w") as f:
    for rounding in ("ocp", "seed"):
        print(case("normal", normal(3, 40, .02), rounding), file=f)
        print(case("wide", normal(2, 16, 30), rounding), file=f)
        print(case("page", single, rounding), file=f)
        print(case("zero", [block(), block()], rounding), file=f)
        print(case("ties", [[struct.unpack("<f", struct.pack("<f", v))[0] for v in r] for r in ties], rounding), file=f)
        print(case("scales", [[struct.unpack("<f", struct.pack("<f", v))[0] for v in r] for r in scales], rounding), file=f)
