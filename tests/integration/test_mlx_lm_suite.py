"""mlx-lm's own tests of prompt caches, generation and the server, run with our caches: what passes with mlx-lm's passes
with ours, but for the tests listed here, which must fail, and as listed.

They come from the source distribution of the installed version, which is downloaded once into pytest's cache folder.
Not among them: test_models.py, whose models have their full size and are never evaluated, which our caches do.
"""

import functools
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import mlx_lm
import pytest

FILES = ["test_prompt_cache.py", "test_generate.py", "test_server.py"]
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
    folder = request.config.cache.mkdir(f"mlx_lm-{mlx_lm.__version__}-tests")
    if not all((folder / file).exists() for file in FILES):
        with tempfile.TemporaryDirectory() as download:
            done = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "pip",
                    "download",
                    "-q",
                    "--disable-pip-version-check",
                    "--no-deps",
                    "--no-binary",
                    "mlx-lm",
                    "--dest",
                    download,
                    f"mlx-lm=={mlx_lm.__version__}",
                ],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                pytest.skip(f"mlx-lm's source distribution cannot be downloaded: {done.stderr.strip()[-500:]}")
            with tarfile.open(next(Path(download).iterdir())) as archive:
                for member in archive:
                    path = Path(member.name)
                    if member.isfile() and path.parts[1:-1] == ("tests",):
                        (folder / path.name).write_bytes(archive.extractfile(member).read())
    missing = [file for file in FILES if not (folder / file).exists()]
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
