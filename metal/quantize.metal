// quantize.metal: centre, rotate, quantize and pack vectors; the keys and values of a layer in one launch.
// Compiled behind shared.metal, which describes the packed row. The text above the line "// ==== body" is the end of
// the header of mx.fast.metal_kernel, the rest its source.
//
// MATHEMATICS, per vector x of D numbers:
//   y = rotation of (x - mean), of balanced keys of (x - mean) * factors;
//   code = nearest level of y * sqrt(D) / ||y||;
//   scale = <y, c> / <c, c> with c the levels of the codes (least squares), or another RULE. A zero vector gives scale
//   0; NaN or infinity in x and a scale beyond float16 give NaN: with infinity a token could weigh nothing, by the sign
//   of its logit.
//   The rotation is ROUNDS rounds "multiply by a diagonal, Hadamard-transform a window": one round over all dims if D
//   is a power of two, else two over the first and the last P dims, P the largest power of two below D. The diagonals
//   carry the signs and the 1/sqrt(P).
//
// MAPPING. A lane owns DIMS_PER_LANE = 16 consecutive dims (32 if D > 512), whole words of every packing. LANES lanes
//   (a power of two) share a vector, a simdgroup works on 32 / LANES vectors. Butterflies over less than DIMS_PER_LANE
//   dims happen in registers, the rest by shuffles. No threadgroup memory, no barrier.
//
// INPUTS  (side 0 = keys, side 1 = values; with one side the arguments of side 1 are never read)
//   x0, x1        T [B, H, L, D], any strides
//   shift0/1      float [B, H, S, D], row-contiguous: -diagonal of round 0 * mean of each segment. Vector l belongs to
//                 segment (begun + l) / segment. Read only if MEAN0/1.
//   diag0/1       float [n, ROUNDS, D], row-contiguous: the diagonals, of all heads (n = 1) or of each (n = B * H):
//                 balanced keys have their factors in that of round 0. Read only if ROTATE0/1.
//   numbers       never read; [1, 1, 1], whose strides carry begun and segment of side 0 and of side 1 (tq_number)
// OUTPUTS
//   codes0/1      uint32 [B, H, L, WORDS]
//   scale0/1      float16 [B, H, L, 1]
// TEMPLATE  B0, B1 bits in {2, 3, 4, 5, 6, 8}; D0, D1 head_dim, multiple of 4, 32 to 576;
//   ROTATE0/1: rotate here (the windows must start and end where a lane's dims do: D a multiple of 16 up to 512, of 32
//   above), else x is already rotated and centred; MEAN0/1: subtract a mean (needs ROTATE);
//   RULE: the scale of both sides, 0 <y, y> / <y, c>, 1 <y, c> / <c, c>, 2 ||y|| / sqrt(D), 3 ||y|| / ||c||.
// LAUNCH  grid (32, S0 + S1, 1) with S = ceil(B * H * L / VECTORS) simdgroups per side, VECTORS = 32 / LANES;
//   threadgroup (32, n, 1), any n. Lengths are data: nothing is compiled again when L changes.
//
// REGISTERS (estimate, 32 bits each): DIMS_PER_LANE values and codes, 7 midpoints, a few indices:
//   16 + 16 + 7 + 10 = 49; 81 for D > 512. At 5 bits and more the midpoints are read from a table.

// Midpoints between neighbouring levels, positive half, in units of ||y|| / sqrt(D).
constant constexpr const float TQ_T2[1] = {0.982770562f};
constant constexpr const float TQ_T3[3] = {0.518164515f, 1.06871438f, 1.74880528f};
constant constexpr const float TQ_T4[7] = {0.262764513f, 0.538102686f, 0.846286476f, 1.17448556f,
                                           1.50268459f,  1.88297462f,  2.37873721f};
constant constexpr const float TQ_T5[15] = {0.125717789f, 0.25300765f,  0.383329391f, 0.518335223f, 0.659116089f,
                                            0.807468534f, 0.965574265f, 1.13445985f,  1.31566548f,  1.51073098f,
                                            1.7206831f,   1.94757509f,  2.19397354f,  2.53379822f,  2.98244882f};
constant constexpr const float TQ_T6[31] = {
    0.0690204129f, 0.138040826f, 0.207061246f, 0.276081651f, 0.345264852f, 0.414610833f, 0.483956814f, 0.553465605f,
    0.623625457f,  0.694436491f, 0.765735924f, 0.838337541f, 0.912241518f, 0.987773299f, 1.06558406f,  1.14599931f,
    1.23032141f,   1.31789923f,  1.40970933f,  1.50803089f,  1.61286378f,  1.724208f,    1.84401703f,  1.97424424f,
    2.11488962f,   2.26855779f,  2.43589973f,  2.61821771f,  2.81941867f,  3.10070944f,  3.47967052f};
constant constexpr const float TQ_T8[127] = {
    0.017255103f, 0.034510206f, 0.05176531f, 0.06902041f, 0.08627552f, 0.10353062f, 0.12078572f, 0.13804083f,
    0.15529592f,  0.17255104f,  0.18980613f, 0.20706125f, 0.22431634f, 0.24157144f, 0.25882655f, 0.27608165f,
    0.29333675f,  0.31059185f,  0.32792836f, 0.34526485f, 0.36251995f, 0.37977505f, 0.39703014f, 0.41428527f,
    0.43170315f,  0.44912103f,  0.46637613f, 0.48379403f, 0.50121194f, 0.518467f,   0.5358849f,  0.5534656f,
    0.57104623f,  0.58846414f,  0.60588205f, 0.6234627f,  0.64120615f, 0.65878683f, 0.6762047f,  0.69411093f,
    0.7120172f,   0.72959787f,  0.7475041f,  0.7657359f,  0.7836421f,  0.80154836f, 0.8197802f,  0.838012f,
    0.85656935f,  0.8751267f,   0.8933585f,  0.91191596f, 0.9307989f,  0.9496818f,  0.96856475f, 0.9877733f,
    1.0069817f,   1.0261903f,   1.0457244f,  1.0652585f,  1.0854436f,  1.1056288f,  1.1254885f,  1.1459993f,
    1.1665101f,   1.1873465f,   1.2085084f,  1.2296703f,  1.2511578f,  1.2729708f,  1.2951094f,  1.3172481f,
    1.3400378f,   1.3634788f,   1.3869196f,  1.4103606f,  1.4338014f,  1.4578935f,  1.4826366f,  1.5073798f,
    1.5327741f,   1.5588195f,   1.584865f,   1.6115615f,  1.6389092f,  1.6669081f,  1.694907f,   1.7229058f,
    1.7522069f,   1.7821592f,   1.8127625f,  1.844017f,   1.8752716f,  1.9071772f,  1.9397341f,  1.972942f,
    2.0074522f,   2.0426135f,   2.077775f,   2.1142385f,  2.1520045f,  2.188468f,   2.226885f,   2.2666044f,
    2.3063235f,   2.3479962f,   2.3909712f,  2.4339464f,  2.4886417f,  2.557662f,   2.628636f,   2.7022142f,
    2.777746f,    2.8571846f,   2.9392278f,  3.0225732f,  3.1085231f,  3.1996822f,  3.294748f,   3.389814f,
    3.4900887f,   3.5942705f,   3.7023592f,  3.8143544f,  3.9302568f,  4.051368f,   4.1750836f};

// Code of y, offset binary: code n-1-c is the negative of code c. t: the midpoints times ||y|| / sqrt(D).
// A binary search over the magnitude, then one exclusive or for the sign.
template <int BITS>
METAL_FUNC uint tq_code(float y, const thread float *t) {
  constexpr uint HALF = 1u << (BITS - 1);
  float a = fabs(y);
  bool above[BITS];
  uint m = 0;
  TQ_UNROLL for (int k = 0; k < BITS - 1; k++) {
    constexpr int HALVES = HALF / 2;
    float candidate[HALVES];  // those of this step, fewer with each bit that is known, the lowest first
    TQ_UNROLL for (int j = 0; j < 1 << k; j++)
      candidate[j] = t[(2 * j + 1) * (HALF >> (k + 1)) - 1];
    TQ_UNROLL for (int i = k - 1; i >= 0; i--) {
      TQ_UNROLL for (int j = 0; j < 1 << i; j++)
        candidate[j] = select(candidate[2 * j], candidate[2 * j + 1], above[i]);  // ?: would branch
    }
    above[k] = a >= candidate[0];
    m |= above[k] ? HALF >> (k + 1) : 0;
  }
  return m ^ (y < 0 ? HALF - 1 : HALF);
}

// The same where there are many midpoints, which stay in a table. y: in units of ||y|| / sqrt(D).
template <int BITS>
METAL_FUNC uint tq_code_by_table(float y) {
  constexpr uint HALF = 1u << (BITS - 1);
  float a = fabs(y);
  uint m = 0;
  TQ_UNROLL for (uint step = HALF / 2; step > 0; step /= 2) {
    uint i = m + step - 1;
    float t = BITS == 5 ? TQ_T5[i % 15] : BITS == 6 ? TQ_T6[i % 31] : TQ_T8[i];
    m = a >= t ? i + 1 : m;
  }
  return m ^ (y < 0 ? HALF - 1 : HALF);
}

template <int LANES>
METAL_FUNC float tq_sum_lanes(float v) {  // over the lanes of a vector
  TQ_UNROLL for (int m = 1; m < LANES; m *= 2)
    v += simd_shuffle_xor(v, ushort(m));
  return v;
}

// Quantizes a rotated vector, of which lane t has the numbers y of its DIMS_PER_LANE dims, 0 where there are none.
// Writes its row, and its scale times `times`. live: whether there is a vector; every lane of the simdgroup takes part.
template <int BITS, int D, int RULE>
METAL_FUNC void tq_encode(const thread float *y, float times, device uint *row, device half *scale, bool live, int t) {
  static_assert(RULE >= 0 && RULE <= 3, "RULE is 0, 1, 2 or 3");
  typedef Row<BITS, D> R;
  constexpr int DIMS_PER_LANE = R::DIMS_PER_LANE, LANES = R::LANES, UNITS = DIMS_PER_LANE / 16;

  // ---- norm, codes
  float norm2 = 0;
  TQ_UNROLL for (int i = 0; i < DIMS_PER_LANE; i++)
    norm2 = fma(y[i], y[i], norm2);
  norm2 = tq_sum_lanes<LANES>(norm2);
  float sigma = sqrt(norm2 * (1.0f / D));
  uint code[DIMS_PER_LANE];
  if (BITS >= 5) {
    float inverse = sigma > 0 ? 1.0f / sigma : 0.0f;
    TQ_UNROLL for (int i = 0; i < DIMS_PER_LANE; i++)
      code[i] = tq_code_by_table<(BITS < 5 ? 5 : BITS)>(y[i] * inverse);
  } else {
    constexpr int N = BITS > 4 ? 1 : (1 << (BITS - 1)) - 1;
    float midpoint[N];
    TQ_UNROLL for (int i = 0; i < N; i++)
      midpoint[i] = sigma * (BITS == 2 ? TQ_T2[0] : BITS == 3 ? TQ_T3[i % 3] : TQ_T4[i % 7]);
    TQ_UNROLL for (int i = 0; i < DIMS_PER_LANE; i++)
      code[i] = tq_code<(BITS > 4 ? 2 : BITS)>(y[i], midpoint);
  }
  TQ_UNROLL for (int i = 0; i < DIMS_PER_LANE; i++) {
    if (!R::has(t, i)) code[i] = 0;
  }

  // ---- pack, and <y, c> or <c, c> with the levels as every reader will compute them
  constexpr int PER_UNIT = R::PER_UNIT, ROW_UNITS = R::UNITS;
  float yc = 0, cc = 0;
  uint plane_b[UNITS];
  TQ_UNROLL for (int u = 0; u < UNITS; u++) {
    uint w[PER_UNIT];
    plane_b[u] = 0;
    TQ_UNROLL for (int k = 0; k < PER_UNIT; k++)
      w[k] = 0;
    TQ_UNROLL for (int i = 0; i < 16; i++) {
      uint c = code[16 * u + i];
      int s = i % 2, j = i / 2;
      if (!R::PLANES) {
        constexpr int PAIRS = 16 / BITS;  // per word
        w[j / PAIRS % PER_UNIT] |= c << (16 * s + BITS * (j % PAIRS));
      } else if (BITS == 5) {
        int k = j / 4 % PER_UNIT, at = 16 * s + 5 * (j % 4);
        w[k] |= j % 4 < 3 ? c << at : c >> 4 << at;
        if (j % 4 == 3) plane_b[u] |= (c & 15) << (16 * s + 4 * k);
      } else if (BITS == 6) {
        int k = j / 4 % PER_UNIT, byte = 16 * s + 8 * k;
        if (j % 4 < 2) w[k] |= c << (16 * s + 10 * (j % 4));
        if (j % 4 == 2) w[k] |= c >> 2 << (16 * s + 6);
        if (j % 4 >= 2) plane_b[u] |= j % 4 == 2 ? (c & 3) << byte : c << (byte + 2);
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
      if (live && word < R::PLANE_A) row[word] = w[k];
    }
  }
  if (BITS == 6) {
    TQ_UNROLL for (int u = 0; u < UNITS; u++)
      if (live && t * UNITS + u < ROW_UNITS) row[R::PLANE_A + t * UNITS + u] = plane_b[u];
  } else if (R::PLANES) {  // two units share a word of plane B
    uint odd = UNITS == 2 ? plane_b[UNITS - 1] : simd_shuffle_xor(plane_b[0], ushort(1));
    bool mine = live && (UNITS == 2 || t % 2 == 0);
    if (mine && t * UNITS < ROW_UNITS) row[R::PLANE_A + t * UNITS / 2] = plane_b[0] | (odd << 8);
  }

  // ---- scale
  float gamma = sigma;
  if (RULE <= 1) yc = tq_sum_lanes<LANES>(yc);
  if (RULE % 2) cc = tq_sum_lanes<LANES>(cc);
  // yc or cc = 0: a vector of zeros
  if (RULE == 0) gamma = yc > 0 ? norm2 / (yc * Levels<BITS>::UNIT) : sigma;
  if (RULE == 1) gamma = cc > 0 ? yc / (cc * Levels<BITS>::UNIT) : yc;
  if (RULE == 3) gamma = cc > 0 ? sigma * (sqrt(D / cc) / Levels<BITS>::UNIT) : sigma;
  half g = half(gamma * times);
  if (live && t == 0) *scale = g + (g - g);  // infinity: NaN
}

// Quantizes the 32 / LANES vectors of simdgroup `simdgroup`. x_shape, x_strides: of [B, H, L, D].
template <int BITS, int D, bool ROTATE, bool MEAN, int RULE, class X, class SHAPE, class STRIDES>
METAL_FUNC void tq_quantize(X x, SHAPE x_shape, STRIDES x_strides, const device float *shift, SHAPE shift_shape,
                            uint begun, uint segment, const device float *diag, SHAPE diag_shape, device uint *codes,
                            device half *scale, int simdgroup, int lane) {
  typedef Row<BITS, D> R;
  constexpr int DIMS_PER_LANE = R::DIMS_PER_LANE, LANES = R::LANES, P = tq_power_of_two_from(D / 2 + 1);
  int n_heads = x_shape[1], L = x_shape[2], n_vectors = x_shape[0] * n_heads * L;
  int t = uint(lane) % LANES, vector = simdgroup * (32 / LANES) + uint(lane) / LANES;  // unsigned: no division
  bool live = vector < n_vectors;
  vector = min(vector, n_vectors - 1);  // lanes past the end shuffle along
  int head = vector / L, l = vector - head * L, b = head / n_heads, h = head - b * n_heads;
  if (ROTATE && diag_shape[0] > 1) diag += head * ((P == D ? 1 : 2) * D);
  if (MEAN) shift += (head * shift_shape[2] + int((begun + l) / segment)) * D;
  X from = x + b * x_strides[0] + h * x_strides[1] + l * x_strides[2];

  // ---- read, centre, rotate
  float y[DIMS_PER_LANE];
  TQ_UNROLL for (int i = 0; i < DIMS_PER_LANE; i++) {
    int d = t * DIMS_PER_LANE + i;
    y[i] = 0;
    if (live && R::has(t, i)) {
      y[i] = float(from[d * x_strides[3]]);
      if (ROTATE) y[i] = MEAN ? fma(diag[d], y[i], shift[d]) : diag[d] * y[i];
    }
  }
  if (ROTATE) {
    tq_hadamard<D, DIMS_PER_LANE, LANES, 0, P>(y, lane, t);
    if (P != D) {
      TQ_UNROLL for (int i = 0; i < DIMS_PER_LANE; i++) {
        if (R::has(t, i)) y[i] *= diag[D + t * DIMS_PER_LANE + i];
      }
      tq_hadamard<D, DIMS_PER_LANE, LANES, D - P, P>(y, lane, t);
    }
  }
  tq_encode<BITS, D, RULE>(y, 1.0f, codes + (long)vector * R::WORDS, scale + vector, live, t);
}
// ==== body
constexpr int V0 = Row<B0, D0>::VECTORS;
int lane = thread_index_in_simdgroup, simdgroup = thread_position_in_grid.y;
int S0 = uint(x0_shape[0] * x0_shape[1] * x0_shape[2] + V0 - 1) / V0;
if (simdgroup < S0)
  tq_quantize<B0, D0, ROTATE0, MEAN0, RULE>(x0, x0_shape, x0_strides, shift0, shift0_shape,
                                            tq_number(numbers_strides, 0), tq_number(numbers_strides, 1), diag0,
                                            diag0_shape, codes0, scale0, simdgroup, lane);
else
  tq_quantize<B1, D1, ROTATE1, MEAN1, RULE>(x1, x1_shape, x1_strides, shift1, shift1_shape,
                                            tq_number(numbers_strides, 2), tq_number(numbers_strides, 3), diag1,
                                            diag1_shape, codes1, scale1, simdgroup - S0, lane);
