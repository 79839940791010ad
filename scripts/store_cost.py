"""What storing prompts costs and saves: bytes on disk, time to first token, and how fast a prefix is read.

    python scripts/store_cost.py            # in the environment of scripts/test.sh

- The embedded model reads a prompt of 4,000 tokens, with a cache of `--kv`, and the cache is put. Then the time to the
  next token from a store that was opened anew, its files dropped from the system's memory first where it allows that.
- Bare caches with the layout of an 8B-class model (8 kv heads of head_dim 128, float16; --layers of its 32) hold 30,000
  random tokens: bytes per token in the store, beside mlx-lm's save_prompt_cache of a KVCache with the same tokens; GB/s
  and seconds of a fetch (and of one that keeps what it read in the store's memory), beside reading the same files with
  read(), and mlx-lm's load_prompt_cache. The best of five each; cold: the system's memory holds nothing of the files.
- By arithmetic, nothing is run: what the same prompt is of a whole 8B-class model (Qwen3-8B's layout): bytes, by
  `mlx-turbo plan`; the seconds that a fetch of them takes at the speed just measured; the operations of computing them.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx.utils import tree_flatten
from mlx_lm.models import cache as lm_cache

from mlx_turbo import PromptStore, TurboKVCache, get_backend, make_prompt_cache
from mlx_turbo.cli import plan
from mlx_turbo.cli.common import DEMO_MODEL, load_model
from mlx_turbo.quant.scheme import TurboConfig
from mlx_turbo.store.files import SUFFIX

HEADS, HEAD_DIM = 8, 128
EIGHT_B = dict(
    model_type="qwen3",
    hidden_size=4096,
    num_hidden_layers=36,
    intermediate_size=12288,
    num_attention_heads=32,
    num_key_value_heads=HEADS,
    head_dim=HEAD_DIM,
    rms_norm_eps=1e-6,
    vocab_size=151936,
    max_position_embeddings=40960,
    rope_theta=1e6,
    tie_word_embeddings=False,
)


def drop(folder: Path) -> bool:
    """Have the system forget the files of a folder that it holds in memory; whether it can."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in [*folder.glob("*" + SUFFIX), *folder.glob("*.safetensors")]:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)  # what is not written yet stays
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    return True


def timed(call):
    """(result, seconds)"""
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def read_all(path: Path) -> int:
    """Read a file with read(); how many bytes it has."""
    n_bytes = 0
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(1 << 24):
            n_bytes += len(piece)
    return n_bytes


def evaluate(cache: list) -> None:
    mx.eval([c.state for c in cache])


def next_token(model, tokens, cache, step=512):
    for i in range(0, len(tokens), step):
        logits = model(mx.array([tokens[i : i + step]]), cache=cache)
        mx.eval(logits, [c.state for c in cache])
    return logits[0, -1].argmax().item()


def first_token(n: int, scheme: str, folder: Path) -> dict:
    model, tokenizer = load_model(mlx_lm.load, DEMO_MODEL, "--model")
    model.set_dtype(mx.float32 if mx.default_device().type == mx.DeviceType.cpu else mx.float16)
    tokens = tokenizer.encode((DEMO_MODEL / "stories.txt").read_text())[: n + 1]
    next_token(model, tokens[:600], make_prompt_cache(model, scheme))  # kernels are built
    cache = make_prompt_cache(model, scheme)
    _, computed = timed(lambda: next_token(model, tokens[:n], cache))
    with PromptStore(folder) as store:
        _, put = timed(lambda: store.put(model, tokens[:n], cache))
        _, again = timed(lambda: store.put(model, tokens[:n], cache))
        store.flush()
    want = next_token(model, tokens[n:], cache)
    is_cold = drop(folder)

    def stored():
        with PromptStore(folder) as store:
            cache, n_found = store.fetch(model, tokens)
        assert n_found == n
        return next_token(model, tokens[n:], cache)

    got, seconds = timed(stored)
    return {
        "tokens": n,
        "computed_s": computed,
        "stored_s": seconds,
        "dropped_from_memory": is_cold,
        "same_token": got == want,
        "put_s": put,
        "put_again_s": again,
    }


def filled(n: int, n_layers: int, scheme: str) -> tuple[list, list]:
    """Our caches and mlx-lm's, with the same random tokens."""
    mx.random.seed(0)
    ours, theirs = [], []
    for _ in range(n_layers):
        keys, values = (mx.random.normal((1, HEADS, n, HEAD_DIM)).astype(mx.float16) for _ in range(2))
        for caches, cache in (ours, TurboKVCache(scheme)), (theirs, lm_cache.KVCache()):
            for i in range(0, n, 2048):
                cache.update_and_fetch(keys[:, :, i : i + 2048], values[:, :, i : i + 2048])
            mx.eval(cache.state)
            caches.append(cache)
    return ours, theirs


def bare(n: int, n_layers: int, scheme: str, folder: Path) -> dict:
    model, tokens = nn.Linear(4, 4), [i % 1000 for i in range(n)]
    ours, theirs = filled(n, n_layers, scheme)
    with PromptStore(folder, max_memory_bytes=0) as store:
        _, put = timed(lambda: store.put(model, tokens, ours))
        _, written = timed(store.flush)
        held = store.report()["nbytes"]
    theirs_file = folder / "theirs.safetensors"
    lm_cache.save_prompt_cache(str(theirs_file), theirs)
    saved = theirs_file.stat().st_size
    ours = theirs = None
    speed: dict[str, float] = {}
    took: dict[str, float] = {}

    def note(what, n_bytes, seconds):  # the best of several
        speed[what] = max(speed.get(what, 0), n_bytes / seconds / 1e9)
        took[what] = min(took.get(what, seconds), seconds)

    with PromptStore(folder, max_memory_bytes=0) as store:
        store.fetch(model, [*tokens[:200], 1])  # what is imported late
    for what in ["cold"] * 5 + ["warm"] * 5:  # all ways each time, for other work may slow down any of them
        if what == "cold" and not drop(folder):
            continue
        n_bytes, seconds = timed(lambda: sum(map(read_all, folder.glob("*" + SUFFIX))))
        note(f"read_{what}", n_bytes, seconds)
        for name, kept in ("fetch", 0), ("fetch_and_keep", 2 * n_bytes), ("mlx_lm", 0):
            if what == "cold":
                drop(folder)
            mx.clear_cache()  # as in a process that has just begun, MLX has no memory at hand
            with PromptStore(folder, max_memory_bytes=kept) as store:
                if name == "mlx_lm":
                    _, seconds = timed(lambda: evaluate(lm_cache.load_prompt_cache(str(theirs_file))))
                else:
                    _, seconds = timed(lambda: evaluate(store.fetch(model, [*tokens, 1])[0]))
            note(f"{name}_{what}", saved if name == "mlx_lm" else n_bytes, seconds)
    return {
        "tokens": n,
        "layers": n_layers,
        "bytes_per_token_and_layer": held / n / n_layers,
        "mlx_lm_bytes_per_token_and_layer": saved / n / n_layers,
        "ratio": held / saved,
        "put_s": put,
        "written_s": written,
        "load": os.getloadavg()[0],
        "GB_per_s": speed,
        "seconds": took,
    }


def arithmetic(n: int, scheme: str, gb_per_s: float) -> dict:
    """Of n tokens of an 8B-class model. operations: 2 for each weight of a layer and token, 4 for each number of a
    query head and each pair of tokens that attends."""
    model = plan.build(EIGHT_B)
    layers, configs = plan.layers_of(model), plan.configs_of(model, TurboConfig.of(scheme))
    weights = sum(a.size for layer in model.layers for _, a in tree_flatten(layer.parameters()))
    heads = EIGHT_B["num_hidden_layers"] * EIGHT_B["num_attention_heads"] * HEAD_DIM
    nbytes = plan.cache_bytes(layers, configs, n)
    return {
        "tokens": n,
        "bytes": nbytes,
        "fetch_s": nbytes / 1e9 / gb_per_s,
        "weights_of_layers": weights,
        "operations": 2 * weights * n + 4 * heads * n * (n + 1) / 2,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv", default="turbo4", help="the scheme (default: turbo4)")
    parser.add_argument(
        "--prompt", type=int, default=4000, help="tokens of the embedded model's prompt (default: 4000; 0: none)"
    )
    parser.add_argument("--tokens", type=int, default=30_000, help="tokens of the bare caches (default: 30000)")
    parser.add_argument("--layers", type=int, default=4, help="layers of the bare caches (default: 4)")
    parser.add_argument(
        "--folder", help="where the store is made, and removed (default: the system's temporary folder)"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = {
            "backend": get_backend().describe(),
            "kv": args.kv,
            "first_token": first_token(args.prompt, args.kv, Path(folder) / "a") if args.prompt else None,
            "bare": bare(args.tokens, args.layers, args.kv, Path(folder) / "b"),
        }
    speeds = found["bare"]["GB_per_s"]
    speed = speeds.get("fetch_cold", speeds["fetch_warm"])
    found["arithmetic_8b"] = arithmetic(args.tokens, args.kv, speed)
    json.dump(found, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
