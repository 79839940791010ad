"""Names of schemes ("turbo8v4"), the cache's configuration, and the bit layout of a packed row."""

import re
from dataclasses import dataclass, field, fields, replace
from typing import Any, Union

import numpy as np

BITS = (0, 2, 3, 4, 8)  # per number; 0 = left in the model's dtype
SCALES = ("inner-product", "least-squares", "norm", "matched-norm")  # rules, see reference.quantize; default first


@dataclass(frozen=True)
class Scheme:
    """Bits per number of keys and values. `turbo4` = (4, 4), `turbo8v4` = (8, 4), `turbo0v4` = (0, 4): keys exact.

    Raises ValueError for bits other than 0, 2, 3, 4 and 8.
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
        match = re.fullmatch(r"turbo([02348])(?:v([02348]))?", name) if isinstance(name, str) else None
        if not match:
            raise ValueError(
                f"scheme: got {name!r}, allowed are turboN and turboKvV with N, K, V in {BITS}, for example "
                "'turbo4', 'turbo3', 'turbo8v4' (keys 8 bits, values 4), 'turbo0v4' (keys exact), and 'auto': turbo4 "
                "with more bits for the keys of layers that need them"
            )
        return cls(*(int(b) for b in match.groups(default=match[1])))

    @property
    def name(self) -> str:
        """Its shortest name: "turbo4", "turbo8v4"."""
        keys, values = self.key_bits, self.value_bits
        return f"turbo{keys}" if keys == values else f"turbo{keys}v{values}"

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class TurboConfig:
    """How a cache stores its tokens: [sink: exact][packed][recent: exact].

    scheme: bits of packed tokens, a `Scheme` or its name. "auto" is turbo4 with `auto`.
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
        (cache/auto_bits.py).

    Raises ValueError for an unknown scheme, a negative size, a block below 1, or an unknown scale.
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

    def __post_init__(self) -> None:
        if self.scheme == "auto":
            object.__setattr__(self, "scheme", "turbo4")
            object.__setattr__(self, "auto", True)
        object.__setattr__(self, "scheme", Scheme.parse(self.scheme))
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

    @property
    def name(self) -> str:
        """For people: "auto", "turbo8v4", "auto from turbo3"."""
        if not self.auto:
            return self.scheme.name
        return "auto" if self.scheme == Scheme(4, 4) else f"auto from {self.scheme.name}"

    def for_layer(self, layer: int, n_layers: int) -> "TurboConfig":
        """The configuration of layer 0 .. n_layers - 1 of a model: more bits for keys at the boundary."""
        keys = self.scheme.key_bits
        if not keys or self.boundary <= layer < n_layers - self.boundary:
            return self
        return replace(self, scheme=Scheme(max(keys, 8), self.scheme.value_bits))

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


# ---- the packed row ------------------------------------------------------------------------------------------
# A row holds the codes of one vector in 32-bit words. "Half s" of a word is its bits 16s .. 16s + 15, s = 0 or 1.
# Two neighboring dims sit at the same place in both halves, so that one mask gives the pair (half2 on a GPU).
#   4 bits  word w = dims 8w .. 8w+7.    dim 8w+2j+s at bits 16s+4j .. +3, j = 0..3
#   2 bits  word w = dims 16w .. 16w+15. dim 16w+2j+s at bits 16s+2j .. +1, j = 0..7
#   8 bits  word w = dims 4w .. 4w+3.    dim 4w+2j+s at bits 16s+8j .. +7, j = 0..1
#   3 bits  unit t = dims 16t .. 16t+15: word t of plane A, and bytes i and i+2 (i = t % 2) of word t / 2 of plane B,
#           which follows plane A. dim 16t+2j+s: j = 0..4 in A at bits 16s+3j .. +2; j = 5, 6 in byte i+2s of B at
#           bits 3(j-5) .. +2; j = 7: low two bits in that byte's bits 6, 7, top bit in A at bit 16s+15.
# Words are 0 where head_dim does not fill them. The scale of a row is a float16 in an array of its own.


def words_per_row(bits: int, head_dim: int) -> int:
    """32-bit words of a packed row."""
    if bits == 3:
        units = -(-head_dim // 16)
        return units + -(-units // 2)
    return -(-head_dim * bits // 32)


def bits_per_value(bits: int, head_dim: int) -> float:
    """Stored bits per number of a packed vector, scale included. 4.125 for 4 bits at head_dim 128."""
    return (32 * words_per_row(bits, head_dim) + 16) / head_dim


def bit_fields(bits: int, head_dim: int) -> np.ndarray:
    """Where the bits of each dim's code are: int64 [n_fields, 5] of (dim, word, shift, code_shift, width).

    `width` bits of the code, from bit `code_shift` on, stand in `word` from bit `shift` on. One field per dim;
    at 3 bits the last pair of each 16 dims has two.
    """
    table, plane_b = [], -(-head_dim // 16)
    for dim in range(head_dim):
        if bits != 3:
            word, r = divmod(dim, 32 // bits)
            table.append((dim, word, 16 * (r % 2) + bits * (r // 2), 0, bits))
            continue
        unit, r = divmod(dim, 16)
        j, s = divmod(r, 2)
        byte = 8 * (unit % 2 + 2 * s)
        if j < 5:
            table.append((dim, unit, 16 * s + 3 * j, 0, 3))
        elif j < 7:
            table.append((dim, plane_b + unit // 2, byte + 3 * (j - 5), 0, 3))
        else:
            table.append((dim, plane_b + unit // 2, byte + 6, 0, 2))
            table.append((dim, unit, 16 * s + 15, 2, 1))
    return np.array(table, np.int64)
