#!/usr/bin/env python3
"""Train the demo model in mlx_turbo/demo_model from text, on a CPU, in about an hour.

The result is an ordinary mlx-lm checkpoint (`model_type: qwen3`): grouped-query attention, per-head q/k
RMSNorm, RoPE, SwiGLU, head_dim 128, tied embeddings.  Its purpose is testing KV-cache compression.  So
besides telling TinyStories-like stories it is trained to *recall*: facts hidden anywhere in its context are
asked for at the end, and passages have to be repeated verbatim.  Both go through the KV cache and nothing
else, so damage to the cache shows at once.

    python scripts/train_demo_model.py prepare TinyStories-1.txt TinyStories-2.txt ...
    python scripts/train_demo_model.py tokenizer
    python scripts/train_demo_model.py train --minutes 55
    python scripts/train_demo_model.py export
    python scripts/train_demo_model.py quantize

Every stage reads and writes fixed names in one folder (`--run`, default `run`): train.txt and valid.txt,
tokenizer.json, checkpoint.pt with config.json and log.jsonl, bf16/, 8bit/.

The shipped model was trained with `--minutes 55` and seed 0 on two CPU cores (56 minutes, 13.7 M tokens).
A run with `--minutes` always ends on time, but how many steps fit, and so every weight, depends on the
machine.  With `--steps N` the run is a function of the seed, up to the rounding of the PyTorch build and
its thread count.  `quantize` is exact: the same bf16 checkpoint gives the same bytes.

Needs the extra `train` (torch, tokenizers, safetensors): pip install -e ".[train]"
"""

import argparse
import json
import math
import random
import re
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

EOT = "<|endoftext|>"

CONFIG = {  # written to config.json as is
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "intermediate_size": 704,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
}
LEARNING_RATE = 3e-3
WARMUP_STEPS = 100
EVALUATIONS = 27  # spread over the run: the shipped model was evaluated every two of its 55 minutes

# (until this share of the run, sequence length, sequences per step, recall share, copying share)
# "recall share": sequences made of recall documents, the others are plain stories;
# "copying share": recall documents that are verbatim repetitions, the others hide facts.
PHASES = [
    (0.25, 256, 16, 0.45, 0.2),
    (0.55, 512, 8, 0.35, 0.2),
    (0.90, 1024, 4, 0.30, 0.2),
    (1.00, 2048, 2, 0.30, 0.2),
]
# Until held-out recall shows that copying has been learned (it comes suddenly), but
# for no more than 60 % of the run: short sequences, and mostly copying.
COPY_FIRST = (256, 16, 0.60, 0.5)


# --------------------------------------------------------------------------
# Corpus: clean, de-duplicated stories, split into train and held-out text
# --------------------------------------------------------------------------
OPENING = (
    r"(?:Once upon a time|Once there|Once,|One day|One (?:\w+ )?(?:morning|night|afternoon|evening)|"
    r"There once|There was once|In a |A long time ago|It was a )"
)
# The first TinyStories release holds UTF-8 punctuation read as cp1252; longest matches first.
MOJIBAKE = {
    "\u00e2\u20ac\u0153": '"',
    "\u00e2\u20ac\u009d": '"',
    "\u00e2\u20ac\u2122": "'",
    "\u00e2\u20ac\u02dc": "'",
    "\u00e2\u20ac\u201d": " - ",
    "\u00e2\u20ac\u201c": "-",
    "\u00e2\u20ac\u00a6": "...",
    "\u00e2\u20ac": '"',
}
PUNCTUATION = {
    "\u201c": '"',
    "\u201d": '"',
    "\u2018": "'",
    "\u2019": "'",
    "\u2014": " - ",
    "\u2013": "-",
    "\u2026": "...",
    "\u00a0": " ",
    "\r": "",
    "\u200b": "",
}


def clean(text):
    """Plain ASCII punctuation, single spaces, at most one empty line."""
    for table in (MOJIBAKE, PUNCTUATION):
        for a, b in table.items():
            text = text.replace(a, b)
    text = re.sub(r"[ \t]+", " ", text)
    text = re.sub(r" ?\n ?", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def split_stories(text):
    """The stories of one file: separated by `<|endoftext|>`, or else by the way stories open."""
    if EOT in text:
        return [clean(p) for p in text.split(EOT)]
    merged = []
    for p in re.split(r"\n+(?=" + OPENING + r")", text)[1:]:
        # "One day" also opens inner paragraphs
        if merged and (len(merged[-1]) < 350 or (not p.startswith("Once") and len(p) < 350)):
            merged[-1] += "\n\n" + p
        else:
            merged.append(p)
    return [clean(p) for p in merged]


def cmd_prepare(args):
    """text files -> train.txt, valid.txt: stories separated by `<|endoftext|>`"""
    seen, stories = set(), []
    for path in args.texts:
        before = len(stories)
        for s in split_stories(path.read_text(encoding="utf-8", errors="replace")):
            if not 200 <= len(s) <= 6000 or "\ufffd" in s or sum(ord(c) > 127 for c in s) > 3:
                continue
            key = re.sub(r"\W+", "", s.lower())
            keys = {key[:80] if len(key) > 400 else key, key[-160:], key[100:220]}
            if keys & seen:
                continue
            seen |= keys
            stories.append(s)
        print(f"{path}: {len(stories) - before} stories")
    random.Random(args.seed).shuffle(stories)
    valid, n_chars = [], 0
    while stories and n_chars < args.valid_chars:
        valid.append(stories.pop())
        n_chars += len(valid[-1]) + 1
    if not stories or not valid:
        raise SystemExit(
            f"no story left for training: {n_chars:,} characters in all, "
            f"--valid-chars asks to hold out {args.valid_chars:,}"
        )
    args.run.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", stories), ("valid", valid)):
        (args.run / f"{name}.txt").write_text(f"\n{EOT}\n".join(part) + "\n", encoding="utf-8")
        print(f"{name}.txt: {len(part)} stories, {sum(map(len, part)):,} characters")


# --------------------------------------------------------------------------
# Recall documents
# --------------------------------------------------------------------------
NAMES = (
    "Lily Tom Ben Anna Max Mia Sam Tim Lucy Jack Sara Timmy Sue Bob Amy Leo Emma Jane Billy "
    "Daisy Spot Bella Mark Joe Molly Fred Kate Nick Rose Kim Zoe Pete Ella Dan Ruby Luke Nina "
    "Finn Roxy Milo Ollie Polly Jim Sally Mary John Lola Buddy Rex Grace"
).split()
DIGIT_ATTRS = ["secret number", "magic number", "lucky number", "door code"]
WORD_ATTRS = {
    "favorite color": "red blue green yellow pink purple orange brown black white".split(),
    "favorite animal": "dog cat bird fish rabbit bear frog duck horse mouse".split(),
    "favorite food": "cake soup bread cheese apple banana candy pizza honey rice".split(),
    "hiding place": "kitchen garden forest park cave attic barn beach school tree".split(),
}
FACTS = [
    "The {attr} of {name} is{val}.",
    "{name}'s {attr} is{val}.",
    "Remember, the {attr} of {name} is{val}.",
    "The {attr} of {name} is{val}.",
]
ASKS = [
    "Question: What is the {attr} of {name}? Answer:{val}.",
    "Question: What is {name}'s {attr}? Answer:{val}.",
    "Question: What is the {attr} of {name}? Answer:{val}.",
]
SENTENCE = re.compile(r"""(?<=[.!?])(?=\s)|(?<=[.!?]")(?=\s)""")


def random_fact(rng, used, digits_only=False):
    """A (name, attribute, value) with a (name, attribute) not used before."""
    while True:
        name = rng.choice(NAMES)
        if digits_only or rng.random() < 0.65:
            attr = rng.choice(DIGIT_ATTRS)
            val = "".join(" " + rng.choice("0123456789") for _ in range(4))
        else:
            attr = rng.choice(list(WORD_ATTRS))
            val = " " + rng.choice(WORD_ATTRS[attr])
        if (name, attr) not in used:
            used.add((name, attr))
            return name, attr, val


class Data:
    """Tokenised stories, plus recall documents made up on the fly."""

    def __init__(self, tok, path, seed):
        self.tok, self.rng = tok, random.Random(seed)
        self.eot = tok.token_to_id(EOT)
        self.cache = {}
        stories = [s.strip() for s in Path(path).read_text(encoding="utf-8").split(EOT)]
        self.stories = []  # each: a list of sentences (token lists)
        self.sentences = []  # all of them in a row, "\n\n" between stories
        for s in filter(None, stories):
            parts = [p for p in SENTENCE.split(s) if p]
            self.stories.append([e.ids for e in tok.encode_batch(parts)])
            self.sentences += [tok.encode("\n\n" + parts[0]).ids] + self.stories[-1][1:]
        self.order, self.buf, self.served = [], [], 0

    def ids(self, text):
        """Token ids of a short text, remembered."""
        if text not in self.cache:
            if len(self.cache) > 200_000:
                self.cache.clear()
            self.cache[text] = self.tok.encode(text).ids
        return self.cache[text]

    # ---- plain stories: every story once per epoch, in a fresh order ---------
    def story_tokens(self, n):
        """The next n story tokens and their loss weights."""
        out = []
        while len(out) < n:
            if not self.order:
                self.order = list(range(len(self.stories)))
                self.rng.shuffle(self.order)
            if not self.buf:
                self.buf = [t for c in self.stories[self.order.pop()] for t in c] + [self.eot]
            take = self.buf[: n - len(out)]
            self.buf = self.buf[len(take) :]
            out += take
        self.served += n
        return out, [1.0] * n

    def filler(self, n):
        """About n tokens of running story text, as sentences."""
        if n <= 0:
            return []
        i = self.rng.randrange(len(self.sentences))
        out, have = [], 0
        while have < n:
            c = self.sentences[i % len(self.sentences)]
            out.append(c)
            have += len(c)
            i += 1
        return out[:-1] if len(out) > 1 else out

    # ---- a document with hidden facts, asked for at its end ------------------
    def recall_doc(self, length, k=None, digits_only=False, depth=None):
        """Tokens, per-token loss weights, and [(start, end)] of the answers."""
        rng = self.rng
        if k is None:
            k = rng.choice([1, 2, 2, 3, 3, 4, 5, 6])
        k = max(1, min(k, length // 34))
        used, facts = set(), []
        for _ in range(k):
            facts.append(random_fact(rng, used, digits_only))
        body = self.filler(length - 34 * k - 4)
        where = sorted(rng.randint(0, len(body)) for _ in facts)
        if depth is not None:  # evaluation: put the asked one there
            where[0] = round(depth * len(body))
        toks, w = [], []

        def put(ids, weight):
            toks.extend(ids)
            w.extend([weight] * len(ids))

        slots = {}
        for at, f in zip(where, facts):
            slots.setdefault(at, []).append(f)
        for i in range(len(body) + 1):
            for name, attr, val in slots.get(i, ()):
                lead = " " if toks else ""
                head, tail = rng.choice(FACTS).format(name=name, attr=attr, val="\0").split("\0")
                put(self.ids(lead + head), 1.0)
                put(self.ids(val), 0.1)  # pure chance: hardly worth learning
                put(self.ids(tail), 1.0)
            if i < len(body):
                put(body[i], 1.0)
        asked = facts[:]
        if depth is None:
            rng.shuffle(asked)
        else:
            asked = asked[:1]
        spans = []
        for j, (name, attr, val) in enumerate(asked):
            head, tail = rng.choice(ASKS).format(name=name, attr=attr, val="\0").split("\0")
            put(self.ids(("\n\n" if j == 0 else "\n") + head), 1.0)
            spans.append((len(toks), len(toks) + len(self.ids(val))))
            put(self.ids(val), 4.0)
            put(self.ids(tail), 1.0)
        put([self.eot], 1.0)
        return toks, w, spans

    # ---- a passage (or a row of random tokens) and its verbatim repetition ---
    def repeat_doc(self, length):
        """Tokens and per-token loss weights."""
        rng = self.rng
        n = max(8, min(rng.randint(12, 160), (length - 8) // 2))
        if rng.random() < 0.4:
            n = min(n, 48)
            span = [rng.randrange(256, self.tok.get_vocab_size()) for _ in range(n)]
            first = 0.05
        else:
            span, first = [t for c in self.filler(n + 40) for t in c][:n], 1.0
        toks, w = list(span), [first] * n
        again = self.ids("\n\nAgain:\n\n")
        for _ in range(rng.choice([1, 1, 2])):
            if len(toks) + len(again) + n > length - 1:
                break
            toks += again + span
            w += [1.0] * len(again) + [0.3] + [1.5] * (n - 1)
        return toks + [self.eot], w + [1.0]

    def recall_tokens(self, n, copying):
        """n tokens of recall documents, topped up with story text, and their loss weights."""
        out, w = [], []
        while len(out) < n:
            room = n - len(out)
            if room < 96:
                t, v = self.story_tokens(room)
            elif self.rng.random() < copying:
                t, v = self.repeat_doc(room)
            else:
                # lengths from "facts only" to "the whole window", evenly in log
                length = int(math.exp(self.rng.uniform(math.log(64), math.log(room + 1))))
                if self.rng.random() < 0.35:
                    length = room
                t, v, _ = self.recall_doc(length)
            out += t
            w += v
        return out[:n], w[:n]

    def batch(self, s, b, share, copying):
        """Tokens and loss weights, both [b, s + 1]."""
        x, w = [], []
        for _ in range(b):
            if self.rng.random() < share:
                t, v = self.recall_tokens(s + 1, copying)
            else:
                t, v = self.story_tokens(s + 1)
            x.append(t)
            w.append(v)
        return np.asarray(x, np.int64), np.asarray(w, np.float32)


# --------------------------------------------------------------------------
# Tokenizer
# --------------------------------------------------------------------------
def cmd_tokenizer(args):
    """train.txt -> tokenizer.json: a byte-level BPE that knows the recall templates too"""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    rng = random.Random(args.seed)
    made = []
    for _ in range(6000):
        name, attr, val = random_fact(rng, set())
        made.append(rng.choice(FACTS).format(name=name, attr=attr, val=val))
        made.append(rng.choice(ASKS).format(name=name, attr=attr, val=val))
    stories = (args.run / "train.txt").read_text(encoding="utf-8").split(EOT)
    tok.train_from_iterator(
        [s.strip() for s in stories] + made,
        trainers.BpeTrainer(
            vocab_size=CONFIG["vocab_size"],
            special_tokens=[EOT],
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        ),
    )
    tok.save(str(args.run / "tokenizer.json"))
    sample = stories[:500]
    n_tokens = sum(len(e.ids) for e in tok.encode_batch(sample))
    print(f"vocabulary {tok.get_vocab_size()}, {sum(map(len, sample)) / n_tokens:.2f} characters per token")


# --------------------------------------------------------------------------
# Model: the same mathematics as mlx_lm/models/qwen3.py, same parameter names
# --------------------------------------------------------------------------
def build(cfg, seed):
    """The language model, initialised from the seed; ids [B, S] -> logits [B, S, vocab_size]."""
    import torch
    import torch.nn as nn
    import torch.nn.functional as F

    class RMSNorm(nn.Module):
        def __init__(self, n):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(n))

        def forward(self, x):
            y = x.float()
            y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + cfg["rms_norm_eps"])
            return (y * self.weight).to(x.dtype)

    def rope(x, cos, sin):  # rotate-half, x: (B, H, S, D)
        a, b = x.float().chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            h, d = cfg["hidden_size"], cfg["head_dim"]
            self.nq, self.nkv, self.d = cfg["num_attention_heads"], cfg["num_key_value_heads"], d
            self.q_proj = nn.Linear(h, self.nq * d, bias=False)
            self.k_proj = nn.Linear(h, self.nkv * d, bias=False)
            self.v_proj = nn.Linear(h, self.nkv * d, bias=False)
            self.o_proj = nn.Linear(self.nq * d, h, bias=False)
            self.q_norm, self.k_norm = RMSNorm(d), RMSNorm(d)

        def forward(self, x, cos, sin):
            B, S, _ = x.shape
            q = self.q_norm(self.q_proj(x).view(B, S, self.nq, self.d)).transpose(1, 2)
            k = self.k_norm(self.k_proj(x).view(B, S, self.nkv, self.d)).transpose(1, 2)
            v = self.v_proj(x).view(B, S, self.nkv, self.d).transpose(1, 2)
            q, k = rope(q, cos, sin), rope(k, cos, sin)
            r = self.nq // self.nkv
            k = k[:, :, None].expand(B, self.nkv, r, S, self.d).reshape(B, self.nq, S, self.d)
            v = v[:, :, None].expand(B, self.nkv, r, S, self.d).reshape(B, self.nq, S, self.d)
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.o_proj(o.transpose(1, 2).reshape(B, S, -1))

    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            h, i = cfg["hidden_size"], cfg["intermediate_size"]
            self.gate_proj = nn.Linear(h, i, bias=False)
            self.up_proj = nn.Linear(h, i, bias=False)
            self.down_proj = nn.Linear(i, h, bias=False)

        def forward(self, x):
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.self_attn, self.mlp = Attention(), MLP()
            self.input_layernorm = RMSNorm(cfg["hidden_size"])
            self.post_attention_layernorm = RMSNorm(cfg["hidden_size"])

        def forward(self, x, cos, sin):
            x = x + self.self_attn(self.input_layernorm(x), cos, sin)
            return x + self.mlp(self.post_attention_layernorm(x))

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed_tokens = nn.Embedding(cfg["vocab_size"], cfg["hidden_size"])
            self.layers = nn.ModuleList(Block() for _ in range(cfg["num_hidden_layers"]))
            self.norm = RMSNorm(cfg["hidden_size"])

    class LM(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Inner()
            d = cfg["head_dim"]
            freq = cfg["rope_theta"] ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
            ang = torch.arange(cfg["max_position_embeddings"], dtype=torch.float64)[:, None] * freq
            self.register_buffer("cos", ang.cos().float(), persistent=False)
            self.register_buffer("sin", ang.sin().float(), persistent=False)

        def forward(self, ids):
            S = ids.shape[1]
            x = self.model.embed_tokens(ids)
            for layer in self.model.layers:
                x = layer(x, self.cos[:S], self.sin[:S])
            return F.linear(self.model.norm(x), self.model.embed_tokens.weight)

    torch.manual_seed(seed)
    net = LM()
    deep = 0.02 / math.sqrt(2 * cfg["num_hidden_layers"])
    for name, p in net.named_parameters():
        if p.ndim == 2:
            std = deep if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            if "embed" not in name:
                std *= math.sqrt(768 / cfg["hidden_size"])  # the usual 0.02 is for width 768
            nn.init.normal_(p, std=std)
    return net


def weighted_loss(net, x, w):
    """Mean cross-entropy of the next token.  x: [B, S + 1] tokens, w: [B, S + 1] loss weights."""
    import torch.nn.functional as F

    logits = net(x[:, :-1]).float()
    per_token = F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten(), reduction="none")
    w = w[:, 1:].flatten()
    return (per_token * w).sum() / w.sum()


def autocast(float32):
    """bf16 autocast, as the shipped model was trained; a no-op for `--float32`."""
    import torch

    return torch.autocast("cpu", torch.bfloat16, enabled=not float32)


# --------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------
class Evaluator:
    """Held-out story loss, and exact recall of 4 digits, by teacher forcing."""

    def __init__(self, tok, path, n_docs=20):
        import torch

        data = Data(tok, path, seed=12345)
        self.story = torch.tensor(np.asarray([data.story_tokens(513)[0] for _ in range(32)]))
        self.needles = {}
        for s in (256, 512, 1024, 2048):
            x, ends = torch.zeros((n_docs, s), dtype=torch.long), []
            for i in range(n_docs):
                t, _, spans = data.recall_doc(s, k=3, digits_only=True, depth=(i + 0.5) / n_docs)
                t = t[: spans[0][1]]
                x[i, : len(t)] = torch.tensor(t)  # padding on the right: causally invisible
                ends.append(len(t))
            self.needles[s] = x, ends

    def __call__(self, net, lengths, float32):
        """{"val": loss, "needle256": (share of documents, share of digits), ...}"""
        import torch
        import torch.nn.functional as F

        out = {}
        with torch.no_grad(), autocast(float32):
            total = 0.0
            for i in range(0, len(self.story), 8):
                x = self.story[i : i + 8]
                logits = net(x[:, :-1]).float()
                total += F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten()).item() * len(x)
            out["val"] = round(total / len(self.story), 4)
            for s in lengths:
                x, ends = self.needles[s]
                exact = digits = 0
                for i in range(0, len(x), 4):
                    guess = net(x[i : i + 4]).argmax(-1)
                    for j, e in enumerate(ends[i : i + 4]):
                        hit = guess[j, e - 5 : e - 1] == x[i + j, e - 4 : e]
                        exact += bool(hit.all())
                        digits += int(hit.sum())
                out[f"needle{s}"] = (round(exact / len(x), 2), round(digits / (4 * len(x)), 2))
        return out


def phase(p, copies):
    """(sequence length, sequences, recall share, copying share) at share p of the run."""
    if not copies and p < 0.6:
        return COPY_FIRST
    return next((rest for until, *rest in PHASES if p < until), PHASES[-1][1:])


def cmd_train(args):
    """train.txt, valid.txt, tokenizer.json -> checkpoint.pt, config.json, log.jsonl"""
    import torch
    from tokenizers import Tokenizer

    if args.threads:
        torch.set_num_threads(args.threads)
    tok = Tokenizer.from_file(str(args.run / "tokenizer.json"))
    cfg = dict(CONFIG, vocab_size=tok.get_vocab_size())
    (args.run / "config.json").write_text(json.dumps(cfg, indent=2) + "\n")
    data = Data(tok, args.run / "train.txt", args.seed)
    evaluate = Evaluator(tok, args.run / "valid.txt")
    net = build(cfg, args.seed)
    matrices = [p for p in net.parameters() if p.ndim == 2]
    rest = [p for p in net.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    opt = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8, fused=True)
    n_story = sum(len(c) for s in data.stories for c in s)
    print(f"parameters {sum(p.numel() for p in net.parameters()):,}  story tokens {n_story:,}", flush=True)

    log = open(args.run / "log.jsonl", "w", encoding="utf-8")

    def report(row):
        print(json.dumps(row), flush=True)
        log.write(json.dumps(row) + "\n")
        log.flush()

    begin = time.time()
    step = tokens = evaluated = 0
    copies, ema = False, None
    while True:
        p = step / args.steps if args.steps else (time.time() - begin) / (60 * args.minutes)
        if p >= 1:
            break
        s, b, share, copying = phase(p, copies)
        warm = min(1.0, (step + 1) / WARMUP_STEPS)
        lr = LEARNING_RATE * warm * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * p)))
        for group in opt.param_groups:
            group["lr"] = lr
        x, w = map(torch.from_numpy, data.batch(s, b, share, copying))
        with autocast(args.float32):
            loss = weighted_loss(net, x, w)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        step += 1
        tokens += b * s
        ema = loss.item() if ema is None else 0.98 * ema + 0.02 * loss.item()
        due = int(p * EVALUATIONS) > evaluated
        if due or step <= 3:
            minutes = round((time.time() - begin) / 60, 2)
            row = {
                "step": step,
                "p": round(p, 3),
                "tokens": tokens,
                "minutes": minutes,
                "seq": s,
                "lr": round(lr, 6),
                "loss": round(ema, 4),
                "norm": round(float(norm), 2),
                "epochs": round(data.served / n_story, 2),
            }
            if due:
                evaluated = int(p * EVALUATIONS)
                lengths = [256, 512] if p < 0.4 else [256, 1024] + ([2048] if p > 0.84 else [])
                row.update(evaluate(net, lengths, args.float32))
                copies = copies or row["needle256"][1] > 0.5
            report(row)
    torch.save(net.state_dict(), args.run / "checkpoint.pt")
    report(
        {
            "final": True,
            "steps": step,
            "tokens": tokens,
            "minutes": round((time.time() - begin) / 60, 1),
            **evaluate(net, [256, 512, 1024, 2048], args.float32),
        }
    )
    log.close()


# --------------------------------------------------------------------------
# Checkpoints
# --------------------------------------------------------------------------
def cmd_export(args):
    """checkpoint.pt -> bf16/: a folder that mlx_lm.load reads"""
    import torch
    from safetensors.torch import save_file

    to = args.run / "bf16"
    to.mkdir(exist_ok=True)
    cfg = json.loads((args.run / "config.json").read_text())
    weights = torch.load(args.run / "checkpoint.pt", map_location="cpu", weights_only=True)
    save_file(
        {k: v.to(torch.bfloat16).contiguous() for k, v in weights.items()},
        str(to / "model.safetensors"),
        metadata={"format": "pt"},
    )
    (to / "model.safetensors").chmod(0o644)
    shutil.copyfile(args.run / "tokenizer.json", to / "tokenizer.json")
    for name, content in {
        "config.json": cfg,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": EOT,
            "eos_token": EOT,
            "pad_token": EOT,
            "clean_up_tokenization_spaces": False,
            "model_max_length": cfg["max_position_embeddings"],
        },
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
    }.items():
        (to / name).write_text(json.dumps(content, indent=2) + "\n")
    print("wrote", to, sum(f.stat().st_size for f in to.iterdir()), "bytes")


def cmd_quantize(args):
    """bf16/ -> 8bit/: 8 bits in groups of 64, the five files the package ships"""
    from mlx_lm import convert

    source, to = args.run / "bf16", args.run / "8bit"
    to.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as tmp:
        converted = Path(tmp, "8bit")
        convert(str(source), str(converted), quantize=True, q_bits=8, q_group_size=64)
        for name in ("model.safetensors", "config.json"):
            shutil.copyfile(converted / name, to / name)
    # convert() rewrites these in the form of the installed transformers, which older ones cannot read
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(source / name, to / name)
    print("wrote", to, sum(f.stat().st_size for f in to.iterdir()), "bytes")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="STAGE")

    def stage(run):
        p = commands.add_parser(run.__name__.removeprefix("cmd_"), help=run.__doc__, description=run.__doc__)
        p.set_defaults(function=run)
        p.add_argument("--run", type=Path, default=Path("run"), help="working folder (default: run)")
        return p

    def seed(p):
        p.add_argument("--seed", type=int, default=0)

    prepare = stage(cmd_prepare)
    prepare.add_argument(
        "texts", type=Path, nargs="+", metavar="TEXT", help="TinyStories text; of two equal stories the first stays"
    )
    prepare.add_argument("--valid-chars", type=int, default=1_000_000, help="characters to hold out (default: 1000000)")
    seed(prepare)
    seed(stage(cmd_tokenizer))
    train = stage(cmd_train)
    budget = train.add_mutually_exclusive_group(required=True)
    budget.add_argument("--minutes", type=float, help="follow the wall clock; the shipped model: 55")
    budget.add_argument("--steps", type=int, help="follow the step count")
    train.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    train.add_argument("--float32", action="store_true", help="no bf16 autocast: faster on CPUs without bf16 units")
    seed(train)
    stage(cmd_export)
    stage(cmd_quantize)
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
