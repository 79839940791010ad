"""Scalar codebooks for coordinates that are close to N(0, 1).

After a random rotation, each coordinate of a vector scaled to norm sqrt(head_dim) is nearly standard normal
(arXiv 2504.19874, section 3), so one small table of levels serves every vector.

`lloyd_max` gives the optimal levels. `product` gives the levels the Metal kernels use: a GPU computes them from
the code with a few integer and half-precision operations, without a table.

These are the difference of two float16 numbers whose bits are linear in the code, one rising and one falling. At 5 and
6 bits the best of that shape has a mean squared error 10 % and 20 % above Lloyd-Max, and uniform levels 40 % and 61 %:
a polynomial of the difference comes closer. The levels at 8 bits are those at 6 bits in between: the cell of each level
at 6 bits is divided in four, so that packed rows lose next to nothing on the way from 8 to 6 bits.
"""

import functools
import math
import statistics
from typing import Union

import numpy as np

# bits: (float16 bit pattern of f(0), shift p, scale). f(c) = float16 with the bits `base + (c << p)`.
# The slope of f doubles with each octave, so f(c) - f(n - 1 - c) is odd in c and sinh-like: close to Lloyd-Max.
# The scale minimizes the mean squared error on N(0, 1), which a test checks; at 8 bits it is that of 6 bits.
PRODUCT = {
    2: (0x3BD5, 4, 0.4557776517220176 * 128),
    3: (0x3BD2, 3, 0.25908226062160244 * 256),
    4: (0x2E76, 8, 2.102116088679744),
    5: (0x3C60, 5, 1.051300399314983),
    6: (0x3C30, 4, 1.3335264707750818),
    8: (0x4714, 0, 1.3335264707750818),
}
# bits: (power, k), found by minimizing the mean squared error, like the octave's place in f above. The difference
# t = f(c) - f(n - 1 - c), at 5 bits and more with one octave within reach of either end, becomes t * (t^power + k),
# each step rounded to float16. At 8 bits it is the curve of 6 bits, four codes for one; only the octave begins earlier,
# for levels that reach farther out.
CURVE = {5: (2, 1.90625), 6: (4, 1.65625), 8: (4, 1.65625)}

PRODUCT_BITS = tuple(PRODUCT)

KINDS = ("product", "lloyd-max")


def _cells(levels: np.ndarray) -> tuple[np.ndarray, ...]:
    """Per cell of the nearest-level quantizer of N(0, 1): edges, probability, first and second moment."""
    edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
    density = np.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)
    cdf = np.array([0.5 * math.erfc(-e / math.sqrt(2)) for e in edges])
    edge_density = np.where(np.isinf(edges), 0.0, edges) * density
    probability = np.diff(cdf)
    return edges, density, probability, -np.diff(density), probability - np.diff(edge_density)


def gaussian_mse(levels: np.ndarray) -> float:
    """Mean squared error of quantizing N(0, 1) to the nearest of `levels` [n], computed in closed form."""
    levels = np.sort(np.asarray(levels, np.float64))
    _, _, probability, first, second = _cells(levels)
    return float((second - 2 * levels * first + levels**2 * probability).sum())


@functools.lru_cache(maxsize=None)
def lloyd_max(bits: int) -> np.ndarray:
    """Levels with the least mean squared error for N(0, 1), float64 [2**bits], ascending.

    A level must be the mean of its cell and a cell edge the midpoint of its levels (Lloyd 1982, Max 1960);
    Newton's method on that fixed point, started from the high-resolution solution (quantiles of N(0, 3)).

    Raises ValueError unless 1 <= bits <= 8.
    """
    if bits not in range(1, 9):
        raise ValueError(f"bits: got {bits!r}, allowed are 1 to 8")
    n = 2**bits
    start = statistics.NormalDist(sigma=math.sqrt(3))
    levels = np.array([start.inv_cdf((i + 0.5) / n) for i in range(n)])
    for _ in range(100):
        edges, density, probability, first, _ = _cells(levels)
        mean = first / probability
        # d mean / d edge, with d edge / d level = 1/2 on either side of an inner edge
        inner = edges[1:-1]
        lower = np.concatenate([[0.0], density[1:-1] * (mean[1:] - inner)]) / probability / 2
        upper = np.concatenate([density[1:-1] * (inner - mean[:-1]), [0.0]]) / probability / 2
        jacobian = np.diag(1 - lower - upper) - np.diag(lower[1:], -1) - np.diag(upper[:-1], 1)
        step = np.linalg.solve(jacobian, levels - mean)
        levels = levels - step
        if np.abs(step).max() < 1e-14:
            break
    levels = (levels - levels[::-1]) / 2
    levels.flags.writeable = False
    return levels


def _rounded(x: np.ndarray) -> np.ndarray:
    """float64 rounded to float16: of a product of two float16 numbers and a sum with one, what fma gives."""
    return x.astype(np.float16).astype(np.float64)


@functools.lru_cache(maxsize=None)
def product(bits: int) -> np.ndarray:
    """Levels of the Metal kernels, float64 [2**bits], ascending: exactly what the GPU computes.

    scale * (f(c) - f(n - 1 - c)) with f(c) = float16 bits `base + (c << p)`, the difference rounded to float16, at 5, 6
    and 8 bits along CURVE. Mean squared error over Lloyd-Max: +0.005 %, +0.25 %, +2.5 %, +1.5 %, +0.9 %, +6.8 %.

    Raises ValueError for other bits.
    """
    if bits in PRODUCT:
        base, shift, scale = PRODUCT[bits]
        f = (base + (np.arange(2**bits) << shift)).astype(np.uint16).view(np.float16)
        t = (f - f[::-1]).astype(np.float64)
        if bits in CURVE:
            power, k = CURVE[bits]
            w = _rounded(t * t) if power == 4 else t
            t = _rounded(t * _rounded(w * w + k))
        levels = scale * t
    else:
        raise ValueError(f"bits: got {bits!r}, product levels exist for {PRODUCT_BITS}")
    levels.flags.writeable = False
    return levels


def levels(kind: Union[str, np.ndarray], bits: int) -> np.ndarray:
    """Levels by name ("product" or "lloyd-max") or as given: an ascending array [2**bits].

    Raises ValueError for an unknown name or an array that is not ascending or not of that size.
    """
    if isinstance(kind, str):
        if kind not in KINDS:
            raise ValueError(f"levels: got {kind!r}, allowed are {KINDS} or an array of 2**bits levels")
        return product(bits) if kind == "product" else lloyd_max(bits)
    table = np.asarray(kind, np.float64)
    if table.shape != (2**bits,) or not (np.diff(table) > 0).all():
        raise ValueError(f"levels: got an array of shape {table.shape}, expected {2**bits} ascending levels")
    return table


def thresholds(table: np.ndarray) -> np.ndarray:
    """Midpoints of neighboring levels, float64 [n - 1]: code c is chosen between thresholds c - 1 and c."""
    return (table[1:] + table[:-1]) / 2
