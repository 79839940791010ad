"""Documents with hidden facts, and whether a model recalls them."""

import itertools
import random
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from .answers import answer, read

# ---- needles -------------------------------------------------------------------------------------------------
# The wording that the embedded model was trained on (scripts/train_demo_model.py); other models understand it too.
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
N_DIGITS = 4  # of a number to recall
LONGEST_PIECE = 64  # tokens; longer sentences, or a text without any, are cut into pieces of this size


class Question(NamedTuple):
    """tokens: of the question, which follow the document. number: the four digits to answer. depth: of the fact, 0 is
    the start of the document."""

    tokens: list[int]
    number: str
    depth: float


class NeedleDocument(NamedTuple):
    """tokens: the text with its facts, without a question."""

    tokens: list[int]
    questions: list[Question]


def needle_documents(
    text: str, tokenizer: Any, length: int, n_documents: int = 10, n_facts: int = 10, seed: int = 0
) -> list[NeedleDocument]:
    """Documents of sentences from `text` with n_facts facts hidden in each ("The secret number of Milo is 8 7 2 6."),
    and a question about each fact. The depths of all n_documents * n_facts facts are spread evenly over 0..1.

    length: tokens of a document including a question. The same arguments give the same documents.

    Raises ValueError for an empty text, too many facts, or a length too short for them.
    """

    def encode(piece: str) -> list[int]:
        return tokenizer.encode(piece, add_special_tokens=False)

    rng = random.Random(f"{seed} {length}")
    pieces = [p for p in SENTENCE_END.split(text) if p.strip()]
    ids: dict[int, list[int]] = {}
    if n_facts > len(NAMES) * len(WHAT):
        raise ValueError(f"n_facts: got {n_facts}, at most {len(NAMES) * len(WHAT)} different ones exist")
    if not pieces:
        raise ValueError("text: it is empty, so there is nothing to hide facts in")
    out, start = [], tokenizer.encode("")  # the first token, for models that need one
    for i in range(n_documents):
        pairs = rng.sample([(name, what) for name in NAMES for what in WHAT], n_facts)
        numbers = ["".join(rng.choices("0123456789", k=N_DIGITS)) for _ in pairs]
        facts = [
            encode(rng.choice(FACTS).format(name=name, what=what, digits=" ".join(number)))
            for (name, what), number in zip(pairs, numbers)
        ]
        asked = [encode(rng.choice(QUESTIONS).format(name=name, what=what)) for name, what in pairs]
        depths = [(j + (i + 0.5) / n_documents) / n_facts for j in range(n_facts)]
        n_filler = length - len(start) - sum(map(len, facts)) - max(map(len, asked))
        if n_filler < n_facts:
            raise ValueError(f"length: got {length}, too short for {n_facts} facts and a question")
        filler = _filler(pieces, encode, ids, n_filler, rng.randrange(len(pieces)))
        tokens = start + _with_facts(filler, facts, depths)
        out.append(NeedleDocument(tokens, [Question(*q) for q in zip(asked, numbers, depths)]))
    return out


def _filler(
    pieces: list[str], encode: Callable[[str], list[int]], ids: dict[int, list[int]], n_tokens: int, at: int
) -> list[list[int]]:
    """n_tokens tokens of text from piece `at` on, by sentence. ids: what was encoded before, by piece."""
    filler: list[list[int]] = []
    while sum(map(len, filler)) < n_tokens:
        at %= len(pieces)
        if at not in ids:
            ids[at] = encode(pieces[at])
        filler += [ids[at][k : k + LONGEST_PIECE] for k in range(0, len(ids[at]), LONGEST_PIECE)]
        at += 1
    filler[-1] = filler[-1][: len(filler[-1]) - (sum(map(len, filler)) - n_tokens)]
    return filler


def _with_facts(filler: list[list[int]], facts: list[list[int]], depths: list[float]) -> list[int]:
    """The tokens of the filler with each fact at the sentence boundary nearest to its depth."""
    boundaries = [0, *itertools.accumulate(map(len, filler))]
    where = [min(range(len(boundaries)), key=lambda k: abs(boundaries[k] - depth * boundaries[-1])) for depth in depths]
    tokens: list[int] = []
    for k, piece in enumerate([*filler, []]):
        for fact, place in zip(facts, where):
            tokens += fact if place == k else []
        tokens += piece
    return tokens


def recalls(
    model: Any,
    tokenizer: Any,
    document: NeedleDocument,
    make_cache: Callable[[], list[Any]],
    chunk: int = 128,
    max_tokens: int = 32,
    progress: Callable[[int], Any] | None = None,
) -> list[bool]:
    """Whether the model answers each question about a document correctly.

    The document passes through the cache in chunks, so that it is packed as in real use. Then each question is asked
    with a copy of that cache and answered greedily. An answer is correct if its first digits are the number.
    """

    def digits(text: str) -> str:
        return re.sub(r"\D", "", text)

    def is_complete(text: str) -> bool:
        return len(digits(text)) >= N_DIGITS

    cache, out = make_cache(), []
    read(model, document.tokens, cache, chunk, progress)
    for question in document.questions:
        text = answer(model, tokenizer, cache, question.tokens, max_tokens, is_complete)
        out.append(digits(text).startswith(question.number))
    return out
