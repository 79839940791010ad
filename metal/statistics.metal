// statistics.metal: sums and energy of the vectors of each unit of tokens: what means are made of.
// Compiled behind shared.metal. The text above the line "// ==== body" is the end of the header of
// mx.fast.metal_kernel, the rest its source.
//
// MATHEMATICS, per head and unit: sums = sum of x, energy = sum of ||x||^2, over the unit's tokens. A vector that is
//   not finite, or whose root mean square is beyond LARGEST, counts as zeros: ||x||^2 <= D * LARGEST^2 is false for it.
//   Unit u has the tokens u * unit - begun .. (u + 1) * unit - begun - 1, as far as they are there: of the first one
//   `begun` tokens came earlier.
//
// MAPPING. A threadgroup of SIMDGROUPS simdgroups makes one unit of one head. LANES lanes (a power of two) share a
//   vector, a simdgroup works on 32 / LANES vectors, so a threadgroup has ROWS of them at once: row r adds the tokens
//   r, r + ROWS, ... of the unit, of which it reads AT_ONCE (1 to 4) before it adds them. Lane t of a row owns dims
//   4t .. 4t + 3 (and 4 * LANES further, ...). Where all ROWS * AT_ONCE tokens are there, they are read without asking
//   for each: such loads are on their way at the same time. Then the threads add the sums of the rows, one dim each, in
//   the order of the rows. A unit's sums depend on its tokens and their places in it, on nothing else: not on other
//   rows of a batch, nor on where a prompt was cut.
//
// INPUTS
//   x         T [B, H, L, D], any strides
//   numbers   never read; [1, 1], whose second stride is two numbers of 32 bits, the first in the low half: begun, unit
// OUTPUTS
//   sums      float [B, H, UNITS, D], UNITS = ceil((begun + L) / unit)
//   energy    float [B, H, UNITS, 1]
// TEMPLATE  D head_dim, multiple of 4, 32 to 576; LARGEST; SIMDGROUPS of a threadgroup.
// LAUNCH  grid (32, SIMDGROUPS * B * H * UNITS, 1), threadgroup (32, SIMDGROUPS, 1). Lengths are data: nothing is
//   compiled again when L changes.
//
// REGISTERS (estimate, 32 bits each): 4 * FOURS sums, AT_ONCE times as many numbers in flight, 14: 34 for D <= 128, 54
//   for D > 512. Threadgroup memory: 4 * ROWS * (D + 1) bytes, 18.5 KB at most with 8 simdgroups.

// ==== body
constexpr int LANES = D > 64 ? 32 : tq_power_of_two_from(D / 4), FOURS = (D + 4 * LANES - 1) / (4 * LANES);
constexpr int PER_SIMDGROUP = 32 / LANES, ROWS = SIMDGROUPS * PER_SIMDGROUP, AT_ONCE = (FOURS + 3) / FOURS;
threadgroup float row_sums[ROWS * D];
threadgroup float row_energy[ROWS];
int lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
int t = uint(lane) % LANES, row = simdgroup * PER_SIMDGROUP + uint(lane) / LANES;  // unsigned: no division
int begun = tq_number(numbers_strides, 0), unit = tq_number(numbers_strides, 1), n_heads = x_shape[1], L = x_shape[2];
int n_units = (begun + L + unit - 1) / unit, out = threadgroup_position_in_grid.y;
int head = out / n_units, first = (out - head * n_units) * unit - begun, b = head / n_heads, h = head - b * n_heads;
const device auto *from = x + b * x_strides[0] + h * x_strides[1];
float most = float(D) * float(LARGEST) * float(LARGEST), sum[4 * FOURS], energy_of_row = 0;
TQ_UNROLL for (int i = 0; i < 4 * FOURS; i++)
  sum[i] = 0;

// ---- the tokens of this row
TQ_ROLLED for (int at = 0; at < unit; at += AT_ONCE * ROWS) {
  float v[AT_ONCE][4 * FOURS];
  int end = at + AT_ONCE * ROWS;
  if (D % (4 * LANES) == 0 && end <= unit && first + at >= 0 && first + end <= L) {
    TQ_UNROLL for (int j = 0; j < AT_ONCE; j++) {
      int token = first + at + j * ROWS + row;
      TQ_UNROLL for (int i = 0; i < 4 * FOURS; i++)
        v[j][i] = float(from[token * x_strides[2] + (4 * (t + LANES * (i / 4)) + i % 4) * x_strides[3]]);
    }
  } else {
    TQ_UNROLL for (int j = 0; j < AT_ONCE; j++) {
      int place = at + j * ROWS + row, token = first + place;
      bool here = place < unit && token >= 0 && token < L;
      TQ_UNROLL for (int i = 0; i < 4 * FOURS; i++) {
        int d = 4 * (t + LANES * (i / 4)) + i % 4;
        v[j][i] = here && (D % (4 * LANES) == 0 || d < D) ? float(from[token * x_strides[2] + d * x_strides[3]]) : 0.0f;
      }
    }
  }
  TQ_UNROLL for (int j = 0; j < AT_ONCE; j++) {
    float e = 0;
    TQ_UNROLL for (int i = 0; i < 4 * FOURS; i++)
      e = fma(v[j][i], v[j][i], e);
    TQ_UNROLL for (int m = 1; m < LANES; m *= 2)
      e += simd_shuffle_xor(e, ushort(m));
    bool good = e <= most;  // not so for NaN
    energy_of_row += good ? e : 0.0f;
    TQ_UNROLL for (int i = 0; i < 4 * FOURS; i++)
      sum[i] += good ? v[j][i] : 0.0f;
  }
}

// ---- all rows
TQ_UNROLL for (int i = 0; i < 4 * FOURS; i++) {
  int d = 4 * (t + LANES * (i / 4)) + i % 4;
  if (D % (4 * LANES) == 0 || d < D) row_sums[row * D + d] = sum[i];
}
if (t == 0) row_energy[row] = energy_of_row;
threadgroup_barrier(mem_flags::mem_threadgroup);
for (int d = simdgroup * 32 + lane; d < D; d += 32 * SIMDGROUPS) {
  float all = 0;
  TQ_UNROLL for (int r = 0; r < ROWS; r++)
    all += row_sums[r * D + d];
  sums[(long)out * D + d] = all;
}
if (simdgroup == 0 && lane == 0) {
  float all = 0;
  TQ_UNROLL for (int r = 0; r < ROWS; r++)
    all += row_energy[r];
  energy[out] = all;
}
