"""Random orthogonal rotations: fixed signs and Hadamard transforms, and the dense QR rotation.

The product's rotation is one or two rounds of "multiply by a diagonal, transform a window":

* head_dim a power of two: one round over all dims, y = H (s * x) / sqrt(D).
* otherwise two overlapping rounds of the largest power of two P < D: over the first P dims, then, with new
  signs, over the last P. No padding; energy mixes between the windows because they overlap in 2 P - D dims.

The diagonal carries signs and normalization together, so that a round costs one multiplication per value, which
the kernels fuse with centering.
"""

import functools
from typing import Any, Optional

import numpy as np

MIN_HEAD_DIM, MAX_HEAD_DIM, HEAD_DIM_MULTIPLE = 32, 576, 4


ALLOWED_HEAD_DIMS = f"multiples of {HEAD_DIM_MULTIPLE} from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}"


def can_rotate(head_dim: Any) -> bool:
    """Whether a rotation and a packed row exist for `head_dim`."""
    ok = isinstance(head_dim, (int, np.integer)) and MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM
    return bool(ok and head_dim % HEAD_DIM_MULTIPLE == 0)


def check_head_dim(head_dim: Any, name: str = "head_dim") -> None:
    """Raise ValueError, naming `name`, unless `can_rotate`."""
    if not can_rotate(head_dim):
        raise ValueError(f"{name}: got {head_dim!r}, allowed are {ALLOWED_HEAD_DIMS}")


def windows(head_dim: int) -> tuple[tuple[int, int], ...]:
    """The Hadamard windows (start, size) of the rounds, in order."""
    size = 1 << (head_dim.bit_length() - 1)
    return ((0, size),) if size == head_dim else ((0, size), (head_dim - size, size))


def signs(n: int, stream: int) -> np.ndarray:
    """n signs, float64 [n], from splitmix64 of a counter: the same on every machine and in every version,
    because a saved cache can only be read with the signs it was written with."""
    with np.errstate(over="ignore"):
        z = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z += np.uint64(stream) * np.uint64(0xD1342543DE82EF95)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return 1.0 - 2.0 * ((z ^ (z >> np.uint64(31))) >> np.uint64(63)).astype(np.float64)


@functools.lru_cache(maxsize=None)
def diagonals(head_dim: int, seed: int = 0) -> np.ndarray:
    """The diagonal of each round, float64 [rounds, head_dim]: +-1/sqrt(P) inside its window, 1 outside.

    Raises ValueError for a head_dim that `check_head_dim` refuses.
    """
    check_head_dim(head_dim)
    rows = np.ones((len(windows(head_dim)), head_dim))
    for i, (start, size) in enumerate(windows(head_dim)):
        rows[i, start : start + size] = signs(size, 2 * seed + i) / np.sqrt(size)
    rows.flags.writeable = False
    return rows


def hadamard(x: np.ndarray) -> np.ndarray:
    """Unnormalized Walsh-Hadamard transform of the last axis (a power of two), Sylvester order."""
    shape, size = x.shape, x.shape[-1]
    half = 1
    while half < size:
        x = x.reshape(*shape[:-1], size // (2 * half), 2, half)
        x = np.stack([x[..., 0, :] + x[..., 1, :], x[..., 0, :] - x[..., 1, :]], -2)
        half *= 2
    return x.reshape(shape)


def _transform_window(x: np.ndarray, start: int, size: int) -> np.ndarray:
    return np.concatenate([x[..., :start], hadamard(x[..., start : start + size]), x[..., start + size :]], -1)


def rotate(x: np.ndarray, seed: int = 0) -> np.ndarray:
    """Rotate vectors x [..., head_dim], float64. Orthogonal: norms and dot products are kept."""
    x = np.asarray(x, np.float64)
    for diagonal, window in zip(diagonals(x.shape[-1], seed), windows(x.shape[-1])):
        x = _transform_window(x * diagonal, *window)
    return x


def unrotate(y: np.ndarray, seed: int = 0) -> np.ndarray:
    """Inverse (and transpose) of `rotate`, y [..., head_dim], float64."""
    y = np.asarray(y, np.float64)
    for diagonal, window in reversed(list(zip(diagonals(y.shape[-1], seed), windows(y.shape[-1])))):
        y = _transform_window(y, *window) * diagonal
    return y


def matrix(head_dim: int, seed: int = 0) -> np.ndarray:
    """`rotate` as a matrix R [head_dim, head_dim] with y = R x."""
    return rotate(np.eye(head_dim), seed).T


def dense(head_dim: int, seed: int = 0, out: Optional[np.ndarray] = None) -> np.ndarray:
    """A Haar-distributed orthogonal matrix [head_dim, head_dim], float64: Q of the QR decomposition of a Gaussian
    matrix, with the sign of R's diagonal folded in (without it the distribution is not uniform; Mezzadri 2007).

    The Gaussian matrix is generated straight into the result (`out`, made if absent), which Q then overwrites.
    This is the rotation llama.cpp's fork builds in `turbo_init_rotation`; `llama_blocks.init_rotation` has its
    generator. Raises ValueError if `out` is not a C-contiguous float64 [head_dim, head_dim].
    """
    if out is None:
        out = np.empty((head_dim, head_dim))
    if out.shape != (head_dim, head_dim) or out.dtype != np.float64 or not out.flags.c_contiguous:
        raise ValueError(f"out: got {out.dtype} {out.shape}, expected C-contiguous float64 {(head_dim,) * 2}")
    np.random.default_rng(seed).standard_normal(out=out)
    q, r = np.linalg.qr(out)
    np.multiply(q, np.where(np.diag(r) < 0, -1.0, 1.0), out=out)
    return out
