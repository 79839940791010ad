"""How the attention kernel is launched: tuning, template values, blocks and limits, as pure functions of the shapes.

`plan_attend` is what a backend asks for, once per step: its layers share the result. A threadgroup works on
the rows (query heads * query tokens) of one kv head. A partition of a launch is a block, the tokens of a threadgroup:
each of its simdgroups works through a run of them tile by tile, or all share decoded tiles.
"""

import functools
import itertools
from typing import NamedTuple, Optional

from ..quant import rotation
from ..quant.scheme import BITS

MAX_QUERY_TOKENS = 16
SEGMENT_STEP = 128  # tokens of the largest tile, which meets two segments at most
BLOCKS_AT_ONCE = 8  # that a simdgroup of merge.metal reads at once
THREADGROUP_BYTES = 32768 - 1024  # what the kernel may declare, less its small arrays


class AttendTuning(NamedTuple):
    """Numbers that change the speed of `attend` and not its result. `bench kernels --tune` searches for the best."""

    accumulators: int = 64  # per lane: rows of a simdgroup * dims per lane
    tokens_per_lane: int = 2
    tokens_per_lane_few_rows: int = 4  # with at most 2 rows
    simdgroups: int = 4  # per threadgroup
    simdgroups_one_launch: int = 8
    tokens_per_block: int = 128  # at least
    simdgroups_per_launch: int = 1024  # enough to keep the largest chip busy: no more blocks than that
    simdgroups_per_launch_many_sums: int = 1024  # the same where a lane has more than 32 sums, which take registers
    one_launch_tokens: int = 1024  # up to here one threadgroup does a whole kv head, and nothing is merged
    rows_per_decode: int = 256  # about this many rows of a kv head at most share decoded tiles


# Kernels are built for these numbers of query tokens. One that is built for more than there are leaves rows out.
QUERY_TOKENS = (1, 4, 8, MAX_QUERY_TOKENS)
# Operations per (key, value) pair as counted at head_dim 128: for a row of queries, for a simdgroup that reads a tile,
# and for decoding a tile. A simdgroup that decodes for itself takes 8.0.
ROW, READ_TILE, DECODE_TILE = 2.1, 3.2, 7.4
ROW_IN_DEVICE_MEMORY = 0.05  # added for a row whose query is not in threadgroup memory: a guess at the price of reading
MOST_ROWS = 12  # of a simdgroup that shares tiles
FEW_SUMS = 32  # of a lane: they leave registers for twice as many simdgroups
SPILLING_ROWS, SPILLING = 8, 1.4  # a simdgroup with more than 8 rows takes 1.4 times the operations: a guess at spills
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
    def rows(self) -> int:
        """Rows that a threadgroup works on, for which packed words are decoded once."""
        return self.ROWS * (self.SIMDGROUPS if self.SHARED_TILES else 1)


class AttendPlan(NamedTuple):
    """One call of `attend`: one launch, or two where the results of blocks are merged."""

    shape: AttendShape
    single_launch: bool
    row_groups: int  # threadgroups beside each other that share a kv head's rows
    n_groups: int  # batch rows * kv heads * row_groups
    exact_blocks: int  # of the blocks of each group, those of exact tokens; with one launch, of the simdgroups
    blocks: int
    partial_rows: int  # rows of a block's partial results: those there are, or those a launch has room for
    partial_dim: int  # numbers of such a row
    n_partials: int  # float32 numbers between two launches
    merge_simdgroups: int  # per threadgroup of merge.metal

    @property
    def grid(self) -> tuple[int, int, int]:
        """Threads of the launch of attend.metal."""
        return 32, self.blocks * self.shape.SIMDGROUPS, self.n_groups

    @property
    def threadgroup(self) -> tuple[int, int, int]:
        """Threads of a threadgroup of attend.metal."""
        return 32, self.shape.SIMDGROUPS, 1


def plan_attend(
    tuning: AttendTuning,
    keys: tuple[int, int],
    values: tuple[int, int],
    batch: int,
    n_heads: int,
    n_kv_heads: int,
    n_query_tokens: int,
    counts: tuple[int, int, int],
    always_two_launches: bool = False,
    rope: tuple[int, int] = (0, 0),
) -> AttendPlan:
    """The launches of `attend`. keys, values: (bits, head_dim); rope: of RoPE keys beside latents, if there are any.
    counts: sink, packed and recent tokens.

    Raises ValueError for what `attend_unsupported` names.
    """
    (key_bits, key_dim), (value_bits, value_dim) = keys, values
    if reason := attend_unsupported(key_bits, value_bits, key_dim, value_dim, n_query_tokens):
        raise ValueError(reason)
    if rope[1] and (reason := attend_unsupported(*(rope[0], value_bits), *(rope[1], value_dim), n_query_tokens)):
        raise ValueError(reason)
    gqa, query_dim = n_heads // n_kv_heads, key_dim + rope[1]
    key_bits = key_bits or rope[0]  # there is another query for packed tokens
    shape_of = functools.partial(
        attend_shape, tuning, key_bits, value_bits, key_dim, value_dim, gqa, n_query_tokens, query_dim=query_dim
    )
    single_launch = not always_two_launches and n_query_tokens == 1 and sum(counts) <= tuning.one_launch_tokens
    if single_launch:
        shape = shape_of(True)
        # packed words are decoded once, or twice for 8 or more heads
        single_launch = -(-gqa // shape.rows) <= 1 + (gqa >= 8)
    if not single_launch:
        shape = shape_of(False)
    return plan_launches(
        tuning, shape, single_launch, query_dim, value_dim, batch, n_heads, n_kv_heads, n_query_tokens, counts
    )


def plan_launches(
    tuning: AttendTuning,
    shape: AttendShape,
    single_launch: bool,
    query_dim: int,
    value_dim: int,
    batch: int,
    n_heads: int,
    n_kv_heads: int,
    n_query_tokens: int,
    counts: tuple[int, int, int],
) -> AttendPlan:
    """The launches of kernels whose shape is chosen. query_dim: of the keys, and of RoPE keys beside them."""
    n_sink, n_packed, n_recent = counts
    n_rows = n_heads // n_kv_heads * n_query_tokens
    row_groups = -(-n_rows // shape.rows)
    n_groups = batch * n_kv_heads * row_groups
    exact_blocks, blocks = attend_blocks(tuning, shape, n_sink + n_recent, n_packed, n_groups, single_launch)
    partial_rows, partial_dim = n_rows, value_dim
    if shape.QUERIES_IN_DEVICE_MEMORY:  # the rotated queries lie where the results will
        partial_rows, partial_dim = row_groups * shape.rows, max(query_dim, value_dim)
    n_partials = batch * n_kv_heads * blocks * (partial_rows * partial_dim + 2 * n_rows)
    merge_simdgroups = min(max(1 + -(-blocks // BLOCKS_AT_ONCE), 4), most_merge_simdgroups(value_dim))
    return AttendPlan(
        shape,
        single_launch,
        row_groups,
        n_groups,
        exact_blocks,
        blocks,
        partial_rows,
        partial_dim,
        n_partials,
        merge_simdgroups,
    )


@functools.lru_cache(maxsize=None)
def attend_shape(
    tuning: AttendTuning,
    key_bits: int,
    value_bits: int,
    key_dim: int,
    value_dim: int,
    gqa: int,
    n_query_tokens: int,
    single_launch: bool,
    query_dim: int = 0,
) -> AttendShape:
    """The `AttendShape` for gqa query heads per kv head, of the variant with one launch or of that with two. query_dim:
    if it is more than key_dim.

    Numbers of query tokens are rounded up to those of QUERY_TOKENS, so that few kernels serve a conversation.
    """
    n_rows = gqa * next(n for n in QUERY_TOKENS if n >= n_query_tokens)
    dims = [
        e
        for e in range(8, 65, 8)
        if value_dim % e == 0 and value_dim // e <= 32 and (value_bits != 3 or e == 8 or e % 16 == 0)
    ]
    dims_per_lane = dims[0]
    if n_rows <= {2: 4, 3: 4, 5: 1}.get(value_bits, 0) and 16 in dims:
        dims_per_lane = 16  # whole words, whole units; of 5 bits these are many words for more rows
    query_dim = query_dim or key_dim
    query_bytes = (2 if single_launch and key_bits else 1) * 4 * query_dim  # of a row
    most = min(8, max(1, tuning.accumulators // dims_per_lane), THREADGROUP_BYTES * 3 // 4 // query_bytes)
    n_simdgroups = -(-n_rows // most)
    rows = -(-n_rows // n_simdgroups)
    # simdgroups side by side on the same tokens, which are decoded once for all
    if not single_launch and n_simdgroups > 1 and tuning.rows_per_decode > most:
        costs = _shared_shapes(tuning, key_dim, value_dim, n_rows, query_dim)
        if costs:
            return min(costs, key=lambda shape: costs[shape])  # decoded as rarely as can be
    tokens = tuning.tokens_per_lane_few_rows if rows <= 2 else tuning.tokens_per_lane
    simdgroups = tuning.simdgroups_one_launch if single_launch else tuning.simdgroups
    results = 8 * rows  # bytes of a simdgroup's maxima and sums
    while (
        rows * query_bytes + simdgroups * (128 * tokens * _padded(rows) + results) > THREADGROUP_BYTES
        or simdgroups * 4 * value_dim > THREADGROUP_BYTES
    ):
        if tokens > 1:
            tokens //= 2
        else:
            simdgroups //= 2
    return AttendShape(rows, tokens, dims_per_lane, simdgroups)


def _shared_shapes(
    tuning: AttendTuning, key_dim: int, value_dim: int, n_rows: int, query_dim: int
) -> dict[AttendShape, tuple[int, float]]:
    """{shape: (how often a packed word is decoded, operations)} where simdgroups share decoded tiles."""
    dims_per_lane = next(e for e in range(4, 65, 4) if value_dim % e == 0 and value_dim // e <= 32)
    most, costs = max(1, min(MOST_ROWS, tuning.accumulators // dims_per_lane)), {}
    for side_by_side in range(2, MOST_SIMDGROUPS + 1):
        groups = -(-n_rows // min(side_by_side * most, tuning.rows_per_decode))
        rows = -(-n_rows // (side_by_side * groups))
        for in_device_memory, chunks in itertools.product((False, True), (1, 2) if key_dim % 64 == 0 else (1,)):
            tile = 2 * 32 * max(key_dim // chunks + 8, (value_dim + 8) // chunks)
            if query_dim > key_dim:  # RoPE keys in the tile, and what 8-bit ones are too high
                tile += 2 * 32 // chunks * (query_dim - key_dim + 8) + 4 * rows * side_by_side
            queries = 0 if in_device_memory else rows * 4 * query_dim
            if side_by_side * (queries + 128 * _padded(rows)) + tile <= THREADGROUP_BYTES:
                shape = AttendShape(rows, 1, dims_per_lane, side_by_side, True, chunks, in_device_memory)
                per_row = ROW + in_device_memory * ROW_IN_DEVICE_MEMORY
                per_simdgroup = (rows * per_row + READ_TILE) * (SPILLING if rows > SPILLING_ROWS else 1)
                costs[shape] = groups, groups * (side_by_side * per_simdgroup + DECODE_TILE)
                break
    return costs


def _padded(rows: int) -> int:
    """Rows as the kernel's arrays have them: whole vectors of 4 from 3 on."""
    return rows if rows <= 2 else -(-rows // 4) * 4


def attend_blocks(
    tuning: AttendTuning, shape: AttendShape, n_exact: int, n_packed: int, n_groups: int, single_launch: bool
) -> tuple[int, int]:
    """(blocks of exact tokens, blocks): how the tokens are divided over simdgroups. n_groups: kv heads * batch rows *
    row groups, each of which gets these blocks."""
    tile = 32 * shape.TOKENS_PER_LANE
    if single_launch:
        exact, packed, n = -(-n_exact // tile), -(-n_packed // tile), shape.SIMDGROUPS
        if exact and packed:
            return min(max(round(n * exact / (exact + packed)), 1), n - 1), 1
        return (n if exact else 0), 1
    runs = 1 if shape.SHARED_TILES else shape.SIMDGROUPS  # of a block
    tile, least = tile * runs, tuning.tokens_per_block * runs
    few = shape.ROWS * shape.DIMS_PER_LANE <= FEW_SUMS
    simdgroups = tuning.simdgroups_per_launch if few else tuning.simdgroups_per_launch_many_sums
    most = max(simdgroups // (n_groups * runs), 2)  # all at work at the same time
    exact = -(-n_exact // max(least, -(-(n_exact + n_packed) // most)))
    tokens = max(least, -(-n_packed // max(most - exact, 1)))
    tokens = -(-tokens // tile) * tile  # whole tiles: no more blocks than get one
    return exact, exact + -(-n_packed // tokens)


def most_merge_simdgroups(value_dim: int) -> int:
    """Simdgroups of merge.metal whose sums fit into threadgroup memory: a power of two up to 16."""
    return max(n for n in (4, 8, 16) if 4 * n * value_dim <= THREADGROUP_BYTES)


@functools.lru_cache(maxsize=None)
def attend_unsupported(
    key_bits: int, value_bits: int, key_dim: int, value_dim: int, n_query_tokens: int
) -> Optional[str]:
    """Why the attention kernel does not cover this, or None if it does."""
    for name, bits, dim in (("keys", key_bits, key_dim), ("values", value_bits, value_dim)):
        if not 32 <= dim <= 576 or dim % 16 or not rotates_in_kernel(dim):
            return f"head_dim {dim} of the {name}: the kernel does multiples of 16 from 32 to 512, 544 and 576"
        if bits not in BITS:
            return f"{bits} bits of the {name}: the kernel does 0, 2, 3, 4, 5, 6 and 8"
    if not 1 <= n_query_tokens <= MAX_QUERY_TOKENS:
        return f"{n_query_tokens} query tokens: the kernel does 1 to {MAX_QUERY_TOKENS}"
    return None


@functools.lru_cache(maxsize=None)
def rotates_in_kernel(head_dim: int) -> bool:
    """Whether the transform's windows start where a lane's dims start (see tq_hadamard in metal/)."""
    dims_per_lane = 32 if head_dim > 512 else 16
    return all(n % dims_per_lane == 0 for window in rotation.windows(head_dim) for n in (*window, head_dim))


def vectors_per_simdgroup(head_dim: int) -> int:
    """How many vectors a simdgroup of quantize.metal and dequantize.metal takes: 32 / LANES there."""
    lanes = -(-head_dim // (32 if head_dim > 512 else 16))
    return 32 >> (lanes - 1).bit_length()
