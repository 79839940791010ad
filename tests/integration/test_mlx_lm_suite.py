"""mlx-lm's own tests of prompt caches, generation and the server, run with our caches: what passes with mlx-lm's passes
with ours, but for the tests listed here, which must fail, and as listed.

They come from the source distribution of the installed version, which is downloaded once into pytest's cache folder.
Of test_models.py, which never evaluates anything, the models are taken: their logits with turbo8 are, within a bound,
those with mlx-lm's caches.
"""

import functools
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import unittest
import warnings
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import make_prompt_cache
from support.downloads import downloaded, filled_once
from support.families import NOT_BUILT, all_names
from support.tolerances import LOGITS_TURBO8, ROUNDING_OF_LOGITS

import mlx_turbo
from mlx_turbo import TurboConfig, TurboKVCache
from mlx_turbo.integration.prompt_cache import flatten_caches

FILES = ["test_prompt_cache.py", "test_generate.py", "test_server.py"]
MODELS = "test_models.py"
# What is put in the place of mlx-lm's (mlx_lm_plugin.py). What fails by rounding with turbo8 passes with turbo0.
OURS = ["classes turbo0", "function turbo8", "function turbo0"]

# With mlx-lm's own caches: the embedded model is not the one that they load.
NOT_WITH_THE_EMBEDDED_MODEL = {
    "TestGenerate::test_generate_with_logit_bias",  # token 0 is "!"
    "TestGenerate::test_stream_generate_input_embeddings",  # it answers "TEST"
    "TestGenerate::test_stream_generate_input_embeddings_prefill",
    "TestServer::test_handle_models",  # it is in the Hugging Face cache
}
ROUNDING = "prompts cut into chunks elsewhere, which see other tokens exactly: equal but for rounding"
# Ours cannot be subclasses: what reads the tokens from a KVCache's arrays would read something else, and mlx-lm 0.31
# puts RotatingKVCaches in the place of all KVCaches that it is given beside max_kv_size, those of subclasses too.
ASKS_FOR_THE_CLASS = {
    "TestGenerate::test_batch_max_kv_size_creates_rotating_cache": (
        "is not an instance of .*RotatingKVCache",
        "asks for mlx-lm's class",
    ),
    "TestGenerate::test_batch_max_kv_size_none_creates_regular_cache": (
        "is not an instance of .*KVCache",
        "asks for mlx-lm's class",
    ),
}
# With ours: the test, what it fails with, and why.
NOT_WITH_OURS = {
    "classes turbo0": {
        "TestPromptCache::test_batch_kv_cache_offset_not_mutated_in_place": (
            "Lists differ",
            "reads the padding that rows keep; ours drop it once it was attended to",
        ),
        "TestPromptCache::test_rotating_cache_mask": (
            "Lists differ",
            "expects the order of a ring's slots, ours stay in the order of the tokens",
        ),
        "TestPromptCache::test_batch_rotating_kv_cache": (
            "Lists differ",
            "expects the columns of a ring, ours has others for tokens that no row sees any more",
        ),
        "TestPromptCache::test_merge_with_empty_caches": (
            "got a RotatingTurboKVCache, allowed are TurboKVCaches",
            "KVCache.merge makes of windows a batch that has none; ours refuses, RotatingTurboKVCache.merge does it",
        ),
        "TestPromptCache::test_save_load_batch_caches": (
            "batch size 4, but this cache has 2 rows",
            "gives the padding of two rows and the keys of four, which no mask fits, and reads left_padding again",
        ),
    },
    "function turbo8": ASKS_FOR_THE_CLASS
    | {
        "TestPromptCache::test_trim_cache_with_generate": (
            "False is not true",
            "takes back more tokens than stay exact: equal but for rounding",
        ),
        "TestGenerate::test_batch_continued_generation": ("is not true", ROUNDING),
        "TestGenerate::test_batch_sliding_window": ("is not true", ROUNDING),
        "TestGenerate::test_many_batches": ("is not true", ROUNDING),
    },
    "function turbo0": ASKS_FOR_THE_CLASS,
}
if mlx_lm.__version__.startswith("0.31."):
    NOT_WITH_THE_EMBEDDED_MODEL.add("TestGenerate::test_generate_with_processor")  # "hello" is one token
    NOT_WITH_OURS["classes turbo0"] |= {
        "TestPromptCache::test_batch_kv_cache": ("Tuples differ", "reads the arrays of the state"),
        "TestLRUPromptCache::test_caching": ("too many values to unpack", "reads the arrays of the state"),
    }
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tests_of_mlx_lm(request):
    """The folder of the installed mlx-lm's tests."""
    folder = request.config.cache.mkdir("packages") / f"mlx_lm-{mlx_lm.__version__}-tests"
    with filled_once(folder) as new:
        if new:
            with (
                downloaded(f"mlx-lm=={mlx_lm.__version__}", "--no-binary", "mlx-lm") as source,
                tarfile.open(source) as archive,
            ):
                for member in archive:
                    path = Path(member.name)
                    if member.isfile() and path.parts[1:-1] == ("tests",):
                        (new / path.name).write_bytes(archive.extractfile(member).read())
    missing = [file for file in [*FILES, MODELS] if not (folder / file).exists()]
    assert not missing, f"the source distribution of mlx-lm {mlx_lm.__version__} has no {missing}"
    return folder


@functools.lru_cache(None)
def run(folder, file, in_place=""):
    """{test: "passed", "skipped" or what it failed with}, and the tests in which a cache packed something."""
    with tempfile.TemporaryDirectory() as home:
        (Path(home) / "hub").mkdir()
        out = Path(home) / "outcomes.json"
        paths = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
        env = os.environ | {
            "MLX_TURBO_IN_PLACE": in_place,
            "MLX_TURBO_OUTCOMES": str(out),
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": home,
            "PYTHONPATH": os.pathsep.join(paths),
        }
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-p",
                "mlx_lm_plugin",
                "-p",
                "no:cacheprovider",
                "-c",
                os.devnull,
                "--rootdir",
                str(folder),
                str(folder / file),
            ],
            capture_output=True,
            text=True,
            env=env,
            cwd=home,
            timeout=300,
        )
        assert done.returncode in (0, 1) and out.exists(), done.stdout[-3000:] + done.stderr[-3000:]
        return json.loads(out.read_text()).values()


@pytest.mark.parametrize("in_place", OURS)
@pytest.mark.parametrize("file", FILES)
def test_what_passes_with_mlx_lm_s_own_caches_passes_with_ours(tests_of_mlx_lm, file, in_place):
    theirs, _ = run(tests_of_mlx_lm, file)
    ours, packed = run(tests_of_mlx_lm, file, in_place)
    assert list(ours) == list(theirs)
    failed = {name: why for name, why in theirs.items() if why != "passed"}
    assert set(failed) == NOT_WITH_THE_EMBEDDED_MODEL & set(theirs), failed
    failed = {name: why for name, why in ours.items() if why != "passed" and name not in failed}
    listed = {name: message for name, (message, _) in NOT_WITH_OURS[in_place].items() if name in theirs}
    assert set(failed) == set(listed), failed
    for name, message in listed.items():
        assert re.search(message, failed[name]), f"{name}: {failed[name]}"
    assert len(packed) >= 3


@pytest.mark.parametrize("file", FILES)
def test_each_of_them_passes_with_turbo0_in_one_place_or_the_other(tests_of_mlx_lm, file):
    """What asks for mlx-lm's class passes where ours has its name, what looks into its buffers where it is mlx-lm's."""
    theirs, _ = run(tests_of_mlx_lm, file)
    ways = [ours for ours, _ in (run(tests_of_mlx_lm, file, f"{place} turbo0") for place in ("classes", "function"))]
    assert [
        name for name, why in theirs.items() if why == "passed" and not any(way[name] == "passed" for way in ways)
    ] == []


# ---- the models of test_models.py ---------------------------------------------------------------------------------
MOST_PARAMETERS = 100e6  # larger ones take minutes or more memory than there is; test_families.py has them small
NOT_EVALUATED = set() if mx.metal.is_available() else {"bitnet"}  # a kernel and no MLX operations


class Choices:
    """What a model chose with mx.argpartition and mx.argmax (routers: its experts), to make it choose the same again.

    Where two experts are nearly equal, a difference of rounding chooses the other one, and the logits jump: in random
    models laguna by 0.13 of their range for one choice of 54, but by 0.015 with the same experts; granitemoe, olmoe,
    qwen3_vl_moe, bailing_hybrid and phimoe are like it.
    """

    def __init__(self, monkeypatch):
        self.note, self.repeat = None, None  # lists of choices: to be added to, to be taken from
        for name in ("argpartition", "argmax"):
            monkeypatch.setattr(mx, name, functools.partial(self._choose, getattr(mx, name)))

    def _choose(self, original, *args, **options):
        if self.repeat is not None:
            return self.repeat.pop(0)
        out = original(*args, **options)
        if self.note is not None:
            self.note.append(out)
        return out

    def logits(self, model, tokens, cache, note=None, repeat=None):
        """[1, N, vocabulary] of two chunks and single tokens. note, repeat: see above."""
        self.note, self.repeat = note, repeat
        try:
            ends = [16, 24, *range(25, tokens.shape[1] + 1)]
            logits = [model(tokens[:, a:b], cache=cache) for a, b in zip([0, *ends], ends)]
        finally:
            self.note = self.repeat = None
        assert not repeat, "the model chose less often"
        logits = mx.concatenate(logits, axis=1)
        mx.eval(logits)
        return logits


@pytest.fixture
def eager():
    """No mx.compile: what a compiled function chooses is seen only when it is traced."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def with_random_weights(model):
    """In float32, and no matrix of zeros: as made, the output layers of two models are."""

    def weight(x):
        if not mx.issubdtype(x.dtype, mx.floating):
            return x
        if x.ndim > 1 and not mx.any(x):
            return mx.random.normal(x.shape) / x.shape[-1] ** 0.5
        return x.astype(mx.float32)

    model.update(tree_map(weight, model.parameters()))
    return model.eval()


def test_its_models_give_the_logits_of_mlx_lm_s_caches_with_turbo8(tests_of_mlx_lm, monkeypatch, door, eager):
    spec = importlib.util.spec_from_file_location("mlx_lm_test_models", tests_of_mlx_lm / MODELS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    choices, errors, too_large, failed = Choices(monkeypatch), {}, set(), set()

    def compare(self, model, model_type, vocab_size, num_layers):
        if sum(x.size for _, x in tree_flatten(model.parameters())) > MOST_PARAMETERS:
            too_large.add(model_type)
            return
        model = with_random_weights(model)
        tokens = mx.random.randint(0, min(vocab_size, 1000), (1, 28))
        chosen = []
        try:
            plain = choices.logits(model, tokens, make_prompt_cache(model), note=chosen)
        except RuntimeError:
            failed.add(model_type)
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "nothing is compressed")
            cache = mlx_turbo.make_prompt_cache(model, TurboConfig("turbo8", sink=2, recent=4, block=4))
        ours = choices.logits(model, tokens, cache, repeat=chosen)
        reports = [c.report() for c in flatten_caches(cache) if isinstance(c, TurboKVCache)]
        is_packed = any(report["packed"] and len(report["exact"]) < 2 for report in reports)
        finite = mx.isfinite(plain)
        assert mx.array_equal(finite, mx.isfinite(ours)), model_type
        plain, ours = mx.where(finite, plain, 0), mx.where(finite, ours, 0)
        error = (mx.abs(plain - ours).max() / (plain.max() - plain.min())).item()
        errors.setdefault((model_type, is_packed), []).append(error)

    monkeypatch.setattr(module.TestModels, "model_test_runner", compare)
    names = [
        name
        for name, test in vars(module.TestModels).items()
        if name.startswith("test_") and "self.model_test_runner(" in inspect.getsource(test)
    ]
    results = unittest.TestResult()
    for name in names:
        mx.random.seed(0)
        module.TestModels(name).run(results)
    wrong = {
        key: found
        for key, found in errors.items()
        if not max(found) <= (LOGITS_TURBO8 if key[1] else ROUNDING_OF_LOGITS)
    }
    assert not results.errors + results.failures and not wrong, (results.errors + results.failures, wrong)
    assert failed == NOT_EVALUATED
    assert too_large <= set(all_names()) - set(NOT_BUILT), "test_families.py runs them"
    assert len({name for name, is_packed in errors if is_packed}) >= 50
