"""What the server says of a model's context is what `mlx-turbo plan` says."""

from argparse import Namespace

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.models import llama
from mlx_lm.server import LRUPromptCache

import mlx_turbo
from mlx_turbo.cli import plan, serve_context
from mlx_turbo.cli.common import DEMO_MODEL, load_model
from mlx_turbo.cli.serve_context import context, room_of
from mlx_turbo.quant.scheme import TurboConfig

SCHEMES = {"none": None, "turbo4": TurboConfig("turbo4")}


@pytest.fixture(scope="module")
def model():
    return load_model(mlx_lm.load, DEMO_MODEL, "--model")[0]


@pytest.fixture
def free(monkeypatch):
    """free(n): so many bytes are left of the machine's memory."""

    def free(n):
        monkeypatch.setattr(serve_context, "machine_memory", lambda: (10**9 + n, "what the test says"))
        monkeypatch.setattr(mx, "get_active_memory", lambda: 10**9)

    return free


def provider(model, limit=None, draft=None):
    return Namespace(model=model, model_key=("model", None, draft), limit=lambda: limit)


@pytest.mark.parametrize("kv", SCHEMES)
@pytest.mark.parametrize("memory", [3_000_000, 40_000_000])
def test_as_many_tokens_fit_as_plan_says(model, free, kv, memory):
    free(memory)
    rooms = {"model": room_of(model, SCHEMES[kv])}
    if SCHEMES[kv]:
        mlx_turbo.enable(model, SCHEMES[kv])  # as the server does afterwards
    said = context(provider(model), LRUPromptCache(), rooms)
    mlx_turbo.disable(model)
    weights = plan.plan(DEMO_MODEL, {}, 0)["weights_bytes"]
    (row,) = plan.plan(DEMO_MODEL, {kv: SCHEMES[kv]}, weights + memory)["results"]
    assert said["tokens_that_fit"] == row["tokens"] > 100 and said["context_length"] is None


def test_it_is_no_more_than_the_context_and_nothing_where_memory_is_full(model, free):
    rooms = {"model": room_of(model, SCHEMES["turbo4"])}
    free(10**9)
    assert context(provider(model, 4096), LRUPromptCache(), rooms)["tokens_that_fit"] == 4096
    free(-5)
    assert context(provider(model, 4096), LRUPromptCache(), rooms)["tokens_that_fit"] == 0


def test_a_draft_model_takes_its_part(model, free):
    free(10_000_000)
    rooms = {name: room_of(model, SCHEMES["turbo4"]) for name in ("model", "draft")}
    alone, both = (context(provider(model, draft=d), LRUPromptCache(), rooms) for d in (None, "draft"))
    assert 0.4 < both["tokens_that_fit"] / alone["tokens_that_fit"] < 0.6


def test_the_tokens_of_all_kept_caches_count(model, free):
    free(10_000_000)
    kept = LRUPromptCache(2)
    for first in 1, 2, 3:
        kept.insert_cache("model", [first] * 10 * first, mlx_turbo.make_prompt_cache(model))
    assert context(provider(model), kept, {})["tokens_in_memory"] == 50


def test_a_model_that_plan_cannot_call_is_served_all_the_same(free, caplog):
    class Strange(llama.Model):
        def __call__(self, *args, **kwargs):
            raise RuntimeError("no")

    strange = Strange.__new__(Strange)
    assert room_of(strange, None) is None and "is not known for this model" in caplog.text
    free(10**6)
    assert context(provider(strange, 100), LRUPromptCache(), {"model": None}) == {
        "context_length": 100,
        "tokens_in_memory": 0,
        "tokens_that_fit": None,
    }
