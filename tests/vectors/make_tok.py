#!/usr/bin/env python3
# make_tok.py - makes tests/vectors/tok: strings, small vocabularies, token ids and chat renderings, by the reference
# implementations (tokenizers 0.23.3, transformers 5.23.0, unicodedata 14.0).
#
#   python3 tests/vectors/make_tok.py [models/smollm2-135m-instruct/model.gguf]
#
# strings.jsonl       2,000 JSON strings; the last 200 hold special tokens' texts
# FAMILY/             tokenizer.json (trained here on the strings under that family's pre-tokenizer), tokenizer_config.json
# FAMILY.ids.jsonl    ids of each string, special tokens recognised; FAMILY.plain.jsonl: the last 200, not recognised
# llama3.gguf         the small Llama vocabulary once more, as GGUF metadata
# smollm2-real.*      the same for the vocabulary in the GGUF file (not written without one)
# templates/, chat.jsonl   chat templates, and conversations as transformers renders them
# SPDX-License-Identifier: Apache-2.0
import json, os, random, sys, unicodedata

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

assert unicodedata.unidata_version == "14.0.0"
HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tok")
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
            "<|eot_id|>", "<tool_call>", "</tool_call>"]
WORDS = """Natalia sold clips to of her friends in April, and then she half as many May. How did altogether and? Weng earns
an hour for babysitting. Yesterday, just minutes much earn the answer is therefore we'll they're I've it's don't he'd I'm
YOU'LL THEY'RE IT'S def return self.x = lambda y: print(f"{y!r}") int main(void) {} #include <stdio.h> https://a.b/c?d=e
naïve café Müller Straße œuvre façade coöperate Größe señor año niño São Paulo zażółć gęślą jaźń příliš žluťoučký kůň
Привет мир хорошо здравствуй Ελλάδα καλημέρα κόσμε שלום עולם مرحبا بالعالم नमस्ते दुनिया สวัสดีชาวโลก こんにちは世界 カタカナ
你好世界 數學 问题 안녕하세요 세계 გამარჯობა բարեւ ሰላም தமிழ் తెలుగు ಕನ್ನಡ മലയാളം বাংলা ਪੰਜਾਬੀ ગુજરાતી ଓଡ଼ିଆ සිංහල မြန်မာ ខ្មែរ ລາວ བོད་ ᠮᠣᠩᠭᠣᠯ ᏣᎳᎩ
1 12 123 1234 3.14 1,000,000 $5.00 50% 2/3 1e-9 0x1F ٣٤٥ १२३ ๔๕ Ⅷ ½ ² ① 𝟙𝟚 〇 x² + y² = z² ∑ ∫ √2 ≤ ∞ 😀 👩‍👩‍👧 🇩🇪 👍🏽 ❤️""".split()
SPACES = [" ", "  ", "   ", "\t", "\n", "\r\n", "\n\n", " \n", "\n ", " \n \n ", "\t\t", "\u00a0", "\u3000", "\u2003", "\u2028",
          "\u2029", "\u0085", "\u1680", "\u202f", "\u205f", "\u200b", "\ufeff", "\x0b", "\x0c", "\x1c", "\x1f", "\u180e", "\r", "\r\r\n"]
MARKS = ["e\u0301", "a\u0323\u0307", "a\u0307\u0323", "\u1100\u1161\u11a8", "\uac00\u11a8", "\u0344", "\u212b", "\u2126", "\u0958",
         "\u09c7\u09be", "q\u0334\u035d\u0301", "\ufb1d", "\u1e9b\u0323", "\u0f73", "n\u0303o", "\U0001d15e", "\U00011935\U00011930",
         "a\u0301\u1dfa\u0323", "o\u0302\u0301", "\u0301x", "e\u0301clair", "\xe9clair", "\u1025\u102e", "\u0dd9\u0dcf\u0dca"]
QUOTES = ["'s", "'S", "'\u017f", "'t", "'T", "'re", "'RE", "'Re", "'ve", "'vE", "'ll", "'LL", "'lL", "'l", "'r", "'d", "'D", "'m",
          "''s", "\u2019s", "'", "'\u212a", " 's", "\n's", "'st", "'rex", "'1"]


def assigned():
    blocks = {}
    for c in range(0x110000):
        if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co"):
            blocks.setdefault(c >> 7 if c < 0x3000 or c >= 0x10000 else c >> 10, []).append(chr(c))
    return list(blocks.values())


def strings():
    g = random.Random(20240726)
    blocks = assigned()
    word = lambda: g.choice(WORDS)
    digits = lambda: "".join(g.choice("0123456789") for _ in range(g.randint(1, 8)))

    def script():
        b = g.choice(blocks)
        return "".join(g.choice(b) for _ in range(g.randint(1, 9)))

    def mixed():
        kinds = [word, word, script, digits, lambda: g.choice(SPACES), lambda: g.choice(SPACES), lambda: g.choice(MARKS),
                 lambda: g.choice(QUOTES), lambda: chr(g.randint(0, 0x7f)), lambda: g.choice("!?.,;:()[]{}<>|-_=+*/\\\"'`~@#$%^&")]
        return "".join(g.choice(kinds)() for _ in range(g.randint(1, 8)))

    out = []
    for i in range(1800):
        if i % 6 == 0: s = " ".join(word() for _ in range(g.randint(1, 7)))
        elif i % 6 == 1: s = script() + g.choice([" ", "", "\n", "'s", "1"]) + script()
        elif i % 6 == 2: s = "".join(g.choice(SPACES) if g.random() < .7 else g.choice(["a", "1", "!", word()]) for _ in range(g.randint(1, 7)))
        elif i % 6 == 3: s = "".join(word() + g.choice(QUOTES) + g.choice(["", " ", "x"]) for _ in range(g.randint(1, 3)))
        elif i % 6 == 4: s = "".join(g.choice(MARKS) if g.random() < .6 else g.choice(g.choice(blocks)) for _ in range(g.randint(1, 6)))
        else: s = mixed()
        out.append(s)
    for i in range(200):
        s = "".join(g.choice(SPECIALS) if g.random() < .4 else mixed() if g.random() < .6 else
                    g.choice(["<|im_start|>user\n", "<|im_", "<|", "|>", "<|im_end|><|im_end|>", " <|endoftext|> ", "<<|eot_id|>>"])
                    for _ in range(g.randint(1, 5)))
        out.append(s)
    return out


LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
          r"\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace("{1,3}", "")
LACKING = [0x04, 0x06, 0x13, 0x14, 0x16, 0x1d, 0xc0, 0xc1, 0xf1, 0xf2] + list(range(0xf5, 0x100))


def alphabet():
    keep = list(range(0x21, 0x7f)) + list(range(0xa1, 0xad)) + list(range(0xae, 0x100))
    out, n = {}, 0
    for b in range(256):
        out[b] = chr(b) if b in keep else chr(0x100 + n)
        n += b not in keep
    return out


def steps(family):
    if family == "smollm2":
        return [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    return [pre_tokenizers.Split(Regex(LLAMA3 if family == "llama3" else QWEN2), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


def finish(t, family):
    t.pre_tokenizer = pre_tokenizers.Sequence(steps(family))
    t.decoder = decoders.ByteLevel()
    if family == "qwen2":
        t.normalizer = normalizers.NFC()


def train(family, corpus):
    t = Tokenizer(models.BPE())
    finish(t, family)
    lacking = LACKING if family == "smollm2" else []
    first = [c for b, c in alphabet().items() if b not in lacking]
    size = {"smollm2": 700, "llama3": 900, "qwen2": 800}[family]
    t.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=size, initial_alphabet=first, show_progress=False))
    j = json.loads(t.to_str())
    vocab, merges = j["model"]["vocab"], j["model"]["merges"]
    if lacking:                               # bytes that the corpus brought in after all: dense ids without them
        gone = {alphabet()[b] for b in lacking}
        merges = [m for m in merges if not gone & set("".join(m))]
        vocab = {k: i for i, k in enumerate(k for k in sorted(vocab, key=vocab.get) if not gone & set(k))}
        merges = [m for m in merges if "".join(m) in vocab]
    if family == "llama3":                    # words that no merge reaches
        for w in ["\u0120babysitting", "\u0120altogether", "\u0120Yesterday", "\u010a\u010a\u010a", "Natalia"]:
            vocab.setdefault(w, len(vocab))
        j["model"]["ignore_merges"] = True
    j["model"].update(vocab=vocab, merges=[" ".join(m) for m in merges] if family == "smollm2" else merges)
    t = Tokenizer.from_str(json.dumps(j))
    add = {"smollm2": SPECIALS[:3], "llama3": ["<|begin_of_text|>", "<|end_of_text|>"] + SPECIALS[4:7],
           "qwen2": SPECIALS[:3]}[family]
    t.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in add])
    if family == "qwen2":
        t.add_tokens([AddedToken(s, normalized=False) for s in SPECIALS[7:]] +
                     [AddedToken("<|im_start|>user", normalized=False), AddedToken("e\u0301clair", normalized=True)])
    j = json.loads(t.to_str())
    if family == "smollm2":
        j["model"]["merges"] = [" ".join(m) if isinstance(m, list) else m for m in j["model"]["merges"]]
    return j


def write_lines(name, rows):
    with open(os.path.join(HERE, name), "w") as f:
        for r in rows:
            f.write(json.dumps(r, separators=(",", ":")) + "\n")


def write_ids(name, t, rows):
    ids = lambda s: t.encode(s, add_special_tokens=False).ids
    t.encode_special_tokens = False
    write_lines(name + ".ids.jsonl", map(ids, rows))
    t.encode_special_tokens = True
    write_lines(name + ".plain.jsonl", map(ids, rows[-200:]))


def real(path):
    from gguf import GGUFReader
    r = GGUFReader(path)
    get = lambda k: r.fields["tokenizer.ggml." + k].contents()
    tokens, types = get("tokens"), get("token_type")
    t = Tokenizer(models.BPE({s: i for i, s in enumerate(tokens)}, [tuple(m.split(" ")) for m in get("merges")]))
    finish(t, "smollm2")
    t.add_special_tokens([AddedToken(s, special=True, normalized=False) for s, k in zip(tokens, types) if k == 3])
    return t


# GGUF metadata of the small Llama vocabulary, no tensors.
def write_gguf(j):
    from gguf import GGUFWriter, TokenType
    w = GGUFWriter(os.path.join(HERE, "llama3.gguf"), "llama")
    names = {i: s for s, i in j["model"]["vocab"].items()} | {a["id"]: a["content"] for a in j["added_tokens"]}
    added = {a["id"] for a in j["added_tokens"]}
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("llama-bpe")
    w.add_token_list([names[i] for i in range(len(names))])
    w.add_token_types([TokenType.CONTROL if i in added else TokenType.NORMAL for i in range(len(names))])
    w.add_token_merges([" ".join(m) for m in j["model"]["merges"]])
    w.add_bos_token_id(min(added))
    w.add_chat_template(open(os.path.join(HERE, "templates", "llama3.jinja")).read())
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


# ---- chat ----

def conversations():
    u, a, s = (lambda c: {"role": "user", "content": c}), (lambda c: {"role": "assistant", "content": c}), \
        (lambda c: {"role": "system", "content": c})
    yield [u("How many clips did Natalia sell?")]
    yield [s("You solve problems."), u("What is 2+2?")]
    yield [u("Hi"), a("Hello!"), u("Bye")]
    yield [s("Be brief."), u("Hi"), a("Hello!"), u("Bye"), a("Ciao")]
    yield [s(""), u("x")]
    yield [u("  spaces around \n"), a("\n\tindented\u00a0")]
    yield [u("one"), s("a later system message"), u("two")]
    yield [s("  trimmed?  "), u("é \U0001f600 '\"\\ {{ x }} {% y %}")]
    yield [s("only a system message")]
    yield [a("assistant first")]
    yield [u(""), a(""), u("\x1c\u2003x\u3000\x85")]


def chat():
    from transformers import PreTrainedTokenizerFast
    folder = os.path.join(HERE, "templates")
    rows = []
    for name in sorted(os.listdir(folder)):
        text = open(os.path.join(folder, name)).read()
        t = PreTrainedTokenizerFast(tokenizer_file=os.path.join(HERE, "llama3/tokenizer.json"), bos_token="<|begin_of_text|>")
        for m in conversations():
            for add in (False, True):
                # Llama 3.2 would print today's date: we print the date that the template falls back to
                out = t.apply_chat_template(m, chat_template=text, add_generation_prompt=add, tokenize=False,
                                            **({"date_string": "26 Jul 2024"} if "date_string" in text else {}))
                rows.append({"template": name, "messages": m, "add_prompt": add, "text": out})
    write_lines("chat.jsonl", rows)


def main():
    os.makedirs(HERE, exist_ok=True)
    rows = strings()
    write_lines("strings.jsonl", rows)
    for family in ("smollm2", "llama3", "qwen2"):
        os.makedirs(os.path.join(HERE, family), exist_ok=True)
        j = train(family, [r for r in rows[:1800]] + [" ".join(WORDS)] * 20)
        with open(os.path.join(HERE, family, "tokenizer.json"), "w") as f:
            f.write(json.dumps(j, separators=(",", ":"), ensure_ascii=False))
        bos = {"smollm2": "<|im_start|>", "llama3": "<|begin_of_text|>", "qwen2": None}[family]
        template = {"smollm2": "smollm2", "llama3": "llama3.1", "qwen2": "qwen2.5"}[family] + ".jinja"
        with open(os.path.join(HERE, family, "tokenizer_config.json"), "w") as f:
            json.dump({"bos_token": bos, "chat_template": open(os.path.join(HERE, "templates", template)).read()}, f)
        write_ids(family, Tokenizer.from_str(json.dumps(j)), rows)
        if family == "llama3":
            write_gguf(j)
    if len(sys.argv) > 1:
        write_ids("smollm2-real", real(sys.argv[1]), rows)
    chat()


main()
