"""Prices that a command measured are there for the next one: of the same model, text and configuration, undamaged."""

import json
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.models import llama
from support.strategies import quick

from mlx_turbo import TurboConfig
from mlx_turbo.cli import common, kept_prices
from mlx_turbo.cli.kept_prices import KeptPrices
from mlx_turbo.quant.scheme import PACKED_BITS

AUTO, MEMORY = TurboConfig("auto:4.25"), TurboConfig("memory:9MB", floor="turbo2")
ERRORS = st.dictionaries(st.sampled_from(PACKED_BITS), st.floats(0, 1e9), min_size=1)
PARTS = st.dictionaries(st.tuples(st.integers(0, 40), st.integers(0, 1)), ERRORS)


class Tokenizer:
    def encode(self, text):
        return [ord(c) % 90 for c in text]


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """The configurations that were measured for, in no time."""
    found = []

    class Prices:
        n_layers, heads = 2, {(layer, side): [(2, 64)] for layer in range(2) for side in (0, 1)}

        def __init__(self, model, tokens, config):
            found.append(config)

        def errors(self, progress):
            return {part: {3: 0.1 if part == (1, 0) else 0.001, 4: 1 / 3e4} for part in self.heads}

    monkeypatch.setattr(common, "Prices", Prices)
    monkeypatch.setattr(kept_prices, "prices_folder", lambda: tmp_path / "prices")
    return found


@pytest.fixture(scope="module")
def models():
    """Two that differ in their numbers alone."""
    one, other = llama(), llama()
    other.model.norm.weight = 2 * other.model.norm.weight
    return one, other


@pytest.mark.parametrize("config", [AUTO, MEMORY], ids=lambda config: config.name)
def test_they_are_measured_once_and_it_is_said_when_and_by_what(measured, models, capsys, config):
    chosen = common.for_model(config, models[0], Tokenizer())
    assert re.search(rf"{config.name}: (chosen|measured) now in [\d.]+ s by cpu", capsys.readouterr().err)
    assert common.for_model(config, models[0], Tokenizer()) == chosen and len(measured) == 1
    err = capsys.readouterr().err
    assert re.search(rf"{config.name}: .*measured by cpu on {time.strftime('%Y-%m-%d')}, in [\d.]+ s", err)
    assert len(err.splitlines()) == 1 and "--kv-measure" in err
    assert common.for_model(config, models[0], Tokenizer(), measure=True) == chosen and len(measured) == 2


def test_a_budget_of_another_size_or_floor_needs_no_others(measured, models):
    for config in (AUTO, MEMORY, TurboConfig("auto:3.5"), TurboConfig("memory:1GB")):
        common.for_model(config, models[0], Tokenizer())
    assert len(measured) == 1


def test_another_model_text_or_configuration_has_prices_of_its_own(measured, models, monkeypatch, tmp_path):
    common.for_model(AUTO, models[0], Tokenizer())
    common.for_model(AUTO, models[1], Tokenizer())
    common.for_model(TurboConfig("auto:4.25", recent=9), models[0], Tokenizer())
    assert len(measured) == 3
    monkeypatch.setattr(common, "calibration_tokens", lambda tokenizer: [1] * 400)
    common.for_model(AUTO, models[0], Tokenizer())
    monkeypatch.setattr(kept_prices, "VERSION", 2)
    common.for_model(AUTO, models[0], Tokenizer())
    assert len(measured) == 5 == len(list((tmp_path / "prices").iterdir()))
    common.for_model(AUTO, models[0], Tokenizer())
    assert len(measured) == 5


def damages(good, foreign):
    said = json.loads(good)
    other = json.loads(good)
    other["prices"]["parts"][0][3] = [[3, -1.0]]
    other["digest"] = kept_prices._digest(other["prices"])
    return [
        b"",
        b"\xff\xfe",
        b"[" * 100_000,
        *(text.encode() for text in ("{}", "[]", "null", good[:-40], good.replace("0.001", "0.002"))),
        foreign.encode(),
        json.dumps(said | {"prices": {}, "digest": kept_prices._digest({})}).encode(),
        json.dumps(other).encode(),
    ]


def test_a_file_that_is_damaged_or_of_something_else_is_said_measured_again_and_replaced(
    measured, models, tmp_path, capsys
):
    chosen = common.for_model(AUTO, models[0], Tokenizer())
    (file,) = (tmp_path / "prices").iterdir()
    common.for_model(AUTO, models[1], Tokenizer())
    (other,) = set((tmp_path / "prices").iterdir()) - {file}
    for n, damaged in enumerate(damages(file.read_text(), other.read_text())):
        file.write_bytes(damaged)
        assert common.for_model(AUTO, models[0], Tokenizer()) == chosen and len(measured) == n + 3
        assert f"{file} cannot be used, and is measured again: " in capsys.readouterr().err
        assert common.for_model(AUTO, models[0], Tokenizer()) == chosen and len(measured) == n + 3  # a new one
        assert set(file.parent.iterdir()) == {file, other}


def test_where_they_cannot_be_kept_a_command_goes_on(measured, models, tmp_path, capsys):
    (tmp_path / "prices").write_text("a file")
    chosen = common.for_model(MEMORY, models[0], Tokenizer())
    assert chosen.prices is not None and "the prices are not kept: " in capsys.readouterr().err


@quick
@given(parts=PARTS, n_layers=st.integers(41, 50))
def test_what_is_read_is_what_was_measured_to_the_last_bit(parts, n_layers):
    prices = KeptPrices(n_layers, {part: [(2, 64), (1, 128)] for part in parts}, parts, "cuda", "2026-11-28", 1.5)
    assert KeptPrices.from_plain(json.loads(json.dumps(prices.as_plain()))) == prices
