"""Calls of functions whose schemas stand in the context: whether a model answers a request with valid JSON, the right
function and the right arguments.

The schemas come first and a text follows, so that they are read back from the packed cache. Each function's name ends
in random digits, which nothing but the context tells.
"""

import json
import random
from collections.abc import Callable
from typing import Any, NamedTuple

from .answers import answer, read

CITIES = ("Paris", "Tokyo", "Lima", "Oslo", "Cairo", "Boston", "Madrid", "Seoul", "Dublin", "Quito")
PEOPLE = ("Maria", "Tom", "Aisha", "Chen", "Olga", "Pedro", "Lucy", "Ben", "Nora", "Ivan")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
CURRENCIES = ("USD", "EUR", "JPY", "GBP", "CHF", "SEK", "CAD", "AUD")
ARTISTS = ("Mozart", "Adele", "Queen", "Bach", "Coldplay", "Nirvana", "Shakira", "Chopin")

# name: (description, {parameter: its values, or (least, greatest) of an integer}, request)
Parameters = dict[str, Any]
FUNCTIONS: dict[str, tuple[str, Parameters, str]] = {
    "get_weather": (
        "Weather forecast of a city.",
        {"city": CITIES, "days": (2, 14), "unit": ["celsius", "fahrenheit"]},
        "What will the weather in {city} be over the next {days} days, in {unit}?",
    ),
    "convert_currency": (
        "Convert an amount of money.",
        {"amount": (10, 990), "source": CURRENCIES[:4], "target": CURRENCIES[4:]},
        "How much are {amount} {source} in {target}?",
    ),
    "send_message": (
        "Send a message to a person.",
        {"recipient": PEOPLE, "channel": ["email", "sms", "chat"], "urgent": ["yes", "no"]},
        "Send {recipient} a message by {channel}; urgent: {urgent}.",
    ),
    "book_table": (
        "Book a table in a restaurant.",
        {"city": CITIES, "guests": (2, 12), "day": DAYS},
        "Book a table for {guests} guests in {city} on {day}.",
    ),
    "set_alarm": (
        "Set an alarm.",
        {"hour": (0, 23), "minute": (1, 59), "day": DAYS},
        "Set an alarm on {day} with hour {hour} and minute {minute}.",
    ),
    "play_music": (
        "Play an artist's music.",
        {"artist": ARTISTS, "volume": (1, 99), "shuffle": ["on", "off"]},
        "Play {artist} at volume {volume} with shuffle {shuffle}.",
    ),
    "book_flight": (
        "Book a flight.",
        {"origin": CITIES[:5], "destination": CITIES[5:], "day": DAYS, "seats": (1, 9)},
        "Book {seats} seats on a flight from {origin} to {destination} on {day}.",
    ),
    "create_ticket": (
        "Create a ticket for a problem.",
        {"assignee": PEOPLE, "priority": ["low", "medium", "high"], "number": (100, 999)},
        "Create ticket number {number} for {assignee} with priority {priority}.",
    ),
}
EXAMPLE = "get_time", "Time of day in a city.", {"city": CITIES}, "What time is it in Rome?", {"city": "Rome"}
SYSTEM = """\
You call functions. These are their schemas:
{schemas}
Answer a request with one JSON object, with the name and all arguments of one function, and nothing else.
Example. Request: {request} Answer: {call}"""
USER = "These notes do not matter for the request:\n{filler}\n\nRequest: {request}"
PREFILL = '{"name": "'  # how each answer begins: without it, small models talk about the request
FILLER, REQUEST = "@@FILLER@@", "@@REQUEST@@"  # places in the chat template's text
MAX_TOKENS = 96  # of an answer; the longest right one takes about 50


class Request(NamedTuple):
    """tokens: of the request and PREFILL, which follow the document. name, arguments: the right call."""

    tokens: list[int]
    name: str
    arguments: dict[str, Any]


class ToolDocument(NamedTuple):
    """tokens: schemas and text, without a request."""

    tokens: list[int]
    requests: list[Request]


class Grade(NamedTuple):
    """What an answer got right; each implies those before it. text: the answer."""

    valid: bool
    function: bool
    arguments: bool
    text: str


def is_integer(values: Any) -> bool:
    """Whether a parameter in FUNCTIONS is (least, greatest) of an integer."""
    return isinstance(values[0], int)


def schema(name: str, description: str, parameters: Parameters) -> dict[str, Any]:
    """A function's JSON schema, as in OpenAI's API. Only lists, not tuples, of values become an enum."""
    properties = {
        parameter: {"type": "integer"}
        if is_integer(values)
        else {"type": "string"} | ({"enum": values} if isinstance(values, list) else {})
        for parameter, values in parameters.items()
    }
    return {
        "name": name,
        "description": description,
        "parameters": {"type": "object", "properties": properties, "required": list(parameters)},
    }


def tool_documents(text: str, tokenizer: Any, length: int, n_documents: int = 3, seed: int = 0) -> list[ToolDocument]:
    """Documents of schemas and a part of `text`, and a request for each function in FUNCTIONS.

    length: tokens of a document including a request. The same arguments give the same documents.

    Raises ValueError for a tokenizer without a chat template, an empty text, or a length too short for the schemas.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("tokenizer: it has no chat template; function calls need a model that follows instructions")
    filler = tokenizer.encode(text[: 20 * length * n_documents], add_special_tokens=False)
    if not filler:
        raise ValueError("text: it is empty, so nothing can stand between the schemas and a request")
    rng, out = random.Random(f"{seed} {length}"), []
    for i in range(n_documents):
        names = {name: f"{name}_{rng.randrange(100, 1000)}" for name in (*FUNCTIONS, EXAMPLE[0])}
        asked = []
        for name, (_, parameters, request) in FUNCTIONS.items():
            drawn = {p: rng.randint(*v) if is_integer(v) else rng.choice(v) for p, v in parameters.items()}
            asked.append((request.format(**drawn), names[name], drawn))
        before, between, after = _template(tokenizer, names, rng)
        requests = [Request(_encode(tokenizer, r + after + PREFILL), name, arguments) for r, name, arguments in asked]
        n_filler = length - len(before) - len(between) - max(len(r.tokens) for r in requests)
        if n_filler < 1:
            raise ValueError(f"length: got {length}, the schemas and a request alone take {length - n_filler} tokens")
        start = i * n_filler % len(filler)
        repeated = (filler * (1 + (start + n_filler) // len(filler)))[start : start + n_filler]
        out.append(ToolDocument(before + repeated + between, requests))
    return out


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def _template(tokenizer: Any, names: dict[str, str], rng: random.Random) -> tuple[list[int], list[int], str]:
    """The chat before the filler and between it and the request as tokens, and what follows the request as text."""
    example, description, parameters, request, arguments = EXAMPLE
    functions = {name: FUNCTIONS[name][:2] for name in rng.sample(list(FUNCTIONS), len(FUNCTIONS))}
    functions[example] = description, parameters
    system = SYSTEM.format(
        schemas="\n".join(json.dumps(schema(names[name], *rest)) for name, rest in functions.items()),
        request=request,
        call=json.dumps({"name": names[example], "arguments": arguments}),
    )
    user = USER.format(filler=FILLER, request=REQUEST)
    chat = tokenizer.apply_chat_template(
        [{"role": "system", "content": system}, {"role": "user", "content": user}],
        tokenize=False,
        add_generation_prompt=True,
    )
    before, _, rest = chat.partition(FILLER)
    between, _, after = rest.partition(REQUEST)
    return _encode(tokenizer, before), _encode(tokenizer, between), after


def first_json(text: str) -> Any:
    """The first JSON object in a text, or None if there is no whole one."""
    start = text.find("{")
    try:
        return json.JSONDecoder().raw_decode(text, start)[0] if start >= 0 else None
    except json.JSONDecodeError:
        return None


def grade(text: str, name: str, arguments: dict[str, Any]) -> Grade:
    """What an answer got right. valid: its first JSON object has a "name" and an object of "arguments". Strings are
    compared without case, integers must be integers."""
    call = first_json(text)
    valid = isinstance(call, dict) and isinstance(call.get("name"), str) and isinstance(call.get("arguments"), dict)
    if not valid:
        return Grade(False, False, False, text)
    function = call["name"] == name
    given = {key: value.casefold() if isinstance(value, str) else value for key, value in call["arguments"].items()}
    right = {key: value.casefold() if isinstance(value, str) else value for key, value in arguments.items()}
    same_types = all(type(given.get(key)) is type(value) for key, value in right.items())
    return Grade(True, function, function and given == right and same_types, text)


def tool_calls(
    model: Any,
    tokenizer: Any,
    document: ToolDocument,
    make_cache: Callable[[], list[Any]],
    chunk: int = 128,
    progress: Callable[[int], Any] | None = None,
) -> list[Grade]:
    """How the model answers each request of a document, greedily, with a copy of the cache that the document passed
    through in chunks."""

    def is_complete(text: str) -> bool:
        return first_json(PREFILL + text) is not None

    cache, out = make_cache(), []
    read(model, document.tokens, cache, chunk, progress)
    for request in document.requests:
        text = answer(model, tokenizer, cache, request.tokens, MAX_TOKENS, is_complete)
        out.append(grade(PREFILL + text, request.name, request.arguments))
    return out
