"""What a backend is given, the keys or the values of one call, and the errors it raises."""

from typing import Any, Callable, Hashable, NamedTuple, Optional

import mlx.core as mx


class BackendError(RuntimeError):
    """A backend was asked for that is not there, does not build, or computes something wrong."""


class WrongResultError(BackendError):
    """A kernel runs, and disagrees with the reference."""


def first_tokens(buffer: mx.array, n: int) -> mx.array:
    """The first n tokens of a buffer [B, H, capacity, *]; a full one is not sliced, which would take a microsecond."""
    return buffer if n == buffer.shape[2] else buffer[:, :, :n]


class Balance:
    """Factors of the channels of keys, by kv head. What is packed is (key - mean) * factors, and the queries that meet
    it are divided by the factors: a logit stays what it was, and its error gets smaller (cache/balancing.py).

    factors: positive float32 [B, H, 1, D]; nothing changes them. What kernels make of them is kept beside them.
    """

    def __init__(self, factors: mx.array) -> None:
        self.factors = factors
        self._made: dict[Hashable, Any] = {}

    def made(self, make: Callable[..., mx.array], *args: Any) -> mx.array:
        """make(factors, *args), made once."""
        key = make, args
        if key not in self._made:
            self._made[key] = array = make(self.factors, *args)
            mx.async_eval(array)  # what is lazy cannot be used from another thread
        return self._made[key]

    def arrays(self) -> list[mx.array]:
        """All that is held."""
        return [self.factors, *self._made.values()]

    def __deepcopy__(self, memo: Any) -> "Balance":
        return self


ONE_SEGMENT = 1 << 30  # of QuantizeSide and CachedSide: all packed tokens have the same mean


class QuantizeSide(NamedTuple):
    """Vectors to quantize. x: [B, H, L, D]. mean: None, or float32 [B, H, S, D], of each of the S segments of `segment`
    tokens that they lie in, if the first of them is packed token `first`."""

    x: mx.array
    bits: int
    mean: Optional[mx.array] = None
    balance: Optional[Balance] = None
    first: int = 0
    segment: int = ONE_SEGMENT

    def centered(self) -> mx.array:
        """What is rotated, float32 [B, H, L, D]."""
        x, mean = self.x.astype(mx.float32), self.mean
        if mean is not None and mean.shape[2] > 1:
            mean = mx.take(mean, (mx.arange(x.shape[2]) + self.first % self.segment) // self.segment, axis=2)
        x = x if mean is None else x - mean
        return x if self.balance is None else x * self.balance.factors


class PackedSide(NamedTuple):
    """Packed rows. codes: uint32 [B, H, capacity, words]. scale: float16 [B, H, capacity, 1].
    mean: float32 [B, H, 1, head_dim] or None."""

    codes: mx.array
    scale: mx.array
    bits: int
    head_dim: int
    mean: Optional[mx.array] = None
    balance: Optional[Balance] = None

    def turned_back(self, x: mx.array) -> mx.array:
        """Vectors x float32 [B, H, L, head_dim] that are un-rotated, as they were before `centered`."""
        x = x if self.balance is None else x / self.balance.factors
        return x if self.mean is None else x + self.mean


def are_latents(n_kv_heads: int, key_dim: int, value_dim: int) -> bool:
    """Whether such keys and values are the latents and the RoPE keys of multi-head latent attention, as mlx-lm's models
    cache them: one kv head, and at least twice as many dims of the former (512 and 64)."""
    return n_kv_heads == 1 and key_dim >= 2 * value_dim


class CachedSide(NamedTuple):
    """The keys or the values of a cache, as `attend` reads them: whole buffers, whatever their length, or None.

    sink, recent: exact tokens, [B, Hkv, capacity, head_dim] in the model's dtype. codes: uint32 [B, Hkv, capacity,
    words] and scale: float16 [B, Hkv, capacity, 1]; with 0 bits codes are exact vectors and scale is None.
    means: float16 [B, Hkv, capacity, head_dim] in rotated space, added to packed token p: that of row p // segment.
    segment: a multiple of 128 for keys, ONE_SEGMENT for values. balance: of H heads; only of keys. All three are for
    packed sides (bits > 0) only.
    """

    sink: Optional[mx.array]
    codes: Optional[mx.array]
    scale: Optional[mx.array]
    recent: Optional[mx.array]
    bits: int
    head_dim: int
    means: Optional[mx.array] = None
    segment: int = 0
    balance: Optional[Balance] = None

    def packed(self) -> PackedSide:
        """Its packed rows without the means, as the dequantize kernel takes them. There must be some."""
        assert self.codes is not None and self.scale is not None
        return PackedSide(self.codes, self.scale, self.bits, self.head_dim, None, self.balance)

    @property
    def has_means(self) -> bool:
        """Whether packed tokens are relative to means."""
        return bool(self.bits) and self.means is not None

    @property
    def n_kv_heads(self) -> int:
        """Of the first array that is there."""
        for array in (self.recent, self.codes, self.sink):
            if array is not None:
                return array.shape[1]
        raise ValueError("the side of a cache: it has no tokens")

    def exact_dtype(self, otherwise: mx.Dtype) -> mx.Dtype:
        """The dtype of exact tokens; `otherwise` if there are none."""
        array = self.sink if self.recent is None else self.recent
        return otherwise if array is None else array.dtype


class RopePart(NamedTuple):
    """Of multi-head latent attention, what the position adds to the logits: queries . keys, without a scale.

    queries: [B, n_heads, L, R]. keys: of R dims, with the counts of the latents, neither balanced nor relative to
    means."""

    queries: mx.array
    keys: CachedSide
