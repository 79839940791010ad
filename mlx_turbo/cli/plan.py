"""`mlx-turbo plan`: how many tokens fit in a given amount of memory with each scheme, or how much memory tokens take.

It reads only a model's configuration. mlx-lm's own model is built from it without memory (MLX is lazy: nothing is
evaluated, and each parameter is one zero, broadcast) and called once, so that the shapes are those its caches really
have, whatever the family. What a compressed cache takes is measured on a TurboKVCache with one head.
"""

import copy
import functools
import importlib
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..backends.select import use_backend
from ..cache.packing import bits_at
from ..cache.rotating import RotatingTurboKVCache
from ..cache.single import TurboKVCache
from ..integration.memory import machine_memory, memory_beside
from ..integration.prompt_cache import flatten_caches, memory_budget_of
from ..integration.prompt_cache import make_prompt_cache as make_compressed_cache
from ..quant.budget import Part, cheapest_widths
from ..quant.scheme import FLOOR, MEMORY, Scheme, TurboConfig
from ..quant.sizes import parse_size
from .common import DEMO_MODEL, CliError, Parser, describe_error, explain_load_error, kv_config, tree_nbytes

SCHEMES = ("none", "turbo8v4", "turbo4", "turbo3", "turbo2")
FEW = 8  # tokens that fill every state of constant size: convolutions, n-grams
STEP = 256  # tokens by which mlx-lm's caches and ours grow
MOST_TOKENS = 2**40  # if that many fit, there is no limit


# ---- the model's configuration and weights ----------------------------------------------------------------------
def read_config(
    name: str | Path, download: Callable[[str, str], str] | None = None
) -> tuple[dict[str, Any], int | None, str | None]:
    """(config, bytes of the weights or None, where those come from) of a folder or a Hugging Face id.

    Only config.json and the index of the weights are read from the Hub. download: replaces
    huggingface_hub.hf_hub_download. Raises CliError if there is no configuration to read.
    """
    folder, weights, source = Path(name), None, None
    file: str | Path
    try:
        if folder.exists():
            file = folder / "config.json" if folder.is_dir() else folder
            weights = sum(f.stat().st_size for f in file.parent.glob("model*.safetensors"))
            source = "files"
        else:
            file, weights, source = _from_hub(str(name), download)
        config = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        why = describe_error(e) if folder.exists() else explain_load_error(name, e)
        raise CliError(f"--model: {f'cannot read the configuration of {str(name)!r}: ' * folder.exists()}{why}") from e
    if not isinstance(config, dict) or "model_type" not in config:
        raise CliError(f"--model: {str(file)!r} has no 'model_type', so it is not a model configuration")
    return config, weights or None, source if weights else None


def _from_hub(name: str, download: Callable[[str, str], str] | None) -> tuple[str, int | None, str | None]:
    import huggingface_hub
    from huggingface_hub import errors

    download = download or huggingface_hub.hf_hub_download
    file = download(name, "config.json")
    try:
        index = json.loads(Path(download(name, "model.safetensors.index.json")).read_text(encoding="utf-8"))
        return file, index["metadata"]["total_size"], "index"
    except (OSError, ValueError, KeyError, TypeError, errors.HfHubHTTPError):
        pass  # weights in a single file have no index
    try:
        files = huggingface_hub.HfApi().model_info(name, files_metadata=True).siblings or ()
        sizes = [f.size or 0 for f in files if f.rfilename.startswith("model") and f.rfilename.endswith(".safetensors")]
        return file, sum(sizes), "Hub"
    except Exception:  # whatever the HTTP library raises: without sizes, they are computed
        return file, None, None


def build(config: dict[str, Any]) -> Any:
    """mlx-lm's model for a configuration. Each parameter is one broadcast zero and nothing is evaluated, so it takes no
    memory.

    Raises CliError for a configuration that mlx-lm cannot build a model from.
    """
    import mlx.core as mx
    from mlx.utils import tree_map

    dtype = _dtype(config)
    try:
        model_class, args_class = importlib.import_module("mlx_lm.utils")._get_classes(config)
        model = model_class(args_class.from_dict(copy.deepcopy(config)))
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, NotImplementedError) as e:
        raise CliError(
            f"--model: mlx-lm cannot build a {config['model_type']!r} model from this configuration: "
            f"{describe_error(e)}"
        ) from e

    def zero(x):
        floating = mx.issubdtype(x.dtype, mx.floating)
        return mx.broadcast_to(mx.zeros((), dtype if floating else x.dtype), x.shape)

    model.update(tree_map(zero, model.parameters()))
    model.eval()
    return model


def _dtype(config: dict[str, Any]) -> Any:
    import mlx.core as mx

    text = config.get("text_config") or {}
    name = next((c[key] for c in (config, text) for key in ("dtype", "torch_dtype") if c.get(key)), "bfloat16")
    return {"float32": mx.float32, "float16": mx.float16}.get(str(name).removeprefix("torch."), mx.bfloat16)


def parameter_bytes(model: Any, config: dict[str, Any]) -> int:
    """Bytes of a model's parameters, quantized as its configuration says (affine, mxfp4, ...)."""
    import mlx.nn as nn

    quantization = config.get("quantization")
    if quantization:
        default = {k: v for k, v in quantization.items() if k in ("group_size", "bits", "mode")}

        def predicate(path, module):
            if path in quantization:
                return quantization[path]
            return hasattr(module, "to_quantized") and module.weight.shape[-1] % default["group_size"] == 0

        nn.quantize(model, **default, class_predicate=predicate)
    return tree_nbytes(model.parameters())


# ---- what its caches hold ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Layer:
    """One uncompressed cache of a model, for one sequence.

    kind: the name of mlx-lm's class. shape: (n_kv_heads, key_dim, value_dim), or None if it holds something else.
    dtype: of its keys. per_token, constant: bytes. window: the maximum number of tokens it holds, or None.
    """

    kind: str
    shape: tuple[int, int, int] | None
    dtype: str
    per_token: float
    constant: int = 0
    window: int | None = None

    def nbytes(self, tokens: int) -> int:
        """Bytes of the cache with a number of tokens; buffers of keys and values grow by STEP."""
        held = -(-tokens // STEP) * STEP if self.shape else tokens
        return round(self.constant + self.per_token * min(held, self.window or held))

    def describe(self) -> str:
        """The cache in words."""
        if self.shape is None:
            growing = f" and {self.per_token:,.0f} bytes per token" if self.per_token else ""
            return f"{self.kind}: {_size(self.constant)}{growing}"
        heads, key_dim, value_dim = self.shape
        text = f"{self.kind}: {heads} kv head{'s' * (heads > 1)}, keys {key_dim}, values {value_dim}, {self.dtype}"
        return f"{text}, at most {self.window:,} tokens" if self.window else text


def _size(nbytes: float) -> str:
    unit, name = next(((u, n) for u, n in ((10**9, "GB"), (10**6, "MB")) if abs(nbytes) >= u), (10**3, "KB"))
    return f"{nbytes / unit:,.2f} {name}"


def _call(model: Any, tokens: int) -> list[Any]:
    """The caches of a prompt cache of mlx-lm after a number of tokens; nothing is evaluated."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    model(mx.zeros((1, tokens), mx.int32), cache=cache)
    return flatten_caches(cache)


def layers_of(model: Any) -> list[Layer]:
    """A `Layer` for each cache that mlx-lm makes for a model, in order; those inside a CacheList one by one."""
    from mlx_lm.models import cache as lm_cache

    layers, unknown = [], []
    for i, cache in enumerate(_call(model, FEW)):
        kind, keys = type(cache).__name__, getattr(cache, "keys", None)
        if isinstance(cache, (lm_cache.KVCache, lm_cache.RotatingKVCache, lm_cache.ChunkedKVCache)):
            if keys is None:  # the model never uses it
                layers.append(Layer(kind, None, "", 0.0))
                continue
            values, window = cache.values, getattr(cache, "max_size", None)
            if chunk := getattr(cache, "chunk_size", None):
                window = chunk + STEP  # it evicts tokens when it would have to grow
            layers.append(
                Layer(
                    kind,
                    (keys.shape[1], keys.shape[3], values.shape[3]),
                    str(keys.dtype).split(".")[-1],
                    (keys.nbytes + values.nbytes) / keys.shape[2],
                    window=window,
                )
            )
        else:
            unknown += [i] * (not isinstance(cache, lm_cache.ArraysCache))
            layers.append(Layer(kind, None, "", 0.0, tree_nbytes(cache.state)))
    if unknown:  # a class of the model's own: a line through two sizes
        (short, less), (long, more) = ((n, _call(model, n)) for n in (2048, 4096))
        for i in unknown:
            slope = (tree_nbytes(more[i].state) - tree_nbytes(less[i].state)) / (long - short)
            layers[i] = Layer(layers[i].kind, None, "", slope, round(tree_nbytes(less[i].state) - slope * short))
    return layers


def configs_of(model: Any, scheme: TurboConfig | None, layers: list[Layer] | None = None) -> list[TurboConfig | None]:
    """For each of `layers_of`, the TurboConfig of the cache that replaces it, or None if it is not compressed.

    scheme: a TurboConfig, or None for mlx-lm's own caches. layers: of the model, for a budget, which is spent as if all
    of its numbers were worth the same. Raises CliError for a budget that the model cannot keep.
    """
    from mlx_lm.models.cache import make_prompt_cache

    if scheme is None:
        return [None] * len(flatten_caches(make_prompt_cache(model)))
    if scheme.budget is not None:
        scheme = _spent_evenly(model, scheme, layers_of(model) if layers is None else layers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "nothing is compressed": the table shows it
        cache = make_compressed_cache(model, scheme)
    return [c.config if isinstance(c, TurboKVCache) else None for c in flatten_caches(cache)]


def _spent_evenly(model: Any, scheme: TurboConfig, layers: list[Layer]) -> TurboConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache = make_compressed_cache(model, replace(scheme, budget=None))
    heads: dict[tuple[int, int], list[tuple[int, int]]] = {}
    of_caches = iter(layers)
    for i, layer in enumerate(cache):
        for member, found in zip(flatten_caches([layer]), of_caches):
            if isinstance(member, TurboKVCache) and found.shape is not None:
                for side, head_dim in enumerate(found.shape[1:]):
                    if bits_at(member.config.scheme.key_bits, head_dim):
                        heads.setdefault((i, side), []).append((found.shape[0], head_dim))
    parts = [Part(h, {4: float(sum(n * head_dim for n, head_dim in h))}) for h in heads.values()]
    try:
        widths = dict(zip(heads, cheapest_widths(parts, scheme.budget or 0.0)))
    except ValueError as e:
        raise CliError(f"--kv: {scheme.name}: {str(e).removeprefix('bits: ')}") from e
    return replace(scheme, schemes=[Scheme(*(widths.get((i, side), 4) for side in (0, 1))) for i in range(len(cache))])


def is_compressed(layer: Layer, config: TurboConfig | None) -> bool:
    """Whether anything of a layer is packed: not where its head_dim cannot be."""
    if config is None or layer.shape is None:
        return config is not None
    bits = config.scheme.key_bits, config.scheme.value_bits
    return any(map(bits_at, bits, layer.shape[1:]))


@functools.lru_cache(None)
def _measured(config: TurboConfig, key_dim: int, value_dim: int, dtype: str) -> tuple[int, int]:
    """(bytes with up to STEP packed tokens, bytes of another STEP) of a TurboKVCache with one head."""
    import mlx.core as mx

    fewest, steps, sizes = config.sink + config.recent + STEP, 8, []
    with use_backend("cpu"):
        for n in (fewest, fewest + steps * STEP):
            cache = TurboKVCache(config)
            cache.update_and_fetch(
                *(
                    mx.random.normal((1, 1, n, dim), key=mx.random.key(0)).astype(getattr(mx, dtype))
                    for dim in (key_dim, value_dim)
                )
            )
            sizes.append(cache.nbytes)
    return sizes[0], (sizes[1] - sizes[0]) // steps


def cache_bytes(layers: list[Layer], configs: list[TurboConfig | None], tokens: int) -> int:
    """Bytes of a prompt cache that holds a number of tokens of one sequence.

    layers, configs: from `layers_of` and `configs_of`. A compressed layer counts at least sink + recent + STEP tokens.
    What depends on the text is not counted: means, and the key bits that `auto` chooses.
    """
    total = 0
    for layer, config in zip(layers, configs):
        if config is None or layer.shape is None:
            total += layer.nbytes(tokens)
            continue
        least, step = _measured(replace(config, auto=False), *layer.shape[1:], layer.dtype)
        packed = max(tokens - config.sink - config.recent, 1)
        if layer.window:
            window = RotatingTurboKVCache(layer.window, config.sink, config)
            rows = min(-(-packed // window.step) * window.step, window.room)
            total += layer.shape[0] * (least - step + step * rows // STEP)
            continue
        total += layer.shape[0] * (least + step * (-(-packed // STEP) - 1))
    return total


def tokens_that_fit(layers: list[Layer], configs: list[TurboConfig | None], memory: int, batch: int = 1) -> int | None:
    """The largest number of tokens for which the caches of `batch` sequences, each with that many, take at most
    `memory` bytes; None if there is no limit."""

    def fits(tokens: int) -> bool:
        return batch * cache_bytes(layers, configs, tokens) <= memory

    if fits(MOST_TOKENS):
        return None
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


# ---- the command ------------------------------------------------------------------------------------------------
def memory_size(text: str, flag: str = "--memory") -> int:
    """Bytes of "24GB", "24 GiB" or "24" (GB). Raises CliError for anything else."""
    try:
        return parse_size(text)
    except ValueError as e:
        raise CliError(f"{flag}: {e}") from e


def _build_parser() -> Parser:
    parser = Parser(
        prog="mlx-turbo plan",
        description="How many tokens fit in a given amount of memory with each scheme or, with --tokens, how much "
        "memory the caches take. Only the model's configuration is read; no weights are loaded. The working memory of "
        "a prompt chunk is not included.",
    )
    add = parser.add_argument
    add("--model", help="a local folder or a Hugging Face id (default: the embedded demo model)")
    add(
        "--memory",
        metavar="SIZE",
        help="memory for weights and caches together, such as 24GB (default: the working set that Metal recommends; "
        "with CUDA, the GPU's memory; without a GPU, all memory of the machine)",
    )
    add(
        "--tokens",
        type=int,
        metavar="N",
        help="number of tokens, prompt and answer together: show the memory they take",
    )
    add("--batch", type=int, default=1, metavar="N", help="number of sequences at once (default: 1)")
    add("--kv", nargs="+", action="extend", metavar="SCHEME", help=f"schemes to show (default: {' '.join(SCHEMES)})")
    add("--kv-sink", type=int, metavar="N", help="number of leading tokens kept exact")
    add("--kv-recent", type=int, metavar="N", help="minimum number of newest tokens kept exact")
    add(
        "--kv-memory",
        metavar="SIZE",
        help="show how a budget of memory for the caches alone is used as they grow, such as 6GB, or auto: what this "
        "machine has beside the weights; the same as --kv memory:SIZE",
    )
    add("--kv-floor", metavar="SCHEME", help=f"of --kv-memory: the scheme below which nothing is packed ({FLOOR.name})")
    add("--json", action="store_true", help="print JSON instead of a table")
    return parser


def stages(model: Any, config: TurboConfig, weights: int) -> dict[str, Any]:
    """How a budget of memory is used as one sequence grows: {"limit": bytes, "floor", "stages": [{"bits" (0: exact),
    "tokens": as many fit with no part at fewer bits; None: any number}, ...]}.

    config: with `memory`; "auto" is of this machine, beside weights of that many bytes. Raises CliError if nothing is
    left there, or nothing is compressed.
    """
    try:
        config = replace(config, memory=memory_beside(weights) if config.memory == "auto" else config.memory)
    except ValueError as e:
        raise CliError(f"--kv: {e}") from e
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache = make_compressed_cache(model, config)
    budget = memory_budget_of(cache)
    if budget is None:
        raise CliError(f"--kv: {config.name}: none of this model's caches is compressed")
    found = budget.stages([c for c in flatten_caches(cache) if isinstance(c, TurboKVCache)])
    return {
        "limit": budget.limit,
        "floor": budget.floor.name,
        "stages": [{"bits": bits, "tokens": tokens} for bits, tokens in found],
    }


def plan(
    name: str | Path,
    schemes: dict[str, TurboConfig | None],
    memory: int,
    tokens: int | None = None,
    batch: int = 1,
) -> dict[str, Any]:
    """The plan as a dict of plain values.

    name: a folder or a Hugging Face id. schemes: {name: TurboConfig or None}. memory: bytes. tokens: per sequence, or
    None to find how many fit. Raises CliError for a configuration or a scheme that does not work.
    """
    config, weights, source = read_config(name)
    model = build(config)
    layers = layers_of(model)
    rows = []
    budgets = {name: turbo for name, turbo in schemes.items() if turbo is not None and turbo.memory is not None}
    for scheme, turbo in schemes.items():
        if scheme in budgets:
            continue
        configs = configs_of(model, turbo, layers)
        far = [cache_bytes(layers, configs, n) for n in (2**24, 2**25)]
        row: dict[str, Any] = {
            "kv": scheme,
            "compressed": sum(map(is_compressed, layers, configs)),
            "bytes_per_token": (far[1] - far[0]) / 2**24,
        }
        if tokens is None:
            row["tokens"] = 0
        else:
            row["cache_bytes"] = batch * cache_bytes(layers, configs, tokens)
        rows.append((row, configs))
    if weights is None:
        weights, source = parameter_bytes(model, config), "computed"
    for row, configs in rows:
        if tokens is None:
            row["tokens"] = tokens_that_fit(layers, configs, memory - weights, batch)
        else:
            row |= {"total_bytes": row["cache_bytes"] + weights, "fits": row["cache_bytes"] + weights <= memory}
    text = config.get("text_config") or config
    kinds: dict[str, int] = {}
    for layer in layers:
        kinds[layer.describe()] = kinds.get(layer.describe(), 0) + 1
    return {
        "model": str(name),
        "model_type": config["model_type"],
        "caches": len(layers),
        "kinds": kinds,
        "context": text.get("max_position_embeddings"),
        "weights_bytes": weights,
        "weights_source": source,
        "memory_bytes": memory,
        "batch": batch,
        "tokens": tokens,
        "results": [row for row, _ in rows],
        "budgets": {name: stages(model, turbo, weights) for name, turbo in budgets.items()},
    }


def _print_table(p: dict[str, Any], memory_is: str) -> None:
    source = {
        "files": "size of the files",
        "index": "from the index of the files",
        "Hub": "size of the files on the Hub",
        "computed": "computed from the configuration",
    }[p["weights_source"]]
    print(f"{p['model']} ({p['model_type']}): {p['caches']} caches")
    for kind, n in p["kinds"].items():
        print(f"  {n} x {kind}")
    print(f"memory  {_size(p['memory_bytes']):>12} ({memory_is})")
    print(f"weights {_size(p['weights_bytes']):>12} ({source})")
    left = _size(p["memory_bytes"] - p["weights_bytes"])
    print(f"left    {left:>12} for caches" + f" of {p['batch']} sequences" * (p["batch"] > 1) + "\n")
    for name, of_budget in p["budgets"].items():
        print(f"{name}: {_size(of_budget['limit'])} for the caches of one sequence, the weights apart")
        for stage in of_budget["stages"]:
            what = f"{stage['bits']} bits or more" if stage["bits"] else "exact"
            tokens = "any number of" if stage["tokens"] is None else f"up to {stage['tokens']:,}"
            print(f"  {what:<16}{tokens:>16} tokens")
        print(f"  {of_budget['floor']} is the floor: more tokens are refused\n")
    if not p["results"]:
        return
    sequence = " of each sequence" if p["batch"] > 1 else ""
    if p["tokens"] is None:
        print(f"{'kv':<10}{'compressed':>11}{'bytes/token':>13}{f'tokens that fit{sequence}':>20}")
        for r in p["results"]:
            tokens = "any number" if r["tokens"] is None else f"{r['tokens']:,}"
            print(f"{r['kv']:<10}{r['compressed']:>11}{r['bytes_per_token']:>13,.0f}{tokens:>20}")
    else:
        print(
            f"{p['tokens']:,} tokens{sequence}\n{'kv':<10}{'compressed':>11}{'bytes/token':>13}{'caches':>12}"
            f"{'with weights':>14}{'fits':>6}"
        )
        for r in p["results"]:
            print(
                f"{r['kv']:<10}{r['compressed']:>11}{r['bytes_per_token']:>13,.0f}{_size(r['cache_bytes']):>12}"
                f"{_size(r['total_bytes']):>14}{'yes' if r['fits'] else 'no':>6}"
            )
    print(
        "\ncompressed: number of compressed caches; the others stay as mlx-lm makes them. bytes/token: what one more "
        "token of a sequence takes.\nNot included: the working memory of a prompt chunk."
    )
    if any(r["kv"].startswith("auto:") for r in p["results"]):
        print("auto:BITS: shown as if all layers needed the same; the average is that of any other choice.")
    if any(r["kv"] == "auto" for r in p["results"]):
        print(
            "auto: shown as if turbo4 is enough for every layer; it decides on the first prompt chunk, and keys can "
            "take more."
        )
    most = max((r["tokens"] or 0 for r in p["results"]), default=0) if p["tokens"] is None else p["tokens"]
    if p["context"] and most > p["context"]:
        print(f"The model was made for {p['context']:,} tokens.")


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    args = _build_parser().parse_args(argv)
    for name, value in (("tokens", args.tokens), ("batch", args.batch)):
        if value is not None and value < 1:
            raise CliError(f"--{name}: got {value}, expected a whole number of at least 1")
    if args.kv_memory is not None:
        args.kv = [*(args.kv or ()), MEMORY + args.kv_memory]
    schemes = {scheme: kv_config(scheme, args) for scheme in args.kv or SCHEMES}
    memory, memory_is = (memory_size(args.memory), "--memory") if args.memory else machine_memory()
    p = plan(args.model or DEMO_MODEL, schemes, memory, args.tokens, args.batch)
    if p["weights_bytes"] > memory and args.tokens is None:
        raise CliError(
            f"--memory: the weights alone are {_size(p['weights_bytes'])}, more than {_size(memory)} "
            f"({memory_is}); --tokens shows what the caches take"
        )
    if args.json:
        json.dump(p | {"memory_is": memory_is}, sys.stdout, indent=2)
        print()
    else:
        _print_table(p, memory_is)
    return 0
