// merge.metal: decode attention, pass 2 of 2: merges the partials of attend.metal, un-rotates and writes the output.
// Self-contained. The text above the line "// ==== body" is the header of mx.fast.metal_kernel, the rest its source.
//
// MATHEMATICS, per row: with M the largest m (and the sink's logit), f = 2^(m - M) of each block:
//   out = (sum over exact blocks f acc + R^T (sum over packed blocks f acc + mean * (packed part of the sum))) / total,
//   total = sum f sum + 2^(sink - M). Exact blocks are those below X; the packed ones are still rotated, and without
//   the UNIT of their levels.
//
// MAPPING. A threadgroup of MS simdgroups makes one row. Simdgroup i sums blocks i, i + MS, ..., lane t dims t, t + 32,
//   ...; then the first simdgroup adds the MS sums and un-rotates, E = 16 dims (32 if D > 512) per lane as in
//   dequantize.metal.
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
//   MEAN: packed values have a mean; OFFSET into dims; ACC_ROW floats of a row of acc; MS simdgroups per threadgroup.
// LAUNCH  grid (32, MS, B * Hq * L), threadgroup (32, MS, 1).
//
// REGISTERS (estimate, 32-bit): 2 * D / 32 sums, then 2 * E, and 12: 44; 76 for D > 512.
// Threadgroup memory: 8 * MS * D bytes.

// ---- shared: layout and levels (the same text in every file that uses it; tests/test_metal_files.py) ----
#define TQ_UNROLL _Pragma("clang loop unroll(full)")

constexpr int tq_power_of_two_from(int n) {                                     // least power of two >= n
  int p = 1;
  while (p < n) p *= 2;
  return p;
}
template <int BITS, int D> struct Row {                                         // how lanes share a packed row
  static constant constexpr const int UNITS = (D + 15) / 16;
  static constant constexpr const int WORDS = BITS == 3 ? UNITS + (UNITS + 1) / 2 : (D * BITS + 31) / 32;
  static constant constexpr const int E = D > 512 ? 32 : 16;                    // dims per lane
  static constant constexpr const int LANES = tq_power_of_two_from((D + E - 1) / E);
  static constant constexpr const int VECTORS = 32 / LANES;                     // per simdgroup
  static constant constexpr const bool WHOLE = D % E == 0;                      // a lane has E dims or none
  // Whether dim i of lane t exists; a constant if every lane is full, the same for all i if no lane is cut.
  static METAL_FUNC bool has(int t, int i) { return LANES * E == D || (WHOLE ? t < D / E : t * E + i < D); }
};

// Levels without a table: f(c) = as_type<half>(base + (c << p)) is piecewise linear, its slope doubles with each
// octave, so f(c) - f(n-1-c) is odd in c and sinh-like. Two integer operations and one half2 subtraction give two
// levels.
// x: the codes of dims 2j and 2j+1 at bit p of the two halves, nothing else set. level = UNIT * result.
METAL_FUNC half2 tq_odd(uint x, uint low, uint sum) { return as_type<half2>(low + x) - as_type<half2>(sum - x); }

template <int BITS> struct Levels {};
template <> struct Levels<4> {
  static constant constexpr const float UNIT = 2.102116088679744f;
  static METAL_FUNC half2 at8(uint x) { return tq_odd(x & 0x0f000f00u, 0x2e762e76u, 0x3d763d76u); }
  static METAL_FUNC void eight(uint w, thread half2 *y) {                       // a word: 4 pairs
    y[0] = at8(w << 8); y[1] = at8(w << 4); y[2] = at8(w); y[3] = at8(w >> 4);
  }
};
template <> struct Levels<2> {
  static constant constexpr const float UNIT = 0.4557776517220176f * 128.0f;
  static METAL_FUNC half2 at4(uint x) { return tq_odd(x & 0x00300030u, 0x3bd53bd5u, 0x3c053c05u); }
  static METAL_FUNC half2 at6(uint x) { return tq_odd(x & 0x00c000c0u, 0x33543354u, 0x34143414u); }
  static METAL_FUNC half2 at8(uint x) { return tq_odd(x & 0x03000300u, 0x29502950u, 0x2c502c50u); }
  static METAL_FUNC void sixteen(uint w, thread half2 *y) {                     // a word: 8 pairs
    uint a = w << 4, b = w >> 6;
    y[0] = at4(a); y[1] = at6(a); y[2] = at4(w); y[3] = at6(w);
    y[4] = at8(w); y[5] = at4(b); y[6] = at6(b); y[7] = at8(b);
  }
};
template <> struct Levels<3> {
  static constant constexpr const float UNIT = 0.25908226062160244f * 256.0f;
  static METAL_FUNC half2 at3(uint x) { return tq_odd(x & 0x00380038u, 0x3bd23bd2u, 0x3c0a3c0au); }
  static METAL_FUNC half2 at6(uint x) { return tq_odd(x & 0x01c001c0u, 0x2e902e90u, 0x30503050u); }
  // a: word of plane A. b: the unit's byte of plane B in the low byte of each half.
  static METAL_FUNC void sixteen(uint a, uint b, thread half2 *y) {
    uint r = a >> 6;
    y[0] = at3(a << 3); y[1] = at3(a); y[2] = at6(a); y[3] = at3(r); y[4] = at6(r);
    y[5] = at3(b << 3); y[6] = at3(b); y[7] = at6((b & 0x00c000c0u) | ((a >> 7) & 0x01000100u));
  }
};
template <> struct Levels<8> {
  static constant constexpr const float UNIT = 0.0315f;
  static METAL_FUNC half2 minus128(uint x) { return as_type<half2>(x | 0x64006400u) - half2(1152.0h); }   // exact
  static METAL_FUNC void four(uint w, thread half2 *y) {                        // a word: 2 pairs
    y[0] = minus128(w & 0x00ff00ffu);
    y[1] = minus128((w >> 8) & 0x00ff00ffu);
  }
};
// The 8 pairs of levels of a unit of 16 dims. w: its words; b: its byte of plane B (3 bits only), as in sixteen().
template <int BITS> METAL_FUNC void tq_unit_levels(const thread uint *w, uint b, thread half2 *y) {
  if (BITS == 4) { Levels<4>::eight(w[0], y); Levels<4>::eight(w[1], y + 4); }
  else if (BITS == 2) Levels<2>::sixteen(w[0], y);
  else if (BITS == 3) Levels<3>::sixteen(w[0], b, y);
  else { TQ_UNROLL for (int i = 0; i < 4; i++) Levels<8>::four(w[i], y + 2 * i); }
}

// Hadamard transform (not normalised) of the dims START .. START + P - 1 of vectors that lie E dims per lane.
template <int D, int E, int LANES, int START, int P>
METAL_FUNC void tq_hadamard(thread float *y, int lane, int t) {
  constexpr bool ALL = P == D && LANES * E == D;                                // every lane takes part
  int r = t - START / E;
  bool inside = ALL || (r >= 0 && r < P / E);
  if (inside) {
    TQ_UNROLL for (int h = 1; h < E; h *= 2) {
      TQ_UNROLL for (int i = 0; i < E; i++) {
        if ((i & h) == 0) {
          float a = y[i], b = y[i + h];
          y[i] = a + b;
          y[i + h] = a - b;
        }
      }
    }
  }
  TQ_UNROLL for (int m = 1; m < P / E; m *= 2) {
    float sign = !inside ? 0.0f : (r & m) ? -1.0f : 1.0f;                       // outside, y comes from the lane itself
    ushort from = ushort(inside ? lane + (r ^ m) - r : lane);
    TQ_UNROLL for (int i = 0; i < E; i++) {
      float other = ALL ? simd_shuffle_xor(y[i], ushort(m)) : simd_shuffle(y[i], from);
      y[i] = fma(sign, y[i], other);
    }
  }
}
// ---- end of shared ----

constant constexpr const float TQ_LOG2E = 1.44269504f, TQ_LOWEST = -1e29f;

// ---- finish: the output of one row (the same text in attend.metal and merge.metal) ----
// Lanes t = 0 .. LANES - 1 hold E dims each of the sums of packed values (rotated, without UNIT) and of exact ones.
// mean: of the packed values, rotated; packed_sum: the sum of their weights.
template <int BITS, int D, bool MEAN, class T>
METAL_FUNC void tq_finish(thread float *rotated, const thread float *exact, float sum, float packed_sum,
                          const device float *diag, const device half *mean, device T *out, bool live, int lane,
                          int t) {
  typedef Row<4, D> R;
  constexpr int E = R::E, LANES = R::LANES, P = tq_power_of_two_from(D / 2 + 1);
  if (MEAN) {
    float weight = packed_sum * (1.0f / Levels<BITS ? BITS : 4>::UNIT);
    TQ_UNROLL for (int i = 0; i < E; i++) {
      if (R::has(t, i)) rotated[i] = fma(weight, float(mean[t * E + i]), rotated[i]);
    }
  }
  if (BITS) {
    if (P != D) {
      tq_hadamard<D, E, LANES, D - P, P>(rotated, lane, t);
      TQ_UNROLL for (int i = 0; i < E; i++) {
        if (R::has(t, i)) rotated[i] *= diag[D + t * E + i];
      }
    }
    tq_hadamard<D, E, LANES, 0, P>(rotated, lane, t);
  }
  float inverse = sum > 0 ? 1.0f / sum : 0.0f;                                  // a row that attends to nothing gives 0
  TQ_UNROLL for (int i = 0; i < E; i++) {
    int d = t * E + i;
    if (live && R::has(t, i)) {
      float y = exact[i];
      if (BITS) y = fma(diag[d] * Levels<BITS ? BITS : 4>::UNIT, rotated[i], y);
      out[d] = T(y * inverse);
    }
  }
}
// ---- end of finish ----
// ==== body
typedef Row<4, D> F;
constexpr int E = F::E, PER_LANE = (D + 31) / 32;
threadgroup float sums[MS * 2 * D];
int lane = thread_index_in_simdgroup, sg = thread_position_in_threadgroup.y, row = thread_position_in_grid.z;
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
TQ_UNROLL for (int k = 0; k < PER_LANE; k++) rotated[k] = exact[k] = 0;
for (int i = sg; i < blocks; i += MS) {
  float f = fast::exp2(ml[i * 2] - top);
  TQ_UNROLL for (int k = 0; k < PER_LANE; k++) {
    int d = lane + 32 * k;
    if (D % 32 == 0 || d < D) {
      float a = f * acc[i * block_floats + d];
      if (BITS && i >= exact_blocks) rotated[k] += a;
      else exact[k] += a;
    }
  }
}
TQ_UNROLL for (int k = 0; k < PER_LANE; k++) {
  int d = lane + 32 * k;
  if (D % 32 == 0 || d < D) {
    sums[(sg * 2) * D + d] = exact[k];
    if (BITS) sums[(sg * 2 + 1) * D + d] = rotated[k];
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// ---- the row
if (sg == 0) {
  int t = uint(lane) % F::LANES;
  bool live = lane < F::LANES;
  float rotated_y[E], exact_y[E];
  TQ_UNROLL for (int k = 0; k < E; k++) {
    rotated_y[k] = exact_y[k] = 0;
    if (F::has(t, k)) {
      for (int i = 0; i < MS; i++) {
        exact_y[k] += sums[(i * 2) * D + t * E + k];
        if (BITS) rotated_y[k] += sums[(i * 2 + 1) * D + t * E + k];
      }
    }
  }
  tq_finish<BITS, D, MEAN>(rotated_y, exact_y, sum, packed_sum, (const device float *)(dims + OFFSET),
                           means + b * means_strides[0] + kvh * means_strides[1],
                           out + (((long)b * Hq + query_head) * L + (r - g * L)) * D, live, lane, t);
}
