"""Names of schemes ("turbo8v4"), the cache's configuration, and the bit layout of a packed row."""

import re
from dataclasses import dataclass, field, fields, replace
from typing import Any, Mapping, Optional, Sequence, Union

import numpy as np

from .sizes import parse_size, size_name

BITS = (0, 2, 3, 4, 5, 6, 8)  # per number; 0 = left in the model's dtype
PACKED_BITS = BITS[1:]
_DIGIT = f"[{''.join(map(str, BITS))}]"
BUDGETS = 2.0, 8.5  # bits per number, scales included: least and most that auto:BITS takes
SCALES = ("inner-product", "least-squares", "norm", "matched-norm")  # rules, see reference.quantize; default first
LARGEST = 65504  # largest root mean square of a vector that can be packed: scales are float16


@dataclass(frozen=True)
class Scheme:
    """Bits per number of keys and values. `turbo4` = (4, 4), `turbo8v4` = (8, 4), `turbo0v4` = (0, 4): keys exact.

    Raises ValueError for bits other than 0, 2, 3, 4, 5, 6 and 8.
    """

    key_bits: int
    value_bits: int

    def __post_init__(self) -> None:
        for name in ("key_bits", "value_bits"):
            if getattr(self, name) not in BITS:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, allowed are {BITS}")

    @classmethod
    def parse(cls, name: Union[str, "Scheme"]) -> "Scheme":
        """The scheme called `name`, or `name` itself if it is one. Raises ValueError for any other name."""
        if isinstance(name, Scheme):
            return name
        match = re.fullmatch(f"turbo({_DIGIT})(?:v({_DIGIT}))?", name) if isinstance(name, str) else None
        if not match:
            raise ValueError(
                f"scheme: got {name!r}, allowed are turboN and turboKvV with N, K, V in {BITS}, for example "
                "'turbo4', 'turbo3', 'turbo8v4' (keys 8 bits, values 4), 'turbo0v4' (keys exact), 'auto': turbo4 "
                "with more bits for the keys of layers that need them, 'auto:BITS': an average, for example "
                "'auto:4.5', and 'memory:SIZE': exact as long as the caches fit in that many bytes, for example "
                "'memory:6GB'"
            )
        return cls(*(int(b) for b in match.groups(default=match[1])))

    @property
    def name(self) -> str:
        """Its shortest name: "turbo4", "turbo8v4"."""
        keys, values = self.key_bits, self.value_bits
        return f"turbo{keys}" if keys == values else f"turbo{keys}v{values}"

    def __str__(self) -> str:
        return self.name


FLOOR = Scheme(3, 3)  # of `memory`, unless another is named: below it, what is saved costs the most
MEMORY = "memory:"  # of a scheme's name
OfWidths = tuple[tuple[int, float], ...]  # {width: nats}, as a tuple, which can be hashed
Prices = Sequence[Sequence[Union[Mapping[int, float], OfWidths]]]


@dataclass(frozen=True)
class TurboConfig:
    """How a cache stores its tokens: [sink: exact][packed][recent: exact].

    scheme: bits of packed tokens, a `Scheme` or its name. "auto" is turbo4 with `auto`, "auto:4.5" a `budget` of 4.5.
    sink: number of leading tokens kept exact.
    recent: least number of the newest tokens kept exact.
    block: number of tokens that decoding packs at a time, the oldest exact ones, once there are recent + block.
    seed: of the rotation's signs.
    scale: how the scale of a packed vector is chosen, one of SCALES (reference.quantize).
    centre: subtract a mean from keys and values where it carries most of their energy (cache/centering.py).
    balance: give the channels of keys factors, chosen by the queries of the first prompt chunk, so that the rounding
        errs least where queries look (cache/balancing.py).
    boundary: number of layers at either end of the model whose keys get at least 8 bits.
    auto: more bits for the keys of a layer whose attention errs too much on the first prompt chunk
        (cache/auto_bits.py). In models with sliding windows, 8 bits for these, and values of the other layers get the
        next width.
    budget: bits per number of packed tokens, scales included, on average over the keys and values of all layers.
        `choose_bits` finds the `schemes` that spend them best on a model; until then no cache can be made.
    schemes: a scheme for each layer of the model, in place of `scheme`: `Scheme`s or their names.
    memory: bytes, or a size as "6GB", for the caches of all layers together, which are exact as long as they fit and
        then packed to ever fewer bits (cache/memory_budget.py). "auto": what this machine has beside the model. The
        scheme "memory:6GB" says the same.
    floor: of `memory`, the scheme below which nothing is packed: what does not fit then is an error.
    prices: of `memory`, what packing costs: for each layer, of its keys and of its values, {width: nats}, as
        `choose_bits` measures it. None: every number counts alike.

    Raises ValueError for an unknown scheme, a negative size, a block below 1, an unknown scale, a budget that is not
    from 2 to 8.5, for budget, schemes or memory beside scheme, auto, boundary or each other (schemes may be what a
    budget was spent on), and for floor or prices without memory.
    """

    scheme: Scheme = field(default_factory=lambda: Scheme(4, 4))
    sink: int = 4
    recent: int = 64
    block: int = 64
    seed: int = 0
    scale: str = SCALES[0]
    centre: bool = True
    balance: bool = True
    boundary: int = 0
    auto: bool = False
    budget: Optional[float] = None
    schemes: Optional[Sequence[Scheme]] = None
    memory: Union[int, str, None] = None
    floor: Scheme = FLOOR
    prices: Optional[Prices] = None

    def __post_init__(self) -> None:
        if self.scheme == "auto":
            object.__setattr__(self, "scheme", "turbo4")
            object.__setattr__(self, "auto", True)
        if isinstance(self.scheme, str) and self.scheme.startswith("auto:"):
            object.__setattr__(self, "budget", _budget("scheme", self.scheme, self.scheme.removeprefix("auto:")))
            object.__setattr__(self, "scheme", "turbo4")
        if isinstance(self.scheme, str) and self.scheme.startswith(MEMORY):
            object.__setattr__(self, "memory", _memory("scheme", self.scheme.removeprefix(MEMORY)))
            object.__setattr__(self, "scheme", "turbo4")
        object.__setattr__(self, "scheme", Scheme.parse(self.scheme))
        if self.budget is not None:
            object.__setattr__(self, "budget", _budget("budget", self.budget, self.budget))
        if self.schemes is not None:
            object.__setattr__(self, "schemes", tuple(map(Scheme.parse, self.schemes)))
        self._check_memory()
        if self.of_all_layers and (self.scheme != Scheme(4, 4) or self.auto or self.boundary):
            name = "memory" if self.memory is not None else "budget" if self.schemes is None else "schemes"
            raise ValueError(f"{name}: says how many bits every layer gets; leave scheme, auto and boundary out")
        for name, least in (("sink", 0), ("recent", 0), ("block", 1), ("seed", 0), ("boundary", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
                raise ValueError(f"{name}: got {value!r}, allowed are whole numbers from {least} to 2**31 - 1")
        for name, allowed in (
            ("scale", SCALES),
            ("centre", (False, True)),
            ("balance", (False, True)),
            ("auto", (False, True)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, allowed are {allowed}")

    def _check_memory(self):
        try:
            object.__setattr__(self, "floor", Scheme.parse(self.floor))
        except ValueError as e:
            raise ValueError(f"floor: {str(e).partition(': ')[2].partition(' with N, K, V')[0]}") from e
        if self.memory is None:
            for name, given in (("floor", self.floor != FLOOR), ("prices", self.prices is not None)):
                if given:
                    raise ValueError(f"{name}: goes with memory")
            return
        object.__setattr__(self, "memory", _memory("memory", self.memory))
        for name in ("budget", "schemes"):
            if getattr(self, name) is not None:
                raise ValueError(f"memory: says how many bits every layer gets; leave {name} out")
        if self.prices is not None:
            object.__setattr__(self, "prices", _as_tuples(self.prices))

    @property
    def name(self) -> str:
        """For people: "auto", "turbo8v4", "auto from turbo3", "auto:4.5", "a scheme for each layer", "memory:6GB"."""
        if self.memory is not None:
            return MEMORY + (self.memory if isinstance(self.memory, str) else size_name(self.memory))
        if self.budget is not None:
            return f"auto:{self.budget:g}"
        if self.schemes is not None:
            return "a scheme for each layer"
        if not self.auto:
            return self.scheme.name
        return "auto" if self.scheme == Scheme(4, 4) else f"auto from {self.scheme.name}"

    @property
    def of_all_layers(self) -> bool:
        """Whether it is of a whole model, with a budget of bits or of memory or a scheme for each layer, and not of a
        single cache."""
        return self.budget is not None or self.schemes is not None or self.memory is not None

    def check_chosen(self) -> None:
        """Raise ValueError if there is a budget, and `choose_bits` has not spent it yet."""
        if self.budget is not None and self.schemes is None:
            raise ValueError(
                f"config: got {self.name!r}, which depends on the model; pass what "
                f"mlx_turbo.choose_bits(model, tokens, {self.name!r}) returns, with at least 320 tokens of any text"
            )

    def for_layer(self, layer: int, n_layers: int) -> "TurboConfig":
        """The configuration of layer 0 .. n_layers - 1 of a model: its own scheme, more bits for keys at the boundary,
        or with `memory` exact, which make_prompt_cache puts under the budget. Raises ValueError for a budget that is
        not spent yet, and `schemes` of another number of layers."""
        self.check_chosen()
        if self.memory is not None:
            return replace(self, scheme=Scheme(0, 0), memory=None, floor=FLOOR, prices=None)
        if self.schemes is not None:
            if len(self.schemes) != n_layers:
                raise ValueError(f"schemes: got {len(self.schemes)}, and the model has {n_layers} layers")
            return replace(self, scheme=self.schemes[layer], schemes=None, budget=None)
        keys = self.scheme.key_bits
        if not keys or self.boundary <= layer < n_layers - self.boundary:
            return self
        return replace(self, scheme=Scheme(max(keys, 8), self.scheme.value_bits))

    def of_window(self) -> "TurboConfig":
        """The configuration of a layer of a model whose attention is a sliding window: with `auto` 8 bits, because what
        a window takes does not grow."""
        bits = self.scheme.key_bits, self.scheme.value_bits
        return replace(self, scheme=Scheme(*(b and 8 for b in bits)), auto=False) if self.auto else self

    def beside_windows(self) -> "TurboConfig":
        """The configuration of the other layers of such a model: with `auto` values get the next width, because these
        few layers hold all that is far away."""
        keys, values = self.scheme.key_bits, self.scheme.value_bits
        if not self.auto or not values:
            return self
        return replace(self, scheme=Scheme(keys, min((b for b in BITS if b > values), default=values)))

    @classmethod
    def of(cls, config: Union["TurboConfig", Scheme, str], **options: Any) -> "TurboConfig":
        """A configuration from itself, a scheme or a scheme's name, with `options` replacing what it says.

        Raises ValueError for an unknown option and for what `TurboConfig` refuses.
        """
        known = [f.name for f in fields(cls)]
        if unknown := sorted(set(options) - set(known)):
            raise ValueError(f"{unknown[0]}: unknown option, allowed are {known}")
        if not isinstance(config, TurboConfig):
            config = cls(scheme=config)  # type: ignore[arg-type]  # a name is parsed
        return replace(config, **options)


def _budget(name: str, got: Any, bits: Any) -> float:
    try:
        number = float(bits)
    except (TypeError, ValueError):
        number = 0.0
    least, most = BUDGETS
    if isinstance(bits, bool) or not least <= number <= most:
        what = "auto:BITS with BITS" if name == "scheme" else "numbers"
        raise ValueError(
            f"{name}: got {got!r}, allowed are {what} from {least:g} to {most:g}: bits per number of packed tokens, "
            "scales included"
        )
    return number


def _memory(name: str, got: Any) -> Union[int, str]:
    """Bytes, or "auto"."""
    if got == "auto":
        return "auto"
    try:
        size = parse_size(got) if isinstance(got, str) else got
    except ValueError:
        size = 0
    if isinstance(size, bool) or not isinstance(size, int) or not 0 < size < 2**63:
        what = "memory:SIZE with a size" if name == "scheme" else "bytes or a size"
        got = MEMORY * (name == "scheme") + got if isinstance(got, str) else got
        raise ValueError(f"{name}: got {got!r}, allowed are {what} such as 6GB or 512MiB, and 'auto'")
    return size


def _as_tuples(prices):
    try:
        layers = tuple(
            tuple(tuple(sorted((int(width), float(nats)) for width, nats in dict(side).items())) for side in layer)
            for layer in prices
        )
    except (TypeError, ValueError):
        layers = ((),)
    widths = [(width, nats) for layer in layers for side in layer for width, nats in side]
    if any(len(layer) != 2 for layer in layers) or any(w not in PACKED_BITS or not nats >= 0 for w, nats in widths):
        raise ValueError(f"prices: expected of each layer ({{width: nats}} of keys, of values), widths {PACKED_BITS}")
    return layers


# ---- the packed row ------------------------------------------------------------------------------------------
# A row holds the codes of one vector in 32-bit words. "Half s" of a word is its bits 16s .. 16s + 15, s = 0 or 1.
# Two neighboring dims sit at the same place in both halves, so that one mask gives the pair (half2 on a GPU).
#   4 bits  word w = dims 8w .. 8w+7.    dim 8w+2j+s at bits 16s+4j .. +3, j = 0..3
#   2 bits  word w = dims 16w .. 16w+15. dim 16w+2j+s at bits 16s+2j .. +1, j = 0..7
#   8 bits  word w = dims 4w .. 4w+3.    dim 4w+2j+s at bits 16s+8j .. +7, j = 0..1
#   3 bits  unit t = dims 16t .. 16t+15: word t of plane A, and bytes i and i+2 (i = t % 2) of word t / 2 of plane B,
#           which follows plane A. dim 16t+2j+s: j = 0..4 in A at bits 16s+3j .. +2; j = 5, 6 in byte i+2s of B at
#           bits 3(j-5) .. +2; j = 7: low two bits in that byte's bits 6, 7, top bit in A at bit 16s+15.
#   5 bits  word w = dims 8w .. 8w+7 of plane A (two words per unit of 16 dims), and bits 16s+4i .. +3 (i = w % 4) of
#           word w / 4 of plane B, which follows plane A. dim 8w+2j+s: j = 0..2 in A at bits 16s+5j .. +4; j = 3: low
#           four bits in B, top bit in A at bit 16s+15.
#   6 bits  word w = dims 8w .. 8w+7 of plane A, as at 5 bits, and byte i+2s (i = w % 2) of word w / 2 of plane B.
#           dim 8w+2j+s: j = 0, 1 in A at bits 16s+10j .. +5; j = 2: low two bits in bits 0, 1 of that byte, top four
#           in A at bits 16s+6 .. +9; j = 3 in bits 2 .. 7 of that byte.
# Words are 0 where head_dim does not fill them. The scale of a row is a float16 in an array of its own.

PLANE_DIMS = {3: (16, 32), 5: (8, 32), 6: (8, 16)}  # bits: dims of a word of plane A, of plane B


def words_per_row(bits: int, head_dim: int) -> int:
    """32-bit words of a packed row."""
    if bits in PLANE_DIMS:
        return sum(-(-_whole_units(head_dim) // dims) for dims in PLANE_DIMS[bits])
    return -(-head_dim * bits // 32)


def plane_b(bits: int, head_dim: int) -> int:
    """The first word of plane B in a packed row of 3, 5 or 6 bits."""
    return _whole_units(head_dim) // PLANE_DIMS[bits][0]


def _whole_units(head_dim: int) -> int:
    return -(-head_dim // 16) * 16


def bits_per_value(bits: int, head_dim: int) -> float:
    """Stored bits per number of a packed vector, scale included. 4.125 for 4 bits at head_dim 128."""
    return (32 * words_per_row(bits, head_dim) + 16) / head_dim


def bit_fields(bits: int, head_dim: int) -> np.ndarray:
    """Where the bits of each dim's code are: int64 [n_fields, 5] of (dim, word, shift, code_shift, width).

    `width` bits of the code, from bit `code_shift` on, stand in `word` from bit `shift` on. One field per dim, or
    two where a code lies in both planes: at 3 bits the last pair of each 16 dims, at 5 and 6 bits one pair of each 8.
    """
    fields = {3: _fields_of_3_bits, 5: _fields_of_5_bits, 6: _fields_of_6_bits}.get(bits)
    if fields is None:
        return np.array(
            [
                (dim, dim * bits // 32, 16 * (dim % 2) + dim % (32 // bits) // 2 * bits, 0, bits)
                for dim in range(head_dim)
            ]
        )
    table, b = [], plane_b(bits, head_dim)
    for dim in range(head_dim):
        table += [(dim, *place) for place in fields(dim, b)]
    return np.array(table, np.int64)


# (word, shift, code_shift, width) of the fields of a dim. b: the first word of plane B.
def _fields_of_3_bits(dim: int, b: int) -> list[tuple[int, int, int, int]]:
    unit, j, s = dim // 16, dim % 16 // 2, dim % 2
    byte = 8 * (unit % 2 + 2 * s)
    if j < 5:
        return [(unit, 16 * s + 3 * j, 0, 3)]
    if j < 7:
        return [(b + unit // 2, byte + 3 * (j - 5), 0, 3)]
    return [(b + unit // 2, byte + 6, 0, 2), (unit, 16 * s + 15, 2, 1)]


def _fields_of_5_bits(dim: int, b: int) -> list[tuple[int, int, int, int]]:
    word, j, s = dim // 8, dim % 8 // 2, dim % 2
    if j < 3:
        return [(word, 16 * s + 5 * j, 0, 5)]
    return [(b + word // 4, 16 * s + 4 * (word % 4), 0, 4), (word, 16 * s + 15, 4, 1)]


def _fields_of_6_bits(dim: int, b: int) -> list[tuple[int, int, int, int]]:
    word, j, s = dim // 8, dim % 8 // 2, dim % 2
    byte = 8 * (word % 2 + 2 * s)
    if j < 2:
        return [(word, 16 * s + 10 * j, 0, 6)]
    if j == 2:
        return [(b + word // 2, byte, 0, 2), (word, 16 * s + 6, 2, 4)]
    return [(b + word // 2, byte + 2, 0, 6)]
