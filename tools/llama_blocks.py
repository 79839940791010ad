"""The KV-cache blocks of llama.cpp's TurboQuant forks, in NumPy: pack, unpack, quantize, dequantize.

For comparing our codes with theirs, byte for byte. Nothing in the cache or the kernels uses this layout.

One block is one C struct without padding, all fields little-endian (`ggml/src/ggml-common.h`):

    block_turbo2_0   norm: float16 | qs: 2-bit codes, 4 per byte
    block_turbo3_0   norm: float16 | qs: low 2 bits, 4 per byte | signs: top bit, 8 per byte
    block_turbo4_0   norm: float16 | [rnorm: float16] | qs: 4-bit codes, 2 per byte

Within a byte, the value with the lower position sits in the lower bits. `signs` is a historical name: in
the first days of the fork (da7c83f20) turbo3 was 2 bits plus the sign of a QJL projection, with a second
float16 `rnorm` (52 bytes per 128 values), and turbo4 was 3 bits plus QJL (`norm`, `rnorm`, 48 bytes of 3-bit
codes that straddle bytes, 16 bytes of signs: 68 bytes). Both were dropped because QJL made perplexity worse;
neither is supported here. What is: every layout without QJL (`FORMATS`).

Compared with the C code compiled (x86-64, no fused multiply-add) on 20 000 random groups, each format: same bytes
but for 2 to 6 of 2 560 000 codes, all within 2e-8 of a boundary, and one unit in the last place of up to 0.13 % of
the norms: float32 sums against float64. `init_rotation` agrees bit for bit.

Order of operations, the same for all (`quantize_row_turbo{2,3,4}_0_ref` in `ggml/src/ggml-turbo-quant.c`): per
group of 128 values, take the norm, divide by it, rotate, compare every coordinate with the midpoints of the
levels, store the group's norm divided by the norm of the chosen levels. Rows that are no multiple of 128 are
zero-padded by the fork before they get here (its pull request 30). Their dequantization leaves rows rotated:
the graph rotates the query instead.

Sources (facts only): github.com/TheTom/llama-cpp-turboquant at 69d8e4be4 (May 2026) and at 172fc85be (blocks of
32, March 2026), github.com/spiritbuun/buun-llama-cpp at 1c4788192 (turbo4 without `rnorm`).
"""

import math
from dataclasses import dataclass

import numpy as np

GROUP_SIZE = 128  # values that share a rotation and a norm: QK_TURBO3_GROUP, TURBO_D
NORM_RULES = ("norm", "matched", "least_squares")

_PLANE_WIDTHS = {2: (2,), 3: (2, 1), 4: (4,)}  # bits of a code per array of the struct, lowest first
_SMALLEST_NORM = 1e-10  # below it the C code treats a vector as zero
_LARGEST_FLOAT16 = 65504.0


@dataclass(frozen=True)
class BlockFormat:
    """One C struct and the codebook its codes refer to.

    name: the struct's name, with a suffix where the forks gave two structs the same name.
    bits: per code, 2 to 4.
    values_per_block: codes in one struct (QK_TURBO2, QK_TURBO3, QK_TURBO4); divides GROUP_SIZE.
    levels: 2**bits ascending values for the coordinates of a unit vector with 128 dimensions, N(0, 1/128).
    boundaries: 2**bits - 1 values; a coordinate equal to one gets the upper code. Kept apart from the levels
        because the C code has them as literals with six decimals, not as exact midpoints.
    reserved_bytes: between norm and codes, written as zero and not read.
    """

    name: str
    bits: int
    values_per_block: int
    levels: tuple[float, ...]
    boundaries: tuple[float, ...]
    reserved_bytes: int = 0

    @property
    def bytes_per_block(self) -> int:
        return 2 + self.reserved_bytes + self.values_per_block * self.bits // 8

    @property
    def bits_per_value(self) -> float:
        return 8 * self.bytes_per_block / self.values_per_block


def _mirror(*positive):
    return tuple(-v for v in reversed(positive)) + positive


def _mirror_around_zero(*positive):
    return tuple(-v for v in reversed(positive)) + (0.0,) + positive


# Mean squared error of the four tables on N(0, 1/128), times 128: 0.11748, 0.03457, 0.00950 and, too narrow,
# 0.02027; Lloyd-Max has 0.11748, 0.03455 and 0.00950. (The 3-bit table has not fully converged.)
_LEVELS_2BIT = _mirror(0.039994, 0.133462)  # CENTROIDS_2BIT
_BOUNDARIES_2BIT = _mirror_around_zero(0.086728)
_LEVELS_3BIT = _mirror(0.021460, 0.065717, 0.117832, 0.190685)  # CENTROIDS_3BIT
_BOUNDARIES_3BIT = _mirror_around_zero(0.043589, 0.091775, 0.154259)
# CENTROIDS_4BIT of spiritbuun/buun-llama-cpp, where the 66-byte struct comes from.
_LEVELS_4BIT = _mirror(0.011353, 0.034311, 0.058069, 0.083317, 0.111065, 0.143047, 0.182907, 0.241556)
_BOUNDARIES_4BIT = _mirror_around_zero(0.022832, 0.046190, 0.070693, 0.097191, 0.127056, 0.162977, 0.212232)
# CENTROIDS_4BIT of TheTom/llama-cpp-turboquant until its pull request 197 (June 2026): 0.61 times too narrow.
_LEVELS_4BIT_NARROW = _mirror(0.006938, 0.020989, 0.035597, 0.051262, 0.068756, 0.089527, 0.117195, 0.173926)
_BOUNDARIES_4BIT_NARROW = _mirror_around_zero(0.013963, 0.028293, 0.043430, 0.060009, 0.079142, 0.103361, 0.145560)

TURBO2_0 = BlockFormat("block_turbo2_0", 2, 128, _LEVELS_2BIT, _BOUNDARIES_2BIT)  # 34 bytes
TURBO3_0 = BlockFormat("block_turbo3_0", 3, 128, _LEVELS_3BIT, _BOUNDARIES_3BIT)  # 50 bytes
TURBO4_0 = BlockFormat("block_turbo4_0", 4, 128, _LEVELS_4BIT, _BOUNDARIES_4BIT)  # 66 bytes
# The fork before block size 128 (and buun-llama-cpp still): four blocks per group, the same norm in each.
TURBO2_0_BLOCK32 = BlockFormat("block_turbo2_0/32", 2, 32, _LEVELS_2BIT, _BOUNDARIES_2BIT)  # 10 bytes
TURBO3_0_BLOCK32 = BlockFormat("block_turbo3_0/32", 3, 32, _LEVELS_3BIT, _BOUNDARIES_3BIT)  # 14 bytes
# TURBO4_USE_4BIT=1: 4-bit codes in a struct that kept the size, and the unused rnorm, of the QJL one.
TURBO4_0_RNORM = BlockFormat(
    "block_turbo4_0/rnorm", 4, 128, _LEVELS_4BIT_NARROW, _BOUNDARIES_4BIT_NARROW, reserved_bytes=2
)  # 68 bytes
FORMATS = (TURBO2_0, TURBO3_0, TURBO4_0, TURBO2_0_BLOCK32, TURBO3_0_BLOCK32, TURBO4_0_RNORM)


def pack(indices, norms, block_format: BlockFormat) -> np.ndarray:
    """Write codes and norms as structs.

    indices: [..., values_per_block], integers from 0 to 2**bits - 1.
    norms: [...], real; rounded to float16.
    Returns uint8 [..., bytes_per_block]; `.tobytes()` is what the C code has in memory.

    Raises TypeError for indices that are no integers, ValueError for a wrong shape, a code out of range, or a
    norm that is not finite in float16.

    >>> pack([0, 1, 2, 3, 4, 5, 6, 7] * 16, 1.0, TURBO3_0)[:4].tobytes().hex()
    '003ce4e4'
    """
    indices, norms = np.asarray(indices), np.asarray(norms)
    if indices.dtype.kind not in "iu":
        raise TypeError(f"indices: got dtype {indices.dtype}; an integer dtype is needed")
    _check_last_axis("indices", indices, block_format.values_per_block, block_format)
    if norms.shape != indices.shape[:-1]:
        raise ValueError(
            f"norms: got shape {norms.shape}; one norm per block is needed, shape {indices.shape[:-1]} "
            f"for indices of shape {indices.shape}"
        )
    largest_code = 2**block_format.bits - 1
    if indices.size and (indices.min() < 0 or indices.max() > largest_code):
        raise ValueError(
            f"indices: got values from {indices.min()} to {indices.max()}; "
            f"{block_format.name} holds 0 to {largest_code}"
        )
    norms = _to_finite_float64("norms", norms)
    with np.errstate(over="ignore"):
        half_norms = norms.astype("<f2")
    if not np.isfinite(half_norms).all():
        raise ValueError(
            f"norms: got {norms.flat[np.argmax(np.abs(norms))]:g}; "
            f"the struct holds a float16, at most {_LARGEST_FLOAT16:g}"
        )

    blocks = np.zeros((*norms.shape, block_format.bytes_per_block), np.uint8)
    blocks[..., :2] = np.ascontiguousarray(half_norms)[..., None].view(np.uint8)
    remaining, start = indices.astype(np.uint8), 2 + block_format.reserved_bytes
    for width in _PLANE_WIDTHS[block_format.bits]:
        plane = _pack_plane(remaining & (2**width - 1), width)
        blocks[..., start : start + plane.shape[-1]] = plane
        remaining, start = remaining >> width, start + plane.shape[-1]
    return blocks


def unpack(blocks, block_format: BlockFormat) -> tuple[np.ndarray, np.ndarray]:
    """Read structs: the inverse of `pack`.

    blocks: uint8 [..., bytes_per_block], for instance `np.frombuffer(raw, np.uint8).reshape(-1, bytes_per_block)`.
    Returns (indices: uint8 [..., values_per_block], norms: float16 [...]). Norms come back as they lie there,
    NaN and infinity too; reserved bytes are ignored.

    Raises TypeError for another dtype, ValueError for a wrong last axis.
    """
    blocks = np.asarray(blocks)
    if blocks.dtype != np.uint8:
        raise TypeError(f"blocks: got dtype {blocks.dtype}; uint8 is needed")
    _check_last_axis("blocks", blocks, block_format.bytes_per_block, block_format)

    norms = np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0].astype(np.float16)
    indices = np.zeros((*blocks.shape[:-1], block_format.values_per_block), np.uint8)
    shift, start = 0, 2 + block_format.reserved_bytes
    for width in _PLANE_WIDTHS[block_format.bits]:
        end = start + block_format.values_per_block * width // 8
        indices |= _unpack_plane(blocks[..., start:end], width) << shift
        shift, start = shift + width, end
    return indices, norms


def quantize(x, block_format: BlockFormat, *, rotation=None, levels=None, norm_rule: str = "matched") -> np.ndarray:
    """Quantize rows as `quantize_row_turbo{2,3,4}_0_ref` does, with float64 where the C code has float32.

    x: [..., n], n a multiple of 128; every 128 values are a group with its own norm.
    rotation: orthogonal matrix R [128, 128] for R @ group (`wht_rotation()`, `init_rotation()`), or a callable
        from [..., 128] to [..., 128]; None leaves the groups as they are.
    levels: 2**bits ascending numbers to replace the fork's, for coordinates N(0, 1/128) of a unit vector; the
        boundaries are then their exact midpoints.
    norm_rule: what the struct's norm field holds, for a group of norm `n` whose unit vector rotates to `u` and
        whose chosen levels are the vector `c`:
            "norm"           n                     the paper
            "matched"        n / ||c||             the fork; the reconstruction has the group's norm
            "least_squares"  n <u, c> / <c, c>     the smallest squared error these codes allow
    Returns uint8 [..., n / values_per_block, bytes_per_block]. A zero group stores norm 0.

    Raises TypeError or ValueError, naming the argument, for wrong shapes, values that are not finite, an
    unknown rule, and (as "norms") groups whose norm exceeds 65504, the largest float16.
    """
    if norm_rule not in NORM_RULES:
        raise ValueError(f"norm_rule: got {norm_rule!r}; one of {', '.join(map(repr, NORM_RULES))} is needed")
    x = _to_finite_float64("x", x)
    if x.ndim == 0 or x.shape[-1] % GROUP_SIZE:
        raise ValueError(f"x: got shape {x.shape}; the last axis must be a multiple of {GROUP_SIZE} (pad with zeros)")
    levels, boundaries = _levels_and_boundaries(levels, block_format)

    groups = x.reshape(*x.shape[:-1], x.shape[-1] // GROUP_SIZE, GROUP_SIZE)
    with np.errstate(over="ignore"):  # an infinite norm is refused by pack
        norms = np.sqrt((groups**2).sum(axis=-1, keepdims=True))  # [..., n_groups, 1]
    unit = _divide_or(groups, norms, 0.0)
    unit_rotated = _apply("rotation", rotation, unit)
    indices = np.searchsorted(boundaries, unit_rotated, side="right")
    chosen = levels[indices]  # [..., n_groups, 128]

    squares = (chosen**2).sum(axis=-1, keepdims=True)
    if norm_rule == "matched":
        stored = norms * _divide_or(1.0, np.sqrt(squares), 1.0)
    elif norm_rule == "least_squares":
        stored = norms * _divide_or((unit_rotated * chosen).sum(axis=-1, keepdims=True), squares, 0.0)
    else:
        stored = norms
    n_blocks = x.shape[-1] // block_format.values_per_block
    indices = indices.reshape(*x.shape[:-1], n_blocks, block_format.values_per_block)
    stored = np.repeat(stored[..., 0], GROUP_SIZE // block_format.values_per_block, axis=-1)
    return pack(indices, stored, block_format)


def dequantize(blocks, block_format: BlockFormat, *, inverse_rotation=None, levels=None) -> np.ndarray:
    """Codes times norm, as `dequantize_row_turbo{2,3,4}_0`; in float64.

    blocks: uint8 [..., n_blocks, bytes_per_block].
    inverse_rotation: matrix [128, 128] or callable applied to every 128 values, so `rotation.T` of the matrix
        given to `quantize`; None leaves the rows rotated, as the fork does.
    levels: as in `quantize`, and the same.
    Returns [..., n_blocks * values_per_block].

    Raises TypeError or ValueError, naming the argument, for wrong shapes, and for norms that are not finite.
    """
    levels, _ = _levels_and_boundaries(levels, block_format)
    indices, norms = unpack(blocks, block_format)
    if norms.ndim == 0:
        raise ValueError(
            f"blocks: got shape {np.shape(blocks)}; [..., n_blocks, {block_format.bytes_per_block}] is needed"
        )
    if not np.isfinite(norms).all():
        raise ValueError(f"blocks: {np.count_nonzero(~np.isfinite(norms))} of {norms.size} norms are not finite")
    values = levels[indices] * norms[..., None].astype(np.float64)
    rows = values.reshape(*norms.shape[:-1], norms.shape[-1] * block_format.values_per_block)
    if inverse_rotation is None:
        return rows
    if rows.shape[-1] % GROUP_SIZE:
        raise ValueError(
            f"blocks: got {norms.shape[-1]} blocks of {block_format.values_per_block} values; "
            f"rotating back needs whole groups of {GROUP_SIZE} values"
        )
    groups = rows.reshape(*rows.shape[:-1], rows.shape[-1] // GROUP_SIZE, GROUP_SIZE)
    return _apply("inverse_rotation", inverse_rotation, groups).reshape(rows.shape)


def wht_rotation(head_dim: int = GROUP_SIZE) -> np.ndarray:
    """The fork's rotation: `diag(signs2) @ H @ diag(signs1) / sqrt(head_dim)`, float64 [head_dim, head_dim].

    head_dim: 128, or 64 (the fork takes the first 64 signs). Signs: `turbo_cpu_s1`, `turbo_cpu_s2` in
    ggml-turbo-quant.c, the same as in the Metal, CUDA and Vulkan code.

    Raises ValueError for another head_dim.
    """
    if head_dim not in (64, 128):
        raise ValueError(f"head_dim: got {head_dim!r}; the fork has signs for 64 and 128")
    hadamard = np.ones((1, 1))
    while len(hadamard) < head_dim:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    signs1, signs2 = (1.0 - 2.0 * bits[:head_dim] for bits in _WHT_SIGN_BITS)
    return signs2[:, None] * hadamard * signs1 / math.sqrt(head_dim)


# A set bit is -1, the first sign is the lowest bit of the first byte. The arrays are two draws of 128 from
# np.random.default_rng(42).choice([-1.0, 1.0], 128), checked with NumPy 2.4; NumPy does not promise that stream.
_WHT_SIGN_BITS = tuple(
    np.unpackbits(np.frombuffer(bytes.fromhex(bits), np.uint8), bitorder="little")
    for bits in ("59036ae44959f842bb3bc6a4a950f249", "90eeac16dc8f623f7a35a5b76265a5be")
)


def init_rotation(head_dim: int = GROUP_SIZE, seed: int = 42) -> np.ndarray:
    """The fork's dense rotation, `turbo_init_rotation` in ggml-turbo-quant.c: float32 [head_dim, head_dim].

    Gaussian numbers, row by row, from a 64-bit linear congruential generator (Knuth's MMIX constants) by
    Box-Muller; then modified Gram-Schmidt over the columns. Float32 and the C loops' order of summation, so that the
    bits agree with the C code's compiled without fused multiply-add; orthogonal to about 1e-5. The fork uses
    head_dim 128 and seed 42 (TURBO_D, TURBO_SEED_ROTATION). It rotated turbo3 and turbo4 in the beginning and turbo4
    in buun-llama-cpp's C code today; everything else moved to `wht_rotation`. Takes 0.1 s at 128.

    The Gaussian numbers go straight into the array that is returned: in the C code a second matrix on the
    stack (64 KiB) overflowed the stacks of worker threads.

    Raises ValueError for head_dim < 1 or a seed outside 0 .. 2**64 - 1.
    """
    if head_dim < 1:
        raise ValueError(f"head_dim: got {head_dim!r}; at least 1 is needed")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: got {seed!r}; 0 to 2**64 - 1 is allowed")
    state = int(seed)

    def next_uniform():
        nonlocal state
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        return (state >> 11) / 2**53

    rotation = np.empty((head_dim, head_dim), np.float32)
    for i in range(rotation.size):
        radius = math.sqrt(-2.0 * math.log(max(next_uniform(), 1e-15)))
        rotation.flat[i] = radius * math.cos(2.0 * math.pi * next_uniform())

    for j in range(head_dim):
        column, later = rotation[:, j], rotation[:, j + 1 :]
        square = np.float32(0)
        for value in column:
            square += value * value
        norm = np.sqrt(square)
        if norm > np.float32(_SMALLEST_NORM):
            column /= norm
        dots = np.zeros(later.shape[1], np.float32)
        for value, later_row in zip(column, later):
            dots += value * later_row
        for value, later_row in zip(column, later):
            later_row -= dots * value
    return rotation


def _pack_plane(values, width):
    """uint8 [..., n] of `width`-bit values -> uint8 [..., n * width / 8], the first value in the lowest bits."""
    per_byte = 8 // width
    shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(width)
    parts = values.reshape(*values.shape[:-1], values.shape[-1] // per_byte, per_byte) << shifts
    return np.bitwise_or.reduce(parts, axis=-1)


def _unpack_plane(plane, width):
    """The inverse of `_pack_plane`."""
    per_byte = 8 // width
    shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(width)
    values = (plane[..., None] >> shifts) & np.uint8(2**width - 1)
    return values.reshape(*plane.shape[:-1], plane.shape[-1] * per_byte)


def _levels_and_boundaries(levels, block_format):
    if levels is None:
        return np.array(block_format.levels), np.array(block_format.boundaries)
    levels = _to_finite_float64("levels", levels)
    if levels.shape != (2**block_format.bits,) or (np.diff(levels) <= 0).any():
        raise ValueError(
            f"levels: got {np.array2string(levels, threshold=20)}; {block_format.name} needs {2**block_format.bits} "
            f"ascending numbers"
        )
    return levels, (levels[1:] + levels[:-1]) / 2


def _apply(name, rotation, groups):
    """groups: [..., 128] -> rotation @ group for each."""
    if rotation is None:
        return groups
    if callable(rotation):
        rotated = _to_finite_float64(name, rotation(groups))
        if rotated.shape != groups.shape:
            raise ValueError(f"{name}: it returned shape {rotated.shape}; {groups.shape} is needed")
        return rotated
    matrix = _to_finite_float64(name, rotation)
    if matrix.shape != (GROUP_SIZE, GROUP_SIZE):
        raise ValueError(f"{name}: got shape {matrix.shape}; ({GROUP_SIZE}, {GROUP_SIZE}) or a callable is needed")
    return groups @ matrix.T


def _divide_or(numerator, denominator, otherwise):
    """numerator / denominator, and `otherwise` where the denominator is below the C code's threshold for zero."""
    is_zero = denominator <= _SMALLEST_NORM
    return np.where(is_zero, otherwise, numerator / np.where(is_zero, 1.0, denominator))


def _check_last_axis(name, array, length, block_format):
    if array.ndim == 0 or array.shape[-1] != length:
        raise ValueError(f"{name}: got shape {array.shape}; {block_format.name} needs [..., {length}]")


def _to_finite_float64(name, values):
    values = np.asarray(values)
    if values.dtype.kind not in "iuf":
        raise TypeError(f"{name}: got dtype {values.dtype}; real numbers are needed")
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: {np.count_nonzero(~np.isfinite(values))} of {values.size} values are not finite")
    return values
