"""What a launch of the attention kernel looks like: a pure function of the shapes and the tuning."""

import functools
import itertools
from typing import NamedTuple

from ..quant import rotation

# ---- attention: what a launch looks like ---------------------------------------------------------------------
MAX_QUERY_TOKENS = 16
SEGMENT_STEP = 128  # tokens of the largest tile, which meets two segments at most
THREADGROUP_BYTES = 32768 - 1024  # what the kernel may declare, less its small arrays
MERGE_SIMDGROUPS = 4


class AttendTuning(NamedTuple):
    """Numbers that do not change the result of `attend`, only its speed. `bench --tune` turns them."""

    accumulators: int = 64  # per lane: rows of a simdgroup * dims per lane
    tokens_per_lane: int = 2
    tokens_per_lane_few_rows: int = 4  # of at most 2 rows
    simdgroups: int = 4  # per threadgroup
    simdgroups_one_launch: int = 8
    tokens_per_block: int = 128  # at least, a block being the tokens of a simdgroup: it works one tile after the other
    simdgroups_per_launch: int = 1024  # so many keep the largest chip busy: no more blocks than that
    one_launch_tokens: int = 1024  # up to so many a threadgroup does a kv head alone and no merge is needed
    rows_per_decode: int = 256  # about so many query heads * query tokens of a kv head at most share decoded tiles


QUERY_TOKENS = (1, 4, 8, MAX_QUERY_TOKENS)  # kernels are built for so many; one for more than there are leaves rows out
# Operations per (key, value) pair as counted at head_dim 128: for a row of queries, for a simdgroup that reads a tile,
# and for decoding a tile. A simdgroup that decodes for itself takes 8.0.
ROW, READ_TILE, DECODE_TILE = 2.1, 3.2, 7.4
FAR_ROW = 0.05  # more for a row whose query is not in threadgroup memory: a guess at the price of reading it elsewhere
MOST_ROWS = 12  # of a simdgroup that shares tiles
FEW_ROWS, MANY_ROWS = 8, 1.4  # times the operations of a simdgroup with more than 8: a guess at what spills cost
MOST_SIMDGROUPS = 12  # of a threadgroup: an Apple core has registers for 384 threads of 128 registers


class AttendShape(NamedTuple):
    """Template values of attend.metal that follow from the tuning; none depends on the number of tokens."""

    ROWS: int
    TOKENS_PER_LANE: int
    DIMS_PER_LANE: int
    SIMDGROUPS: int
    SHARED_TILES: bool = False
    CHUNKS: int = 1
    QUERIES_IN_DEVICE_MEMORY: bool = False

    @property
    def rows(self):
        """Rows that a threadgroup works on, for which packed words are decoded once."""
        return self.ROWS * (self.SIMDGROUPS if self.SHARED_TILES else 1)


@functools.lru_cache(maxsize=None)
def attend_shape(tuning, key_bits, value_bits, key_dim, value_dim, gqa, n_query_tokens, one):
    """The `AttendShape` for gqa query heads per kv head; one: the variant with one launch.

    Numbers of query tokens are rounded up to those of QUERY_TOKENS, so that few kernels serve a conversation.
    """
    n_rows = gqa * next(n for n in QUERY_TOKENS if n >= n_query_tokens)
    dims = [
        e
        for e in range(8, 65, 8)
        if value_dim % e == 0 and value_dim // e <= 32 and (value_bits != 3 or e == 8 or e % 16 == 0)
    ]
    dims_per_lane = dims[0]
    if value_bits in (2, 3) and n_rows <= 4 and 16 in dims:
        dims_per_lane = 16  # whole words, whole units
    query_bytes = (2 if one and key_bits else 1) * 4 * key_dim  # of a row
    most = min(8, max(1, tuning.accumulators // dims_per_lane), THREADGROUP_BYTES * 3 // 4 // query_bytes)
    n_simdgroups = -(-n_rows // most)
    rows = -(-n_rows // n_simdgroups)
    # simdgroups side by side on the same tokens, which are decoded once for all
    if not one and n_simdgroups > 1 and tuning.rows_per_decode > most:
        costs = _shared_shapes(tuning, key_dim, value_dim, n_rows)
        if costs:
            return min(costs, key=costs.get)  # decoded as rarely as can be
    tokens = tuning.tokens_per_lane_few_rows if rows <= 2 else tuning.tokens_per_lane
    simdgroups = tuning.simdgroups_one_launch if one else tuning.simdgroups
    results = 8 * rows if one else 0  # bytes of a simdgroup's maxima and sums
    while rows * query_bytes + simdgroups * (128 * tokens * _padded(rows) + results) > THREADGROUP_BYTES or (
        one and simdgroups * 4 * value_dim > THREADGROUP_BYTES
    ):
        if tokens > 1:
            tokens //= 2
        else:
            simdgroups //= 2
    return AttendShape(rows, tokens, dims_per_lane, simdgroups)


def _shared_shapes(tuning, key_dim, value_dim, n_rows):
    """{shape: (how often a packed word is decoded, operations)} where simdgroups share decoded tiles."""
    dims_per_lane = next(e for e in range(4, 65, 4) if value_dim % e == 0 and value_dim // e <= 32)
    most, costs = max(1, min(MOST_ROWS, tuning.accumulators // dims_per_lane)), {}
    for side_by_side in range(2, MOST_SIMDGROUPS + 1):
        groups = -(-n_rows // min(side_by_side * most, tuning.rows_per_decode))
        rows = -(-n_rows // (side_by_side * groups))
        for far, chunks in itertools.product((False, True), (1, 2) if key_dim % 64 == 0 else (1,)):
            tile = 2 * 32 * max(key_dim // chunks + 8, (value_dim + 8) // chunks)
            queries = 0 if far else rows * 4 * key_dim
            if side_by_side * (queries + 128 * _padded(rows)) + tile <= THREADGROUP_BYTES:
                shape = AttendShape(rows, 1, dims_per_lane, side_by_side, True, chunks, far)
                per_simdgroup = (rows * (ROW + far * FAR_ROW) + READ_TILE) * (MANY_ROWS if rows > FEW_ROWS else 1)
                costs[shape] = groups, groups * (side_by_side * per_simdgroup + DECODE_TILE)
                break
    return costs


def _padded(rows):
    return rows if rows <= 2 else -(-rows // 4) * 4


def attend_blocks(tuning, shape, n_exact, n_packed, n_groups, one):
    """(blocks of exact tokens, blocks): how the tokens are divided over simdgroups. n_groups: kv heads * batch rows *
    row groups, each of which gets these blocks."""
    tile = 32 * shape.TOKENS_PER_LANE
    if one:
        exact, packed = -(-n_exact // tile), -(-n_packed // tile)
        if exact and packed:
            return min(
                max(round(shape.SIMDGROUPS * exact / (exact + packed)), 1), shape.SIMDGROUPS - 1
            ), shape.SIMDGROUPS
        return (shape.SIMDGROUPS if exact else 0), shape.SIMDGROUPS
    most = max(tuning.simdgroups_per_launch // n_groups, 1)
    tokens = max(tuning.tokens_per_block, -(-(n_exact + n_packed) // most))
    step = 1 if shape.SHARED_TILES else shape.SIMDGROUPS
    exact, packed = (-(-(-(-n // tokens)) // step) * step for n in (n_exact, n_packed))
    return exact, exact + packed


@functools.lru_cache(maxsize=None)
def attend_unsupported(key_bits, value_bits, key_dim, value_dim, n_query_tokens):
    """Why the attention kernel does not cover this, or None if it does."""
    for name, bits, dim in (("keys", key_bits, key_dim), ("values", value_bits, value_dim)):
        if not 32 <= dim <= 576 or dim % 16 or not rotates_in_kernel(dim):
            return f"head_dim {dim} of the {name}: the kernel does multiples of 16 from 32 to 512, 544 and 576"
        if bits not in (0, 2, 3, 4, 8):
            return f"{bits} bits of the {name}: the kernel does 0, 2, 3, 4 and 8"
    if not 1 <= n_query_tokens <= MAX_QUERY_TOKENS:
        return f"{n_query_tokens} query tokens: the kernel does 1 to {MAX_QUERY_TOKENS}"
    return None


@functools.lru_cache(maxsize=None)
def rotates_in_kernel(head_dim):
    """Whether the transform's windows start where a lane's dims start (see tq_hadamard in metal/)."""
    dims_per_lane = 32 if head_dim > 512 else 16
    return all(n % dims_per_lane == 0 for window in rotation.windows(head_dim) for n in (*window, head_dim))


def vectors_per_simdgroup(head_dim):
    """32 / LANES of the kernels."""
    lanes = -(-head_dim // (32 if head_dim > 512 else 16))
    return 32 >> (lanes - 1).bit_length()
