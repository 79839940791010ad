"""`auto:BITS`: a budget of bits per number, spent where a model needs it. Decided once per model, by its own output.

A text passes through exact caches. Then the keys, or the values, of one layer at a time are taken packed, and the model
reads the tokens that follow: what that costs is the KL divergence of its output from the one with exact caches. (The
error of a layer's own attention is no price: an error in one layer may cost the model a thousand times what it costs in
another one.) `quant/budget.py` chooses the widths by these prices.

Activations are float32 meanwhile, whatever the weights are: the rounding of bfloat16 alone costs more than packing a
layer.
"""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional, Union

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from ..cache.single import TurboKVCache
from ..quant.budget import Part, average_bits, cheapest_widths
from ..quant.scheme import FLOOR, PACKED_BITS, Scheme, TurboConfig
from .libraries import language_model
from .prompt_cache import flatten_caches, make_prompt_cache

FEWEST, MOST = 320, 576  # tokens that are needed; that are read
READ = 128  # of these, the last ones are read with packed keys or values behind them
FIRST = 3  # bits at which every part is measured: errors are large enough to stand out and small enough to add up
LARGE = 0.02  # nats; a part that costs more is measured with more bits too: its error is not quadratic there
_Key = tuple[int, int]  # of a part: layer, and 0 for keys or 1 for values
TEXT = Path(__file__).with_name("calibration.txt")


def choose_bits(
    model: Any,
    tokens: Union[Sequence[int], mx.array],
    config: Union[str, TurboConfig],
    progress: Callable[[], Any] = lambda: None,
) -> TurboConfig:
    """`config` with the scheme of each layer that spends its budget best on `model`, for make_prompt_cache, enable and
    warm: keys and values at 2 to 8 bits whose average, scales included, is at most the budget. With a budget of memory,
    `config` with the prices by which its caches are packed.

    model: of mlx-lm or mlx-vlm. tokens: at least 320 token ids of any text like those the model is for; the first 576
    are read. config: "auto:4.5", "memory:6GB", or a TurboConfig with a budget. progress: called after each part
    that was measured, twice per layer or a little more often.

    Costs two passes of 128 tokens through the model per layer, and three to ten of all of them. The same tokens on the
    same machine lead to the same choice. `schemes` of the result can be kept, and given to TurboConfig again.

    Raises ValueError for a configuration without a budget, too few tokens, and a budget below what 2 bits for all
    take.
    """
    return spend(TurboConfig.of(config), Prices(model, tokens, TurboConfig.of(config)), progress)


class Prices:
    """What packing each part of a model's cache costs, measured when it is asked for the first time. Budgets that
    differ in nothing but their size can share it. Arguments and errors: of `choose_bits`."""

    def __init__(self, model: Any, tokens: Union[Sequence[int], mx.array], config: TurboConfig) -> None:
        ids = mx.array(tokens if isinstance(tokens, mx.array) else list(tokens)).reshape(1, -1)[:, :MOST]
        if config.budget is None and config.memory is None:
            raise ValueError(f"config: got {config.name!r}, expected a budget, for example 'auto:4.5' or 'memory:6GB'")
        if ids.shape[1] < FEWEST:
            raise ValueError(
                f"tokens: got {ids.shape[1]}, at least {FEWEST} are needed to choose the bits of {config.name}"
            )
        n_read = min(READ, ids.shape[1] // 4)
        self._part_of_model = language_model(model)
        with _in_float32(self._part_of_model):
            self._measure = _Measure(model, without_budget(config), ids[:, :-n_read], ids[:, -n_read:])
            self.heads = self._measure.heads()
        self.n_layers = self._measure.n_layers
        self._errors: Optional[dict[_Key, dict[int, float]]] = None

    def errors(self, progress: Callable[[], Any]) -> dict[_Key, dict[int, float]]:
        """{width: KL divergence in nats per token} of each part."""
        if self._errors is None:
            with _in_float32(self._part_of_model):
                self._errors = self._measure.errors(list(self.heads), progress)
        return self._errors


def spend(config: TurboConfig, prices: Prices, progress: Callable[[], Any] = lambda: None) -> TurboConfig:
    """`choose_bits` by prices that may have been measured already. config: the one they are of, or with another
    budget."""
    if config.memory is not None:
        found = prices.errors(progress)
        return replace(config, prices=[[found.get((i, s), {}) for s in (0, 1)] for i in range(prices.n_layers)])
    heads, budget = prices.heads, config.budget or 0.0
    least = average_bits([Part(h, {}) for h in heads.values()], [PACKED_BITS[0]] * len(heads)) if heads else 0.0
    if least > budget + 1e-9:
        raise ValueError(
            f"config: got {config.name!r}, and this model's keys and values take {least:g} bits per number even at "
            f"{PACKED_BITS[0]} bits"
        )
    errors = prices.errors(progress)
    widths = cheapest_widths([Part(h, errors[part]) for part, h in heads.items()], budget)
    of_part = dict(zip(heads, widths))
    schemes = [Scheme(of_part.get((i, 0), 4), of_part.get((i, 1), 4)) for i in range(prices.n_layers)]
    return replace(config, schemes=schemes)


def without_budget(config: TurboConfig) -> TurboConfig:
    """A configuration but for its budget: what prices depend on."""
    return replace(config, budget=None, schemes=None, memory=None, floor=FLOOR, prices=None)


@contextlib.contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """Inside this context a model's activations are float32: its embeddings are, and the rest follows."""
    embeddings = [m for m in model.modules() if isinstance(m, (nn.Embedding, nn.QuantizedEmbedding))]
    before = [m.parameters() for m in embeddings]
    try:
        for m in embeddings:
            m.update(tree_map(_widened, m.parameters()))
        yield
    finally:
        for m, parameters in zip(embeddings, before):
            m.update(parameters)


def _widened(x: mx.array) -> mx.array:
    return x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x


class _Measure:
    """What packing a part of a model's cache costs. first: token ids [1, n] behind which the ids `then` are read."""

    def __init__(self, model: Any, config: TurboConfig, first: mx.array, then: mx.array) -> None:
        self.model, self.first, self.then = language_model(model), first, then
        self.ours = [any(isinstance(m, TurboKVCache) for m in flatten_caches([c])) for c in self._new(config)]
        self.n_layers = len(self.ours)
        n = first.shape[1]
        self.config = replace(config, sink=min(config.sink, n // 8), recent=min(config.recent, n // 4), block=1)
        self.exact = self._filled(Scheme(0, 0))
        self.wanted = self._log_probabilities(self.exact)

    def heads(self) -> dict[_Key, list[tuple[int, int]]]:
        """The parts that would be packed: for each (n_kv_heads, head_dim) of its caches."""
        found: dict[_Key, list[tuple[int, int]]] = {}
        for i, layer in enumerate(self._filled(Scheme(FIRST, FIRST))):
            for cache in flatten_caches([layer]) if self.ours[i] else ():
                if isinstance(cache, TurboKVCache) and not cache.empty():
                    for at, side in enumerate(cache._sides):
                        if side.bits:
                            found.setdefault((i, at), []).append((side.recent.shape[1], side.head_dim))
        return found

    def errors(self, parts: Sequence[_Key], progress: Callable[[], Any]) -> dict[_Key, dict[int, float]]:
        """{width: KL divergence in nats per token} of each part, at FIRST bits, and on until it is not LARGE."""
        errors: dict[_Key, dict[int, float]] = {part: {} for part in parts}
        for side in 0, 1:
            left = [part for part in parts if part[1] == side]
            for width in (w for w in PACKED_BITS if w >= FIRST):
                if not left:
                    break
                packed = self._filled(Scheme(0, width) if side else Scheme(width, 0))
                for part in left:
                    layers = [*self.exact[: part[0]], packed[part[0]], *self.exact[part[0] + 1 :]]
                    errors[part][width] = self._divergence(layers)
                    progress()
                left = [part for part in left if errors[part][width] > LARGE]
        return errors

    def _new(self, config):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # given when a cache is made to be used
            return make_prompt_cache(self.model, config)

    def _filled(self, scheme):
        cache = self._new(replace(self.config, scheme=scheme))
        mx.eval(self._logits(self.first, cache), [c.state for c in cache])
        return cache

    def _logits(self, tokens, cache):
        out = self.model(tokens, cache=cache)
        return getattr(out, "logits", out)  # mlx-vlm's models return more than the logits

    def _log_probabilities(self, cache):
        logits = self._logits(self.then, [copy.deepcopy(c) for c in cache])[0].astype(mx.float32)
        return logits - mx.logsumexp(logits, axis=-1, keepdims=True)

    def _divergence(self, cache):
        got = self._log_probabilities(cache)
        return max((mx.exp(self.wanted) * (self.wanted - got)).sum(-1).mean().item(), 0.0)


def calibration_tokens(tokenizer: Any) -> list[int]:
    """Tokens of the text of this package, for programs that have none of their own: prose, code, a dialog, JSON."""
    return list(getattr(tokenizer, "tokenizer", tokenizer).encode(TEXT.read_text(encoding="utf-8")))
