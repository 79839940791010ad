// merge.metal: decode attention, pass 2 of 2: merges the partials of attend.metal, un-rotates and writes the output.
// Compiled behind shared.metal, which describes the packed row. The text above the line "// ==== body" is the end of
// the header of mx.fast.metal_kernel, the rest its source.
//
// MATHEMATICS, per row: with M the largest m (and the sink's logit), f = 2^(m - M) of each block:
//   out = (sum over exact blocks f acc + R^T (sum over packed blocks f acc + mean * (packed part of the sum))) / total,
//   total = sum f sum + 2^(sink - M). Exact blocks are those below X; the packed ones are still rotated, and without
//   the UNIT of their levels.
//
// MAPPING. A threadgroup of SIMDGROUPS simdgroups makes one row. Simdgroup i sums blocks i, i + SIMDGROUPS, ...; its
//   lane t sums dims t, t + 32, ... Then the first simdgroup adds the sums of all and un-rotates, DIMS_PER_LANE = 16
//   dims (32 if D > 512) per lane as in dequantize.metal.
//
// INPUTS
//   acc    float [B, Hkv, blocks, ACC_ROWS, ACC_ROW], behind it [B, Hkv, R, blocks, 2] = (m, sum): as written by
//          attend.metal; R = Hq / Hkv * L; of acc the first R rows and their first D numbers
//   means  float16 [B, Hkv, CAPACITY, D], rows contiguous, rotated: row 0 is of all packed values. Read only if MEAN
//   sinks  any float type [Hq]: a logit per head that takes weight and gives no value. Read only if flag 8
//   dims   the same array as attend.metal's; the diagonals of the values' rotation [ROUNDS, D] begin at element OFFSET
// OUTPUTS
//   out    T [B, Hq, L, D]
// TEMPLATE  T float type of the output; BITS of the values, 0 = exact; D their head dim, a multiple of 16, 32 to 576;
//   MEAN: packed values have a mean; OFFSET into dims; ACC_ROW floats of a row of acc; SIMDGROUPS per threadgroup.
// LAUNCH  grid (32, SIMDGROUPS, B * Hq * L), threadgroup (32, SIMDGROUPS, 1).
//
// REGISTERS (estimate, 32-bit): 2 * D / 32 sums, then 2 * DIMS_PER_LANE, and 12: 44; 76 for D > 512.
// Threadgroup memory: 8 * SIMDGROUPS * D bytes.

constant constexpr const float TQ_LOG2E = 1.44269504f, TQ_LOWEST = -1e29f;

// ==== body
typedef Row<4, D> F;
constexpr int DIMS_PER_LANE = F::DIMS_PER_LANE, PER_LANE = (D + 31) / 32;
threadgroup float sums[SIMDGROUPS * 2 * D];
int lane = thread_index_in_simdgroup, simdgroup = thread_position_in_threadgroup.y, row = thread_position_in_grid.z;
int exact_blocks = dims[3], blocks = dims[4], flags = dims[6], L = dims[7], Hq = dims[8], Hkv = dims[9];
int G = Hq / Hkv, R = G * L, head = row / R, r = row - head * R, g = r / L, b = head / Hkv;
int kvh = head - b * Hkv, query_head = kvh * G + g;
long block_floats = (long)dims[12] * ACC_ROW;
const device float *ml = acc + (long)dims[13] * Hkv * blocks * block_floats + (long)row * blocks * 2;
acc += head * blocks * block_floats + (long)r * ACC_ROW;

// ---- weights of the blocks
float top = TQ_LOWEST, sum = 0, packed_sum = 0, sink = TQ_LOWEST;
for (int i = lane; i < blocks; i += 32) top = max(top, ml[i * 2]);
top = simd_max(top);
if (flags & 8) {
  sink = float(sinks[query_head]) * TQ_LOG2E;
  top = max(top, sink);
}
for (int i = lane; i < blocks; i += 32) {
  float part = fast::exp2(ml[i * 2] - top) * ml[i * 2 + 1];
  sum += part;
  if (i >= exact_blocks) packed_sum += part;
}
sum = simd_sum(sum);
if (MEAN) packed_sum = simd_sum(packed_sum);
if (flags & 8) sum += fast::exp2(sink - top);

// ---- this simdgroup's share of the blocks
float rotated[PER_LANE], exact[PER_LANE];
TQ_UNROLL for (int k = 0; k < PER_LANE; k++)
  rotated[k] = exact[k] = 0;
for (int i = simdgroup; i < blocks; i += SIMDGROUPS) {
  float f = fast::exp2(ml[i * 2] - top);
  TQ_UNROLL for (int k = 0; k < PER_LANE; k++) {
    int d = lane + 32 * k;
    if (D % 32 == 0 || d < D) {
      float a = f * acc[i * block_floats + d];
      if (BITS && i >= exact_blocks)
        rotated[k] += a;
      else
        exact[k] += a;
    }
  }
}
TQ_UNROLL for (int k = 0; k < PER_LANE; k++) {
  int d = lane + 32 * k;
  if (D % 32 == 0 || d < D) {
    sums[(simdgroup * 2) * D + d] = exact[k];
    if (BITS) sums[(simdgroup * 2 + 1) * D + d] = rotated[k];
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// ---- the row
if (simdgroup == 0) {
  int t = uint(lane) % F::LANES;
  bool live = lane < F::LANES;
  float rotated_y[DIMS_PER_LANE], exact_y[DIMS_PER_LANE];
  TQ_UNROLL for (int k = 0; k < DIMS_PER_LANE; k++) {
    rotated_y[k] = exact_y[k] = 0;
    if (F::has(t, k)) {
      for (int i = 0; i < SIMDGROUPS; i++) {
        exact_y[k] += sums[(i * 2) * D + t * DIMS_PER_LANE + k];
        if (BITS) rotated_y[k] += sums[(i * 2 + 1) * D + t * DIMS_PER_LANE + k];
      }
    }
  }
  tq_finish<BITS, D, MEAN>(rotated_y, exact_y, sum, packed_sum, (const device float *)(dims + OFFSET),
                           means + b * means_strides[0] + kvh * means_strides[1],
                           out + (((long)b * Hq + query_head) * L + (r - g * L)) * D, live, lane, t);
}
