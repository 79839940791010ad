// quantize.metal: centre, rotate, quantize and pack vectors; the keys and values of a layer in one launch.
// Self-contained. The text above the line "// ==== body" is the header of mx.fast.metal_kernel, the rest its source.
//
// MATHEMATICS, per vector x of D numbers:
//   y = rotation of (x - mean);  code = nearest level of y * sqrt(D) / ||y||;  scale = <y, c> / <c, c> with c the
//   levels of the codes (least squares), or another RULE. A zero vector gives scale 0; NaN or infinity in x and a scale
//   beyond float16 give NaN: with infinity a token could weigh nothing, by the sign of its logit.
//   The rotation is ROUNDS rounds "multiply by a diagonal, Hadamard-transform a window": one round over all dims if D
//   is a power of two, else two over the first and the last P dims, P the largest power of two below D. The diagonals
//   carry the signs and the 1/sqrt(P).
//
// MAPPING. A lane owns E = 16 consecutive dims (32 if D > 512), whole words of every packing. LANES lanes (a power of
//   two) share a vector, a simdgroup works on 32 / LANES vectors. Butterflies over less than E dims are in registers,
//   the rest by shuffles. No threadgroup memory, no barrier.
//
// INPUTS  (side 0 = keys, side 1 = values; with one side the arguments of side 1 are never read)
//   x0, x1        T [B, H, L, D], any strides
//   shift0/1      float [B, H, 1, D], row-contiguous: -diagonal of round 0 * mean. Read only if MEAN0/1.
//   diag0/1       float [ROUNDS, D], row-contiguous: the diagonals. Read only if ROTATE0/1.
// OUTPUTS
//   codes0/1      uint32 [B, H, L, WORDS]
//   scale0/1      float16 [B, H, L, 1]
// TEMPLATE  B0, B1 bits in {2, 3, 4, 8}; D0, D1 head_dim, multiple of 4, 32 to 576;
//   ROTATE0/1: rotate here (the windows must start and end where a lane's dims do: D a multiple of 16 up to 512, of 32
//   above), else x is already rotated and centred; MEAN0/1: subtract a mean (needs ROTATE);
//   RULE: the scale of both sides, 0 <y, y> / <y, c>, 1 <y, c> / <c, c>, 2 ||y|| / sqrt(D), 3 ||y|| / ||c||.
// LAUNCH  grid (32, S0 + S1, 1) with S = ceil(B * H * L / VECTORS) simdgroups per side, VECTORS = 32 / LANES;
//   threadgroup (32, n, 1), any n. Lengths are data: nothing is compiled again when L changes.
//
// PACKED ROW (scheme.py; bit i of a 32-bit word; "half s" = bits 16s .. 16s+15, s = 0 or 1)
//   4 bits  word w = dims 8w .. 8w+7.    dim 8w+2j+s at bits 16s+4j .. +3, j = 0..3
//   2 bits  word w = dims 16w .. 16w+15. dim 16w+2j+s at bits 16s+2j .. +1, j = 0..7
//   8 bits  word w = dims 4w .. 4w+3.    dim 4w+2j+s at bits 16s+8j .. +7, j = 0..1
//   3 bits  unit t = dims 16t .. 16t+15: word t of plane A, and bytes i and i+2 (i = t % 2) of word t / 2 of plane B,
//           which follows plane A. dim 16t+2j+s: j = 0..4 in A at bits 16s+3j .. +2; j = 5, 6 in byte i+2s of B at
//           bits 3(j-5) .. +2; j = 7: low two bits in that byte's bits 6, 7, top bit in A at bit 16s+15.
//   Words are 0 where D does not fill them.
//
// REGISTERS (estimate, 32-bit): E values, E codes until they are packed, 7 midpoints, a few indices:
//   16 + 16 + 7 + 10 = 49; 81 for D > 512.

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

// Midpoints between neighbouring levels, positive half, in units of ||y|| / sqrt(D).
constant constexpr const float TQ_T2[1] = {0.982770562f};
constant constexpr const float TQ_T3[3] = {0.518164515f, 1.06871438f, 1.74880528f};
constant constexpr const float TQ_T4[7] = {0.262764513f, 0.538102686f, 0.846286476f, 1.17448556f, 1.50268459f,
                                           1.88297462f, 2.37873721f};

// Code of y, offset binary: code n-1-c is the negative of code c. t: the midpoints times ||y|| / sqrt(D).
// A binary search over the magnitude, then one exclusive or for the sign.
template <int BITS> METAL_FUNC uint tq_code(float y, const thread float *t) {
  float a = fabs(y);
  uint m;
  if (BITS == 2) {
    m = a >= t[0] ? 1 : 0;
  } else if (BITS == 3) {
    bool high = a >= t[1];
    m = (high ? 2 : 0) | (a >= (high ? t[2] : t[0]) ? 1 : 0);
  } else {
    bool high = a >= t[3];
    bool middle = a >= (high ? t[5] : t[1]);
    float last = select(select(t[0], t[2], middle), select(t[4], t[6], middle), high);   // ?: would branch
    m = (high ? 4 : 0) | (middle ? 2 : 0) | (a >= last ? 1 : 0);
  }
  constexpr uint HALF = 1u << (BITS - 1);
  return m ^ (y < 0 ? HALF - 1 : HALF);
}

template <int LANES> METAL_FUNC float tq_sum_lanes(float v) {                   // over the lanes of a vector
  TQ_UNROLL for (int m = 1; m < LANES; m *= 2) v += simd_shuffle_xor(v, ushort(m));
  return v;
}

// Quantizes the 32 / LANES vectors of simdgroup `sg`. x_shape, x_strides: of [B, H, L, D].
template <int BITS, int D, bool ROTATE, bool MEAN, int RULE, class X, class SHAPE, class STRIDES>
METAL_FUNC void tq_quantize(X x, SHAPE x_shape, STRIDES x_strides, const device float *shift,
                            const device float *diag, device uint *codes, device half *scale, int sg, int lane) {
  static_assert(RULE >= 0 && RULE <= 3, "RULE is 0, 1, 2 or 3");
  typedef Row<BITS, D> R;
  constexpr int E = R::E, LANES = R::LANES, UNITS = E / 16, P = tq_power_of_two_from(D / 2 + 1);
  int H = x_shape[1], L = x_shape[2], n_vectors = x_shape[0] * H * L;
  int t = uint(lane) % LANES, vector = sg * (32 / LANES) + uint(lane) / LANES;    // unsigned: no division
  bool live = vector < n_vectors;
  vector = min(vector, n_vectors - 1);                                          // lanes past the end shuffle along
  int head = vector / L, l = vector - head * L, b = head / H, h = head - b * H;
  X from = x + b * x_strides[0] + h * x_strides[1] + l * x_strides[2];

  // ---- read, centre, rotate
  float y[E];
  TQ_UNROLL for (int i = 0; i < E; i++) {
    int d = t * E + i;
    y[i] = 0;
    if (live && R::has(t, i)) {
      y[i] = float(from[d * x_strides[3]]);
      if (ROTATE) y[i] = MEAN ? fma(diag[d], y[i], shift[head * D + d]) : diag[d] * y[i];
    }
  }
  if (ROTATE) {
    tq_hadamard<D, E, LANES, 0, P>(y, lane, t);
    if (P != D) {
      TQ_UNROLL for (int i = 0; i < E; i++) {
        if (R::has(t, i)) y[i] *= diag[D + t * E + i];
      }
      tq_hadamard<D, E, LANES, D - P, P>(y, lane, t);
    }
  }

  // ---- norm, codes
  float norm2 = 0;
  TQ_UNROLL for (int i = 0; i < E; i++) norm2 = fma(y[i], y[i], norm2);
  norm2 = tq_sum_lanes<LANES>(norm2);
  float sigma = sqrt(norm2 * (1.0f / D));
  uint code[E];
  if (BITS == 8) {
    float inverse = sigma > 0 ? 1.0f / (sigma * Levels<8>::UNIT) : 0.0f;
    TQ_UNROLL for (int i = 0; i < E; i++) {
      float c = rint(y[i] * inverse);
      c = c >= -128.0f ? c : -128.0f;                                           // also for NaN
      code[i] = uint(int(min(c, 127.0f)) + 128);
    }
  } else {
    constexpr int N = (1 << (BITS - 1)) - 1;
    float midpoint[N];
    TQ_UNROLL for (int i = 0; i < (BITS == 8 ? 0 : N); i++)
      midpoint[i] = sigma * (BITS == 2 ? TQ_T2[0] : BITS == 3 ? TQ_T3[i % 3] : TQ_T4[i % 7]);
    TQ_UNROLL for (int i = 0; i < E; i++) code[i] = tq_code<BITS>(y[i], midpoint);
  }
  TQ_UNROLL for (int i = 0; i < E; i++) {
    if (!R::has(t, i)) code[i] = 0;
  }

  // ---- pack, and <y, c> or <c, c> with the levels as every reader will compute them
  constexpr int PER_UNIT = BITS == 3 ? 1 : BITS / 2, ROW_UNITS = R::UNITS;
  constexpr int CODE_WORDS = BITS == 3 ? ROW_UNITS : R::WORDS;                  // without plane B
  device uint *row = codes + (long)vector * R::WORDS;
  float yc = 0, cc = 0;
  uint plane_b[UNITS];
  TQ_UNROLL for (int u = 0; u < UNITS; u++) {
    uint w[PER_UNIT];
    plane_b[u] = 0;
    TQ_UNROLL for (int k = 0; k < PER_UNIT; k++) w[k] = 0;
    TQ_UNROLL for (int i = 0; i < 16; i++) {
      uint c = code[16 * u + i];
      int s = i % 2, j = i / 2;
      if (BITS != 3) {
        constexpr int PAIRS = 16 / BITS;                                        // per word
        w[j / PAIRS % PER_UNIT] |= c << (16 * s + BITS * (j % PAIRS));
      } else if (j < 5) {
        w[0] |= c << (16 * s + 3 * j);
      } else if (j < 7) {
        plane_b[u] |= c << (16 * s + 3 * (j - 5));
      } else {
        plane_b[u] |= (c & 3) << (16 * s + 6);
        w[0] |= (c >> 2) << (16 * s + 15);
      }
    }
    half2 level[8];
    tq_unit_levels<BITS>(w, plane_b[u], level);
    TQ_UNROLL for (int i = 0; i < 16; i++) {
      float c = float(level[i / 2][i % 2]);
      if (R::has(t, 16 * u + i)) {
        if (RULE <= 1) yc = fma(y[16 * u + i], c, yc);
        if (RULE % 2) cc = fma(c, c, cc);
      }
    }
    TQ_UNROLL for (int k = 0; k < PER_UNIT; k++) {
      int word = (t * UNITS + u) * PER_UNIT + k;
      if (live && word < CODE_WORDS) row[word] = w[k];
    }
  }
  if (BITS == 3) {                                                              // two units share a word of plane B
    uint odd = UNITS == 2 ? plane_b[UNITS - 1] : simd_shuffle_xor(plane_b[0], ushort(1));
    bool mine = live && (UNITS == 2 || t % 2 == 0);
    if (mine && t * UNITS < ROW_UNITS) row[ROW_UNITS + t * UNITS / 2] = plane_b[0] | (odd << 8);
  }

  // ---- scale
  float gamma = sigma;
  if (RULE <= 1) yc = tq_sum_lanes<LANES>(yc);
  if (RULE % 2) cc = tq_sum_lanes<LANES>(cc);
  // yc or cc = 0: a vector of zeros, or 8 bits and an infinite sigma
  if (RULE == 0) gamma = yc > 0 ? norm2 / (yc * Levels<BITS>::UNIT) : sigma;
  if (RULE == 1) gamma = cc > 0 ? yc / (cc * Levels<BITS>::UNIT) : BITS == 8 ? sigma : yc;
  if (RULE == 3) gamma = cc > 0 ? sigma * (sqrt(D / cc) / Levels<BITS>::UNIT) : sigma;
  half g = half(gamma);
  if (live && t == 0) scale[vector] = g + (g - g);                              // infinity: NaN
}
// ==== body
constexpr int V0 = Row<B0, D0>::VECTORS;
int lane = thread_index_in_simdgroup, sg = thread_position_in_grid.y;
int S0 = uint(x0_shape[0] * x0_shape[1] * x0_shape[2] + V0 - 1) / V0;
if (sg < S0)
  tq_quantize<B0, D0, ROTATE0, MEAN0, RULE>(x0, x0_shape, x0_strides, shift0, diag0, codes0, scale0, sg, lane);
else
  tq_quantize<B1, D1, ROTATE1, MEAN1, RULE>(x1, x1_shape, x1_strides, shift1, diag1, codes1, scale1, sg - S0, lane);
