"""data.py - writes the word problems that the tiny model is trained and judged on.

Knows: the stories, the two ways an answer can be written, which questions are held out.
Does not know: tokens, models, reinforcement learning.

Every value in a problem, intermediate results included, is an integer from 1 to LIMIT, so a step
such as 38+45=83 can be learnt by a network of about a million weights; doing three of them in the
head cannot. All text here is our own; GSM8K gave the row format only.

    python tools/tiny/data.py models/tiny                     writes train.jsonl and test.jsonl there
    python tools/tiny/data.py --exam 2048 exam.jsonl          writes more test questions, in neither of them
"""
import json
import os
import random
import sys

LIMIT = 99
SEED = 20251
TRAIN_ROWS, TEST_ROWS = 8000, 512

NAMES = ("Anna Ben Cara Dan Emma Finn Gina Hugo Ivy Jack Kate Leo Mia Noah Olga Paul "
         "Rosa Sam Tina Will").split()
THINGS = ("apples books coins marbles pens shells stamps stickers cards beads").split()


class Reject(Exception):
    """The numbers drawn do not fit the story; the caller draws again."""


class Num:
    """A value and the expression it came from; prec is 1 for + and -, 2 for * and /, 3 for a literal."""

    def __init__(self, value, text=None, prec=3):
        self.value, self.text, self.prec = value, text or str(value), prec


class Work:
    """Collects the steps of one solution in the order they are worked."""

    def __init__(self):
        self.lines = []

    def op(self, a, sign, b, unit=None):
        """One step; unit names what it counts where that is not what the question asks for."""
        a = a if isinstance(a, Num) else Num(a)
        b = b if isinstance(b, Num) else Num(b)
        x, y = a.value, b.value
        if sign == "/" and (y < 2 or x % y):
            raise Reject
        value = {"+": x + y, "-": x - y, "*": x * y, "/": x // y if y else 0}[sign]
        if not 1 <= value <= LIMIT:
            raise Reject
        self.lines.append((f"{x}{sign}{y}={value}", unit))
        prec = 1 if sign in "+-" else 2
        left = f"({a.text})" if a.prec < prec else a.text
        right = f"({b.text})" if b.prec < prec or (b.prec == prec and sign in "-/") else b.text
        return Num(value, left + sign + right, prec)


# Each story draws its numbers, writes its question and works the steps: (question, unit, last Num).
# r is the random source, w the Work, A B C three different names, t a kind of thing.

def bags(r, w, A, B, C, t):
    a, b, c = r.randint(3, 50), r.randint(2, 9), r.randint(2, 9)
    q = f"{A} has {a} {t}. {A} buys {b} bags with {c} {t} each. How many {t} does {A} have now?"
    return q, t, w.op(a, "+", w.op(b, "*", c))


def bags_give(r, w, A, B, C, t):
    a, b, c, d = r.randint(3, 50), r.randint(2, 9), r.randint(2, 9), r.randint(2, 40)
    q = (f"{A} has {a} {t}. {A} buys {b} bags with {c} {t} each and gives {d} {t} to {B}. "
         f"How many {t} does {A} have now?")
    return q, t, w.op(w.op(a, "+", w.op(b, "*", c)), "-", d)


def times_as_many(r, w, A, B, C, t):
    a, k = r.randint(4, 24), r.randint(2, 6)
    q = f"{A} has {a} {t}. {B} has {k} times as many {t} as {A}. How many {t} do they have together?"
    return q, t, w.op(a, "+", w.op(a, "*", k))


def gave_two(r, w, A, B, C, t):
    a, b, c = r.randint(20, 99), r.randint(3, 45), r.randint(3, 45)
    q = f"{A} had {a} {t}. {A} gave {b} to {B} and {c} to {C}. How many {t} does {A} have left?"
    return q, t, w.op(w.op(a, "-", b), "-", c)


def boxes_sell(r, w, A, B, C, t):
    b, c, d, e = r.randint(3, 12), r.randint(3, 12), r.randint(3, 60), r.randint(3, 40)
    q = (f"{A} fills {b} boxes with {c} {t} each. {A} sells {d} {t} and then finds {e} more. "
         f"How many {t} does {A} have now?")
    return q, t, w.op(w.op(w.op(b, "*", c), "-", d), "+", e)


def share(r, w, A, B, C, t):
    b, c, d, k = r.randint(2, 9), r.randint(3, 9), r.randint(2, 40), r.randint(2, 9)
    q = (f"There are {b} boxes with {c} {t} each and {d} more {t} on a table. {k} friends share them "
         f"equally. How many {t} does each friend get?")
    return q, t, w.op(w.op(w.op(b, "*", c), "+", d), "/", k)


def wages(r, w, A, B, C, t):
    a, b, c = r.randint(2, 12), r.randint(2, 9), r.randint(2, 9)
    q = (f"{A} earns {a} dollars an hour. {A} works {b} hours on Monday and {c} hours on Friday. "
         f"How many dollars does {A} earn?")
    return q, "dollars", w.op(w.op(b, "+", c, "hours"), "*", a)


def wages_spend(r, w, A, B, C, t):
    a, b, c, d = r.randint(2, 12), r.randint(2, 9), r.randint(2, 9), r.randint(3, 60)
    q = (f"{A} earns {a} dollars an hour. {A} works {b} hours on Monday and {c} hours on Friday, then "
         f"spends {d} dollars. How many dollars are left?")
    return q, "dollars", w.op(w.op(w.op(b, "+", c, "hours"), "*", a), "-", d)


def bus(r, w, A, B, C, t):
    a, b, c, d = r.randint(10, 60), r.randint(3, 30), r.randint(3, 40), r.randint(3, 40)
    q = (f"A bus carries {a} people. At the first stop {b} get off and {c} get on. At the next stop "
         f"{d} get on. How many people are on the bus now?")
    return q, "people", w.op(w.op(w.op(a, "-", b), "+", c), "+", d)


def pages(r, w, A, B, C, t):
    a, b, c = r.randint(3, 15), r.randint(2, 9), r.randint(30, 99)
    q = f"{A} reads {a} pages a day for {b} days. The book has {c} pages. How many pages are left?"
    return q, "pages", w.op(c, "-", w.op(a, "*", b))


def hens(r, w, A, B, C, t):
    a, b, c, d = r.randint(3, 20), r.randint(2, 7), r.randint(2, 40), r.randint(2, 9)
    q = (f"{A} keeps {a} hens that lay {b} eggs each. {A} uses {c} eggs and packs the rest in boxes of {d}. "
         f"How many boxes does {A} fill?")
    return q, "boxes", w.op(w.op(w.op(a, "*", b, "eggs"), "-", c, "eggs"), "/", d)


def ages(r, w, A, B, C, t):
    a, b, k = r.randint(4, 30), r.randint(2, 15), r.randint(2, 5)
    q = (f"{A} is {a} years old. {B} is {b} years older than {A}. {C} is {k} times as old as {B}. "
         f"How many years old is {C}?")
    return q, "years", w.op(w.op(a, "+", b), "*", k)


def prices(r, w, A, B, C, t):
    a, k, n = r.randint(2, 12), r.randint(2, 6), r.randint(2, 7)
    q = (f"A cup costs {a} dollars and a lamp costs {k} times as much. {A} buys {n} cups and one lamp. "
         f"How many dollars does {A} pay?")
    return q, "dollars", w.op(w.op(a, "*", n), "+", w.op(a, "*", k))


def two_packs(r, w, A, B, C, t):
    b, c, d, e, f = (r.randint(2, 9), r.randint(2, 9), r.randint(2, 9), r.randint(2, 9), r.randint(3, 40))
    q = (f"{A} buys {b} bags with {c} {t} each and {d} boxes with {e} {t} each. {A} gives {f} {t} to {B}. "
         f"How many {t} does {A} have left?")
    return q, t, w.op(w.op(w.op(b, "*", c), "+", w.op(d, "*", e)), "-", f)


def three_people(r, w, A, B, C, t):
    a, b, c = r.randint(4, 30), r.randint(2, 20), r.randint(2, 20)
    q = (f"{A} has {a} {t}. {B} has {b} more than {A}. {C} has {c} fewer than {B}. "
         f"How many {t} do all three have together?")
    m = w.op(a, "+", b)
    n = w.op(m, "-", c)
    return q, t, w.op(w.op(a, "+", m), "+", n)


def half(r, w, A, B, C, t):
    a, c, k = 2 * r.randint(3, 45), r.randint(2, 20), r.randint(2, 5)
    q = (f"{A} had {a} {t} and gave half of them to {B}. Then {A} found {c} more. {C} has {k} times as many "
         f"as {A} has now. How many {t} does {C} have?")
    return q, t, w.op(w.op(w.op(a, "/", 2), "+", c), "*", k)


STORIES = [bags, bags_give, times_as_many, gave_two, boxes_sell, share, wages, wages_spend, bus, pages,
           hens, ages, prices, two_packs, three_people, half]


class Problem:
    def __init__(self, story, question, unit, lines, last):
        self.story, self.question, self.unit, self.lines, self.last = story, question, unit, lines, last

    def worked(self):
        """Every step with its result: the answer in the rows, and the minority style of the pretraining."""
        words = ["First"] + ["Then"] * (len(self.lines) - 1)
        body = "".join(f"{word} {line} {unit or self.unit}.\n"
                       for word, (line, unit) in zip(words, self.lines))
        return f"{body}#### {self.last.value}"

    def shortcut(self):
        """The whole sum in one go: true as well, but the model must do every step in its head."""
        return f"Altogether {self.last.text}={self.last.value} {self.unit}.\n#### {self.last.value}"


def problem(r):
    story = r.choice(STORIES)
    names = r.sample(NAMES, 3)
    thing = r.choice(THINGS)
    while True:
        w = Work()
        try:
            question, unit, last = story(r, w, *names, thing)
            return Problem(story.__name__, question, unit, w.lines, last)
        except Reject:
            pass


def problems(seed, count, taken):
    """count problems whose questions are new to the set taken, which grows by them."""
    r = random.Random(seed)
    out = []
    while len(out) < count:
        p = problem(r)
        if p.question not in taken:
            taken.add(p.question)
            out.append(p)
    return out


def test_and_train():
    taken = set()
    test = problems(SEED, TEST_ROWS, taken)
    return test, problems(SEED + 1, TRAIN_ROWS, taken)


def exam(count):
    """More test questions, for intervals narrower than those of 512; new to both other files."""
    test, train = test_and_train()
    return problems(SEED + 2, count, {p.question for p in test + train})


def drill(r):
    """One bare step, of the kinds the stories use: arithmetic is learnt faster without the words."""
    while True:
        w = Work()
        sign = r.choice("+-*/")
        try:
            if sign == "/":
                b, v = r.randint(2, 9), r.randint(1, 49)
                w.op(b * v, "/", b)
                if b * v > LIMIT:
                    raise Reject
            elif sign == "*":
                w.op(r.randint(2, 24), "*", r.randint(2, 24))
            else:
                w.op(r.randint(2, LIMIT), sign, r.randint(1, LIMIT))
            return w.lines[0][0]
        except Reject:
            pass


def write_rows(path, rows):
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        for p in rows:
            f.write(json.dumps({"question": p.question, "answer": p.worked()}) + "\n")
    os.replace(path + ".tmp", path)


if __name__ == "__main__":
    if sys.argv[1] == "--exam":
        write_rows(sys.argv[3], exam(int(sys.argv[2])))
    else:
        test, train = test_and_train()
        write_rows(os.path.join(sys.argv[1], "test.jsonl"), test)
        write_rows(os.path.join(sys.argv[1], "train.jsonl"), train)
