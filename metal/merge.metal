// merge.metal: decode attention, pass 2 of 2: merges the partials of attend.metal, un-rotates and writes the output.
// Compiled behind shared.metal, which describes the packed row. The text above the line "// ==== body" is the end of
// the header of mx.fast.metal_kernel, the rest its source.
//
// MATHEMATICS, per row: with M the largest m (and the sink's logit), f = 2^(m - M) of each block:
//   out = (sum over exact blocks f acc + R^T (sum over packed blocks f acc + mean * (packed part of the sum))) / total,
//   total = sum f sum + 2^(sink - M). Exact blocks are those below X; the packed ones are still rotated, and without
//   the UNIT of their levels.
//
// MAPPING. A threadgroup of n = number 14 simdgroups makes one row. The first ones sum the exact blocks, the others the
//   packed ones (all are the former if BITS = 0), with weights relative to the largest m of their own. Lane t knows the
//   weight of one of 32 blocks, and sums dims 4t .. 4t + 3 (and 128 further, ...) of all, with AT_ONCE blocks in
//   flight. Then the threads add the sums of the simdgroups, one dim each, and the first simdgroup un-rotates,
//   DIMS_PER_LANE = 16 dims (32 if D > 512) per lane as in dequantize.metal.
//
// INPUTS
//   acc    float [B, Hkv, blocks, ACC_ROWS, ACC_ROW], behind it [B, Hkv, R, blocks, 2] = (m, sum): as written by
//          attend.metal; R = Hq / Hkv * L; of acc the first R rows and their first D numbers
//   means  float16 [B, Hkv, CAPACITY, D], rows contiguous, rotated: row 0 is of all packed values. Read only if MEAN
//   sinks  any float type [Hq]: a logit per head that takes weight and gives no value. Read only if flag 8
//   diagonals  the same array as attend.metal's, with the same numbers; those of the values' rotation [ROUNDS, D] begin
//          at element OFFSET
// OUTPUTS
//   out    T [B, Hq, L, D]
// TEMPLATE  T float type of the output; BITS of the values, 0 = exact; D their head dim, a multiple of 16, 32 to 576;
//   MEAN: packed values have a mean; OFFSET into diagonals; ACC_ROW floats of a row of acc; MOST_SIMDGROUPS
//   per threadgroup.
// LAUNCH  grid (32, n, B * Hq * L), threadgroup (32, n, 1), n <= MOST_SIMDGROUPS.
//
// REGISTERS (estimate, 32-bit): 4 * AT_ONCE * PER_LANE of blocks in flight, 4 * PER_LANE sums and 14: 50 for D <= 128,
//   82 beyond. Threadgroup memory: 4 * MOST_SIMDGROUPS * D bytes.

constant constexpr const float TQ_LOG2E = 1.44269504f, TQ_LOWEST = -1e29f;

// ==== body
typedef Row<4, D> F;
constexpr int DIMS_PER_LANE = F::DIMS_PER_LANE, FOURS = D / 4, PER_LANE = (FOURS + 31) / 32, AT_ONCE = D <= 256 ? 8 : 4;
threadgroup float sums[MOST_SIMDGROUPS * D], weight_sums[2 * MOST_SIMDGROUPS];  // of each simdgroup; largest m, weights
int lane = thread_index_in_simdgroup, simdgroup = thread_position_in_threadgroup.y, row = thread_position_in_grid.z;
int simdgroups = tq_number(diagonals_strides, 14), exact_blocks = tq_number(diagonals_strides, 3),
    blocks = tq_number(diagonals_strides, 4), flags = tq_number(diagonals_strides, 6),
    L = tq_number(diagonals_strides, 7), Hq = tq_number(diagonals_strides, 8), Hkv = tq_number(diagonals_strides, 9);
int G = Hq / Hkv, R = G * L, head = row / R, r = row - head * R, g = r / L, b = head / Hkv;
int kvh = head - b * Hkv, query_head = kvh * G + g;
long block_floats = (long)tq_number(diagonals_strides, 12) * ACC_ROW;
const device float *ml =
    acc + (long)tq_number(diagonals_strides, 13) * Hkv * blocks * block_floats + (long)row * blocks * 2;
acc += head * blocks * block_floats + (long)r * ACC_ROW;

// ---- this simdgroup's share of the blocks: first, first + step, ... end - 1
if (BITS == 0) exact_blocks = blocks;
int share = (simdgroups * exact_blocks + blocks - 1) / blocks;  // simdgroups that sum exact blocks
share = exact_blocks == blocks ? simdgroups : min(share, simdgroups - 1);
bool exact = simdgroup < share;
int first = exact ? simdgroup : exact_blocks + simdgroup - share, step = exact ? share : simdgroups - share;
int end = exact ? exact_blocks : blocks;
float top = TQ_LOWEST, sum = 0, y[4 * PER_LANE];
for (int i = first + step * lane; i < end; i += 32 * step) top = max(top, ml[i * 2]);
top = simd_max(top);
TQ_UNROLL for (int k = 0; k < 4 * PER_LANE; k++)
  y[k] = 0;
TQ_ROLLED for (; first < end; first += 32 * step) {
  int of_lane = first + step * lane, last = min(end - 1, first + 31 * step);
  float weight = 0;
  if (of_lane < end) {
    weight = fast::exp2(ml[of_lane * 2] - top);
    sum += weight * ml[of_lane * 2 + 1];
  }
  TQ_ROLLED for (int i = first, n = 0; i <= last; i += AT_ONCE * step, n += AT_ONCE) {
    float x[AT_ONCE][4 * PER_LANE];
    TQ_UNROLL for (int j = 0; j < AT_ONCE; j++) {
      const device float4 *row_of_block = (const device float4 *)(acc + min(i + j * step, last) * block_floats);
      TQ_UNROLL for (int k = 0; k < PER_LANE; k++) {
        float4 four = row_of_block[min(lane + 32 * k, FOURS - 1)];
        x[j][4 * k] = four.x;
        x[j][4 * k + 1] = four.y;
        x[j][4 * k + 2] = four.z;
        x[j][4 * k + 3] = four.w;
      }
    }
    TQ_UNROLL for (int j = 0; j < AT_ONCE; j++) {
      float f = simd_shuffle(weight, ushort(n + j));
      if (i + j * step <= last) {
        TQ_UNROLL for (int k = 0; k < 4 * PER_LANE; k++)
          y[k] = fma(f, x[j][k], y[k]);
      }
    }
  }
}
sum = simd_sum(sum);
if (lane == 0) {
  weight_sums[simdgroup] = top;
  weight_sums[simdgroups + simdgroup] = sum;
}
TQ_UNROLL for (int k = 0; k < PER_LANE; k++) {
  if (FOURS % 32 == 0 || lane + 32 * k < FOURS) {
    TQ_UNROLL for (int j = 0; j < 4; j++)
      sums[simdgroup * D + 4 * (lane + 32 * k) + j] = y[4 * k + j];
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// ---- the sums of all simdgroups, to the first two rows: of exact values and of packed ones
float top_of_lane = lane < simdgroups ? weight_sums[lane] : TQ_LOWEST, sink = TQ_LOWEST;
top = simd_max(top_of_lane);
if (flags & 8) {
  sink = float(sinks[query_head]) * TQ_LOG2E;
  top = max(top, sink);
}
float weight = lane < simdgroups ? fast::exp2(top_of_lane - top) : 0.0f;
for (int d0 = simdgroup * 32; d0 < D; d0 += 32 * simdgroups) {
  int d = d0 + lane;
  bool has = D % 32 == 0 || d < D;
  float exact_sum = 0, rotated_sum = 0;
  for (int i = 0; i < simdgroups; i++) {
    float part = simd_shuffle(weight, ushort(i)) * (has ? sums[i * D + d] : 0.0f);
    if (i < share)
      exact_sum += part;
    else
      rotated_sum += part;
  }
  if (has) {
    sums[d] = exact_sum;
    sums[D + d] = rotated_sum;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// ---- the row
if (simdgroup == 0) {
  int t = uint(lane) % F::LANES;
  bool live = lane < F::LANES;
  float part = lane < simdgroups ? weight * weight_sums[simdgroups + lane] : 0.0f, packed_sum = 0;
  sum = simd_sum(part);
  if (MEAN) packed_sum = simd_sum(lane < share ? 0.0f : part);
  if (flags & 8) sum += fast::exp2(sink - top);
  float rotated_y[DIMS_PER_LANE], exact_y[DIMS_PER_LANE];
  TQ_UNROLL for (int k = 0; k < DIMS_PER_LANE; k++) {
    bool has = F::has(t, k);
    exact_y[k] = has ? sums[t * DIMS_PER_LANE + k] : 0.0f;
    rotated_y[k] = has ? sums[D + t * DIMS_PER_LANE + k] : 0.0f;
  }
  tq_finish<BITS, D, MEAN>(rotated_y, exact_y, sum, packed_sum, diagonals + OFFSET,
                           means + b * means_strides[0] + kvh * means_strides[1],
                           out + (((long)b * Hq + query_head) * L + (r - g * L)) * D, live, lane, t);
}
