"""A pytest plugin for mlx-lm's own tests: the embedded model in the place of those they load from the Hugging Face Hub
and our caches in the place of mlx-lm's, as MLX_TURBO_IN_PLACE says ("classes SCHEME", "function SCHEME", or ""). Writes
what came of each test, as JSON, to the file MLX_TURBO_OUTCOMES. From test_mlx_lm_suite.py."""

import json
import os
import random
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm.generate  # noqa: F401 - so that its names are replaced too
import mlx_lm.models.cache
import mlx_lm.server  # noqa: F401
import mlx_lm.utils
import pytest

import mlx_turbo
from mlx_turbo import (
    BatchRotatingTurboKVCache,
    BatchTurboKVCache,
    RotatingTurboKVCache,
    TurboConfig,
    TurboKVCache,
)
from mlx_turbo.cli.common import DEMO_MODEL
from mlx_turbo.integration import prompt_cache

CLASSES = {
    "KVCache": TurboKVCache,
    "RotatingKVCache": RotatingTurboKVCache,
    "BatchKVCache": BatchTurboKVCache,
    "BatchRotatingKVCache": BatchRotatingTurboKVCache,
}
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
loaded_models = []
outcomes = {}  # of a test: "passed", "skipped" or what it failed with
packed = set()  # tests in which an update packed something


def replace(old, new):
    """Wherever mlx-lm has it; models that are imported later find it in mlx_lm.models.cache."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "mlx_lm":
            for attribute in [k for k, v in vars(module).items() if v is old]:
                setattr(module, attribute, new)


def load(*_, original=mlx_lm.utils.load, **__):
    """The embedded model in float32, where rounding hardly ever decides between tokens; it does not end by itself."""
    model, tokenizer = original(str(DEMO_MODEL), {"chat_template": TEMPLATE})
    model = mlx_lm.utils.dequantize_model(model)
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())  # a server generates in another thread, which cannot evaluate them
    tokenizer.eos_token_ids = {model.args.vocab_size - 1}  # a token, or mlx-lm 0.31's server fails
    loaded_models.append(model)
    return model, tokenizer


def put_classes_in_place(config):
    """Our classes under the names of mlx-lm's, with `config` as their default."""
    TurboKVCache.__init__.__defaults__ = (config,)
    BatchTurboKVCache.__init__.__defaults__ = config, (0,)
    RotatingTurboKVCache.__init__.__defaults__ = 0, config
    BatchRotatingTurboKVCache.__init__.__defaults__ = 0, config, (0,)
    for name, ours in CLASSES.items():
        replace(getattr(mlx_lm.models.cache, name), ours)


def put_function_in_place(config):
    """Our make_prompt_cache in the place of mlx-lm's."""
    replace(
        mlx_lm.models.cache.make_prompt_cache,
        lambda model, max_kv_size=None: mlx_turbo.make_prompt_cache(model, config, max_kv_size),
    )


def remember_packing():
    for ours in CLASSES.values():

        def update_and_fetch(self, keys, values, update=ours.update_and_fetch):
            out = update(self, keys, values)
            if self.report()["packed"]:
                packed.add(os.environ.get("PYTEST_CURRENT_TEST", "").split("::", 1)[-1].split(" ")[0])
            return out

        ours.update_and_fetch = update_and_fetch


replace(mlx_lm.utils.load, load)
if what := os.environ.get("MLX_TURBO_IN_PLACE"):
    prompt_cache.patch_mlx_lm()
    place, _, scheme = what.partition(" ")
    # they pack from the fourth token on: the tests' texts are short
    {"classes": put_classes_in_place, "function": put_function_in_place}[place](
        TurboConfig(scheme, sink=1, recent=1, block=1)
    )
    remember_packing()


@pytest.fixture(autouse=True)
def each_test_alone():
    random.seed(0)
    mx.random.seed(0)
    yield
    for model in loaded_models:
        vars(model).pop("make_cache", None)  # what a test that failed has left


def pytest_runtest_logreport(report):
    name = report.nodeid.split("::", 1)[1]
    if report.outcome == "failed":
        outcomes[name] = str(getattr(report.longrepr, "reprcrash", report.longrepr))
    elif report.when == "call" or report.outcome == "skipped":
        outcomes.setdefault(name, report.outcome)


def pytest_sessionfinish():
    Path(os.environ["MLX_TURBO_OUTCOMES"]).write_text(json.dumps({"outcomes": outcomes, "packed": sorted(packed)}))
