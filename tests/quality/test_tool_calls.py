"""Function calls: the documents, the grades, and that a cache that forgets the schemas shows."""

import json
import re
import types

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_turbo.cli import eval as evaluate
from mlx_turbo.quality import tool_calls
from mlx_turbo.quality.tool_calls import FUNCTIONS, Grade, first_json, grade, tool_documents

TEXT = "The river was wide. Nobody knew its name. " * 50
LENGTH = 4000  # characters: the tokens of `Characters`


class Characters:
    """A tokenizer with a token per character, and a chat template."""

    chat_template = "yes"
    eos_token_ids = {0}

    def encode(self, text, add_special_tokens=True):
        return list(map(ord, text))

    def decode(self, tokens):
        return "".join(map(chr, tokens))

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        return "".join(f"[{m['role']}]{m['content']}" for m in messages) + "[assistant]"


class Memory:
    """A cache that holds the newest characters of the text."""

    def __init__(self, size=10_000):
        self.text, self.size = "", size


class Reader:
    """Answers a request by looking up the function's name, wherever the text that its cache holds has it."""

    def __call__(self, tokens, cache):
        (memory,) = cache
        memory.text = (memory.text + "".join(map(chr, tokens[0].tolist())))[-memory.size :]
        _, asked, written = memory.text.rpartition("[assistant]")
        target = (self.answer(memory.text) + "\0")[len(written)] if asked else " "
        return mx.arange(128)[None, None] == ord(target)

    def answer(self, text):
        request = text.rpartition("Request: ")[2].partition("[assistant]")[0]
        for name, (_, parameters, template) in FUNCTIONS.items():
            pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\w+)", re.escape(template))
            if match := re.fullmatch(pattern, request):
                found = re.search(rf'"name": "({name}_\d+)"', text)
                arguments = {
                    p: int(match[p]) if tool_calls.is_integer(values) else match[p] for p, values in parameters.items()
                }
                return json.dumps({"name": found[1] if found else name, "arguments": arguments})
        raise AssertionError(f"no function for {request!r}")


@pytest.fixture
def long_answers(monkeypatch):
    """Room for answers in characters."""
    monkeypatch.setattr(tool_calls, "MAX_TOKENS", 300)


# ---- documents -----------------------------------------------------------------------------------------------
def test_a_document_has_every_schema_and_a_request_ends_the_chat():
    documents = tool_documents(TEXT, Characters(), LENGTH, 2)
    assert (
        documents == tool_documents(TEXT, Characters(), LENGTH, 2) != tool_documents(TEXT, Characters(), LENGTH, 2, 1)
    )
    for document in documents:
        text = Characters().decode(document.tokens)
        schemas = [
            json.loads(line) for line in text.splitlines() if line.startswith('{"name": ') and "properties" in line
        ]
        assert len(schemas) == len(FUNCTIONS) + 1 and len(document.requests) == len(FUNCTIONS)
        assert len(document.tokens) + max(len(r.tokens) for r in document.requests) == LENGTH
        assert text.index("river") > text.index("schemas")
        by_name = {schema["name"]: schema["parameters"] for schema in schemas}
        for request in document.requests:
            asked = Characters().decode(request.tokens)
            assert asked.endswith("[assistant]" + tool_calls.PREFILL) and request.name not in asked
            properties = by_name[request.name]["properties"]
            assert list(properties) == by_name[request.name]["required"] == list(request.arguments)
            for key, value in request.arguments.items():
                assert re.search(rf"\b{value}\b", asked)
                assert isinstance(value, int if properties[key]["type"] == "integer" else str)
                assert value in properties[key].get("enum", [value])
    assert {r.name for r in documents[0].requests}.isdisjoint({r.name for r in documents[1].requests})


def test_what_has_no_room_no_text_or_no_template_is_refused():
    with pytest.raises(ValueError, match=r"length: got 500, the schemas and a request alone take \d{4} tokens"):
        tool_documents(TEXT, Characters(), 500)
    with pytest.raises(ValueError, match="text: it is empty"):
        tool_documents("", Characters(), LENGTH)
    with pytest.raises(ValueError, match="tokenizer: it has no chat template"):
        tool_documents(TEXT, types.SimpleNamespace(chat_template=None), LENGTH)


# ---- grades --------------------------------------------------------------------------------------------------
VALUES = st.one_of(st.integers(-99, 99), st.text(min_size=1, max_size=8))
ARGUMENTS = st.dictionaries(st.text("abc", min_size=1, max_size=3), VALUES, min_size=1, max_size=4)
NAMES = st.text("abcdef_", min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(NAMES, ARGUMENTS, st.text("abc :\n`", max_size=9), st.sampled_from([None, 1, 4]), st.booleans())
def test_a_right_call_is_right_in_any_layout(name, arguments, around, indent, casefold):
    given = {
        k: v.upper() if casefold and isinstance(v, str) and v.upper().casefold() == v.casefold() else v
        for k, v in arguments.items()
    }
    text = around + json.dumps({"arguments": given, "name": name}, indent=indent) + around + "{"
    assert grade(text, name, arguments) == Grade(True, True, True, text)


@settings(max_examples=100, deadline=None)
@given(NAMES, ARGUMENTS, st.data())
def test_each_fault_costs_its_grade(name, arguments, data):
    key = data.draw(st.sampled_from(sorted(arguments)))
    other = data.draw(VALUES.filter(lambda v: str(v).casefold() != str(arguments[key]).casefold()))
    as_text = str(arguments[key]) if isinstance(arguments[key], int) else [arguments[key]]
    less = {k: v for k, v in arguments.items() if k != key}
    for wrong in ({**arguments, key: other}, {**arguments, key: as_text}, less, {**arguments, "more": 1}):
        text = json.dumps({"name": name, "arguments": wrong})
        assert grade(text, name, arguments) == Grade(True, True, False, text)
    text = json.dumps({"name": name + "x", "arguments": arguments})
    assert grade(text, name, arguments) == Grade(True, False, False, text)
    whole = json.dumps({"name": name, "arguments": arguments})
    for text in (whole[:-1], whole.replace("{", "[", 1), "", json.dumps({"name": name}), json.dumps([name])):
        assert grade(text, name, arguments) == Grade(False, False, False, text)
    assert first_json(whole[:-1]) is None and first_json(whole) is not None


# ---- through a cache -----------------------------------------------------------------------------------------
def test_a_cache_that_forgets_the_schemas_loses_the_functions(long_answers):
    (document,) = tool_documents(TEXT, Characters(), LENGTH, 1)
    done = []
    right = tool_calls.tool_calls(Reader(), Characters(), document, lambda: [Memory()], 64, done.append)
    assert [g[:3] for g in right] == [(True, True, True)] * len(FUNCTIONS) and sum(done) == len(document.tokens)
    lost = tool_calls.tool_calls(Reader(), Characters(), document, lambda: [Memory(500)], 64)
    assert [g[:3] for g in lost] == [(True, False, False)] * len(FUNCTIONS)


def test_rows_count_what_was_right_and_compare_with_the_first_cache(long_answers):
    documents = tool_documents(TEXT, Characters(), LENGTH, 2)
    caches = {"none": lambda: [Memory()], "same": lambda: [Memory()], "bad": lambda: [Memory(500)]}
    none, same, bad = evaluate._tool_rows(Reader(), documents, Characters(), caches, lambda n: None)
    n = 2 * len(FUNCTIONS)
    assert none == {"kv": "none", "requests": n, "valid": n, "function": n, "arguments": n, "same_answer": n}
    assert same == {**none, "kv": "same"}
    assert bad == {"kv": "bad", "requests": n, "valid": n, "function": 0, "arguments": 0, "same_answer": 0}


def test_calls_stand_in_json_and_table(run, capsys, demo, monkeypatch):
    model, tokenizer = demo
    monkeypatch.setattr(tokenizer._tokenizer, "chat_template", "{{ messages[0].content }} {{ messages[1].content }}")
    monkeypatch.setattr(tool_calls, "FUNCTIONS", {"get_weather": FUNCTIONS["get_weather"]})
    monkeypatch.setattr(tool_calls, "MAX_TOKENS", 3)
    monkeypatch.setattr(evaluate, "_load_model", lambda args: demo)
    flags = ["--tools", "--tool-documents", 1, "--tool-tokens", 600]
    code, out, err = run("eval", "--tokens", 20, "--kv", "turbo4", *flags, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert [(row["kv"], row["requests"]) for row in report["tools"]] == [("none", 1), ("turbo4", 1)]
    evaluate.print_tables(report)
    assert re.search(r"^turbo4 +0 +0 +0 +[01]$", capsys.readouterr().out, re.MULTILINE)
    code, out, err = run("eval", "--tokens", 20, "--tools", "--tool-tokens", 90)
    assert (code, out) == (2, "") and "--tool-tokens: got 90, the schemas and a request alone take" in err


def test_a_model_without_a_chat_template_is_refused(run):
    code, out, err = run("eval", "--tokens", 20, "--tools")
    assert (code, out, err.count("\n")) == (2, "", 1) and "--tools: it has no chat template" in err
