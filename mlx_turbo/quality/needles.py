"""Documents with facts to recall, and whether a model recalls them."""

import copy
import itertools
import random
import re
from typing import NamedTuple

import mlx.core as mx

# ---- needles -------------------------------------------------------------------------------------------------
# The wording on which the embedded model was trained (scripts/train_demo_model.py); any other model reads it too.
NAMES = (
    "Lily Tom Ben Anna Max Mia Sam Tim Lucy Jack Sara Timmy Sue Bob Amy Leo Emma Jane Billy Daisy Spot Bella "
    "Mark Joe Molly Fred Kate Nick Rose Kim Zoe Pete Ella Dan Ruby Luke Nina Finn Roxy Milo Ollie Polly Jim "
    "Sally Mary John Lola Buddy Rex Grace"
).split()
WHAT = ("secret number", "magic number", "lucky number", "door code")
FACTS = (
    " The {what} of {name} is {digits}.",
    " {name}'s {what} is {digits}.",
    " Remember, the {what} of {name} is {digits}.",
)
QUESTIONS = ("\n\nQuestion: What is the {what} of {name}? Answer:", "\n\nQuestion: What is {name}'s {what}? Answer:")
SENTENCE_END = re.compile(r"""(?<=[.!?])(?=\s)|(?<=[.!?]["'])(?=\s)|(?=\n)""")
LONGEST_PIECE = 64  # tokens; a text without sentences is cut into these


class Question(NamedTuple):
    """tokens: as asked after the document. number: the four digits to answer. depth: of the fact, 0 = start."""

    tokens: list
    number: str
    depth: float


class NeedleDocument(NamedTuple):
    """tokens: the text with its facts, without a question."""

    tokens: list
    questions: list


def needle_documents(text, tokenizer, length, n_documents=10, n_facts=10, seed=0):
    """Documents of sentences from `text` with n_facts facts hidden in each ("The secret number of Milo is 8 7 2 6."),
    and a question about each fact. The depths of all n_documents * n_facts facts are spread evenly over 0..1.

    length: tokens of a document with a question. The same arguments give the same documents.

    Raises ValueError for a text without tokens, too many facts, or a length that has no room for them.
    """

    def encode(piece):
        return tokenizer.encode(piece, add_special_tokens=False)

    rng = random.Random(f"{seed} {length}")
    pieces, ids = [p for p in SENTENCE_END.split(text) if p.strip()], {}
    if n_facts > len(NAMES) * len(WHAT):
        raise ValueError(f"n_facts: got {n_facts}, at most {len(NAMES) * len(WHAT)} have names of their own")
    if not pieces:
        raise ValueError("text: there is none to hide facts in")
    out, start = [], tokenizer.encode("")  # a model that wants one has its first token there
    for i in range(n_documents):
        pairs = rng.sample([(name, what) for name in NAMES for what in WHAT], n_facts)
        numbers = ["".join(rng.choices("0123456789", k=4)) for _ in pairs]
        facts = [
            encode(rng.choice(FACTS).format(name=name, what=what, digits=" ".join(number)))
            for (name, what), number in zip(pairs, numbers)
        ]
        asked = [encode(rng.choice(QUESTIONS).format(name=name, what=what)) for name, what in pairs]
        depths = [(j + (i + 0.5) / n_documents) / n_facts for j in range(n_facts)]
        n_filler = length - len(start) - sum(map(len, facts)) - max(map(len, asked))
        if n_filler < n_facts:
            raise ValueError(f"length: got {length}, too short for {n_facts} facts and a question")
        filler, at = [], rng.randrange(len(pieces))
        while sum(map(len, filler)) < n_filler:
            at %= len(pieces)
            if at not in ids:
                ids[at] = encode(pieces[at])
            filler += [ids[at][k : k + LONGEST_PIECE] for k in range(0, len(ids[at]), LONGEST_PIECE)]
            at += 1
        filler[-1] = filler[-1][: len(filler[-1]) - (sum(map(len, filler)) - n_filler)]
        boundaries = [0, *itertools.accumulate(map(len, filler))]
        where = [min(range(len(boundaries)), key=lambda k: abs(boundaries[k] - depth * n_filler)) for depth in depths]
        tokens = list(start)
        for k, piece in enumerate([*filler, []]):
            for fact, place in zip(facts, where):
                tokens += fact if place == k else []
            tokens += piece
        out.append(NeedleDocument(tokens, [Question(*q) for q in zip(asked, numbers, depths)]))
    return out


def recalls(model, tokenizer, document, make_cache, chunk=128, max_tokens=32, progress=None):
    """Whether the model answers each question about a document, a list of bool.

    The document passes through the cache in chunks, so that it is packed as it would be; then each question is asked
    after a copy of that cache and answered greedily. Right is an answer whose first digits are the number.
    """
    cache = make_cache()
    for start in range(0, len(document.tokens), chunk):
        piece = mx.array(document.tokens[start : start + chunk])
        mx.eval(model(piece[None], cache=cache))
        if progress:
            progress(piece.size)
    out = []
    for question in document.questions:
        used, tokens, digits = copy.deepcopy(cache), [], ""
        logits = model(mx.array(question.tokens)[None], cache=used)
        while len(tokens) < max_tokens and len(digits) < len(question.number):
            tokens.append(logits[0, -1].argmax().item())
            if tokens[-1] in tokenizer.eos_token_ids:
                break
            digits = re.sub(r"\D", "", tokenizer.decode(tokens))
            if len(digits) < len(question.number):
                logits = model(mx.array(tokens[-1:])[None], cache=used)
        out.append(digits.startswith(question.number))
    return out
