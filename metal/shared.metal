// shared.metal: the packed row, its levels and the rotation. The text of every kernel begins with this file.
// Self-contained; no kernel of its own. Nothing is included at run time: Python puts the texts one behind the other.
//
// PACKED ROW (scheme.py; bit i of a 32-bit word; "half s" = bits 16s .. 16s+15, s = 0 or 1)
//   4 bits  word w = dims 8w .. 8w+7.    dim 8w+2j+s at bits 16s+4j .. +3, j = 0..3
//   2 bits  word w = dims 16w .. 16w+15. dim 16w+2j+s at bits 16s+2j .. +1, j = 0..7
//   8 bits  word w = dims 4w .. 4w+3.    dim 4w+2j+s at bits 16s+8j .. +7, j = 0..1
//   3 bits  unit t = dims 16t .. 16t+15: word t of plane A, and bytes i and i+2 (i = t % 2) of word t / 2 of plane B,
//           which follows plane A. dim 16t+2j+s: j = 0..4 in A at bits 16s+3j .. +2; j = 5, 6 in byte i+2s of B at
//           bits 3(j-5) .. +2; j = 7: low two bits in that byte's bits 6, 7, top bit in A at bit 16s+15.
//   5 bits  word w = dims 8w .. 8w+7 of plane A (two words per unit of 16 dims), and bits 16s+4i .. +3 (i = w % 4) of
//           word w / 4 of plane B, which follows plane A. dim 8w+2j+s: j = 0..2 in A at bits 16s+5j .. +4; j = 3: low
//           four bits in B, top bit in A at bit 16s+15.
//   6 bits  word w = dims 8w .. 8w+7 of plane A, as at 5 bits, and byte i+2s (i = w % 2) of word w / 2 of plane B.
//           dim 8w+2j+s: j = 0, 1 in A at bits 16s+10j .. +5; j = 2: low two bits in bits 0, 1 of that byte, top four
//           in A at bits 16s+6 .. +9; j = 3 in bits 2 .. 7 of that byte.
//   Words are 0 where D does not fill them.

#define TQ_UNROLL _Pragma("clang loop unroll(full)")
#define TQ_ROLLED _Pragma("clang loop unroll(disable)")

// Number i of those that an array's strides carry, two in each but the first.
template <class STRIDES>
METAL_FUNC int tq_number(STRIDES strides, int i) {
  return int(strides[1 + i / 2] >> (i % 2 * 32));
}
constexpr int tq_power_of_two_from(int n) {  // least power of two >= n
  int p = 1;
  while (p < n) p *= 2;
  return p;
}
template <int BITS, int D>
struct Row {  // how lanes share a packed row
  static constant constexpr const int UNITS = (D + 15) / 16;
  static constant constexpr const bool PLANES = BITS == 3 || BITS == 5 || BITS == 6;
  static constant constexpr const int PER_UNIT = BITS == 3 ? 1 : PLANES ? 2 : BITS / 2;  // words of 16 dims, in plane A
  static constant constexpr const int PLANE_A = PLANES ? UNITS * PER_UNIT : (D * BITS + 31) / 32;  // words
  static constant constexpr const int WORDS = PLANE_A + (!PLANES ? 0 : BITS == 6 ? UNITS : (UNITS + 1) / 2);
  static constant constexpr const int DIMS_PER_LANE = D > 512 ? 32 : 16;  // dims per lane
  static constant constexpr const int LANES = tq_power_of_two_from((D + DIMS_PER_LANE - 1) / DIMS_PER_LANE);
  static constant constexpr const int VECTORS = 32 / LANES;             // per simdgroup
  static constant constexpr const bool WHOLE = D % DIMS_PER_LANE == 0;  // a lane has DIMS_PER_LANE dims or none
  // Whether dim i of lane t exists; a constant if every lane is full, the same for all i if no lane is cut.
  static METAL_FUNC bool has(int t, int i) {
    return LANES * DIMS_PER_LANE == D || (WHOLE ? t < D / DIMS_PER_LANE : t * DIMS_PER_LANE + i < D);
  }
};

// Levels without a table: f(c) = as_type<half>(base + (c << p)) is piecewise linear, its slope doubles with each
// octave, so f(c) - f(n-1-c) is odd in c and sinh-like. Two integer operations and one half2 subtraction give two
// levels.
// x: the codes of dims 2j and 2j+1 at bit p of the two halves, nothing else set. level = UNIT * result.
METAL_FUNC half2 tq_odd(uint x, uint low, uint sum) {
  return as_type<half2>(low + x) - as_type<half2>(sum - x);
}

template <int BITS>
struct Levels {};
template <>
struct Levels<4> {
  static constant constexpr const float UNIT = 2.102116088679744f;
  static METAL_FUNC half2 at8(uint x) { return tq_odd(x & 0x0f000f00u, 0x2e762e76u, 0x3d763d76u); }
  static METAL_FUNC void eight(uint w, thread half2 *y) {  // a word: 4 pairs
    y[0] = at8(w << 8);
    y[1] = at8(w << 4);
    y[2] = at8(w);
    y[3] = at8(w >> 4);
  }
};
template <>
struct Levels<2> {
  static constant constexpr const float UNIT = 0.4557776517220176f * 128.0f;
  static METAL_FUNC half2 at4(uint x) { return tq_odd(x & 0x00300030u, 0x3bd53bd5u, 0x3c053c05u); }
  static METAL_FUNC half2 at6(uint x) { return tq_odd(x & 0x00c000c0u, 0x33543354u, 0x34143414u); }
  static METAL_FUNC half2 at8(uint x) { return tq_odd(x & 0x03000300u, 0x29502950u, 0x2c502c50u); }
  static METAL_FUNC void sixteen(uint w, thread half2 *y) {  // a word: 8 pairs
    uint a = w << 4, b = w >> 6;
    y[0] = at4(a);
    y[1] = at6(a);
    y[2] = at4(w);
    y[3] = at6(w);
    y[4] = at8(w);
    y[5] = at4(b);
    y[6] = at6(b);
    y[7] = at8(b);
  }
};
template <>
struct Levels<3> {
  static constant constexpr const float UNIT = 0.25908226062160244f * 256.0f;
  static METAL_FUNC half2 at3(uint x) { return tq_odd(x & 0x00380038u, 0x3bd23bd2u, 0x3c0a3c0au); }
  static METAL_FUNC half2 at6(uint x) { return tq_odd(x & 0x01c001c0u, 0x2e902e90u, 0x30503050u); }
  // a: word of plane A. b: the unit's byte of plane B in the low byte of each half.
  static METAL_FUNC void sixteen(uint a, uint b, thread half2 *y) {
    uint r = a >> 6;
    y[0] = at3(a << 3);
    y[1] = at3(a);
    y[2] = at6(a);
    y[3] = at3(r);
    y[4] = at6(r);
    y[5] = at3(b << 3);
    y[6] = at3(b);
    y[7] = at6((b & 0x00c000c0u) | ((a >> 7) & 0x01000100u));
  }
};

// 5 bits: t * (t^2 + k), 6 and 8 bits: t * (t^4 + k) of that difference t, where f's slope doubles at code KINK and,
// within reach of a code, nowhere else. Then t is the same for each bit P that the code is at: few fields need a shift.
// x: the codes of dims 2j and 2j+1 at bit P of the two halves, and anything else.
template <int BITS, int KINK, int P>
METAL_FUNC half2 tq_one_kink(uint x) {
  static_assert(KINK << P <= 1024, "more than an octave below the kink");
  constexpr uint MASK = ((1u << BITS) - 1) << P, LOW = ((26 - BITS - P) << 10) - (KINK << P), BOTH = 0x00010001u;
  return tq_odd(x & (MASK * BOTH), LOW * BOTH, (LOW + MASK) * BOTH);
}
template <>
struct Levels<5> {
  static constant constexpr const float UNIT = 1.051300399314983f;
  template <int P>
  static METAL_FUNC half2 at(uint x) {
    half2 t = tq_one_kink<5, 29, P>(x);
    return t * fma(t, t, half2(1.90625h));
  }
  // a: word of plane A. b: its four bits of plane B lowest in each half.
  static METAL_FUNC void eight(uint a, uint b, thread half2 *y) {
    uint r = a >> 6;
    y[0] = at<0>(a);
    y[1] = at<5>(a);
    y[2] = at<4>(r);
    y[3] = at<5>(((b << 5) & 0x01e001e0u) | (r & 0x02000200u));
  }
};
template <>
struct Levels<6> {
  static constant constexpr const float UNIT = 1.3335264707750818f;
  template <int P>
  static METAL_FUNC half2 at(uint x) {
    half2 t = tq_one_kink<6, 61, P>(x), w = t * t;
    return t * fma(w, w, half2(1.65625h));
  }
  // a: word of plane A. b: its byte of plane B lowest in each half.
  static METAL_FUNC void eight(uint a, uint b, thread half2 *y) {
    y[0] = at<0>(a);
    y[1] = at<4>(a >> 6);
    y[2] = at<4>(((b << 4) & 0x00300030u) | (a & 0x03c003c0u));
    y[3] = at<2>(b);
  }
};
template <>
struct Levels<8> {
  static constant constexpr const float UNIT = 1.3335264707750818f;
  template <int P>
  static METAL_FUNC half2 at(uint x) {
    half2 t = tq_one_kink<8, 236, P>(x), w = t * t;
    return t * fma(w, w, half2(1.65625h));
  }
  // The curve of 6 bits, four codes for one, so that these levels divide its cells. w: a word, 2 pairs.
  static METAL_FUNC void four(uint w, thread half2 *y) {
    y[0] = at<0>(w);
    y[1] = at<0>(w >> 8);
  }
};
// The 8 pairs of levels of a unit of 16 dims. w: its words of plane A; b: what plane B has of it, lowest in
// each half: a byte (3 and 5 bits), two bytes (6 bits).
template <int BITS>
METAL_FUNC void tq_unit_levels(const thread uint *w, uint b, thread half2 *y) {
  if (BITS == 4) {
    Levels<4>::eight(w[0], y);
    Levels<4>::eight(w[1], y + 4);
  } else if (BITS == 2)
    Levels<2>::sixteen(w[0], y);
  else if (BITS == 3)
    Levels<3>::sixteen(w[0], b, y);
  else if (BITS == 5) {
    Levels<5>::eight(w[0], b, y);
    Levels<5>::eight(w[1], b >> 4, y + 4);
  } else if (BITS == 6) {
    Levels<6>::eight(w[0], b, y);
    Levels<6>::eight(w[1], b >> 8, y + 4);
  } else {
    TQ_UNROLL for (int i = 0; i < 4; i++)
      Levels<8>::four(w[i], y + 2 * i);
  }
}

// Hadamard transform (not normalised) of the dims START .. START + P - 1 of vectors; a lane has DIMS_PER_LANE dims.
template <int D, int DIMS_PER_LANE, int LANES, int START, int P>
METAL_FUNC void tq_hadamard(thread float *y, int lane, int t) {
  constexpr bool ALL = P == D && LANES * DIMS_PER_LANE == D;  // every lane takes part
  int r = t - START / DIMS_PER_LANE;
  bool inside = ALL || (r >= 0 && r < P / DIMS_PER_LANE);
  if (inside) {
    TQ_UNROLL for (int h = 1; h < DIMS_PER_LANE; h *= 2) {
      TQ_UNROLL for (int i = 0; i < DIMS_PER_LANE; i++) {
        if ((i & h) == 0) {
          float a = y[i], b = y[i + h];
          y[i] = a + b;
          y[i + h] = a - b;
        }
      }
    }
  }
  TQ_UNROLL for (int m = 1; m < P / DIMS_PER_LANE; m *= 2) {
    float sign = !inside ? 0.0f : (r & m) ? -1.0f : 1.0f;  // outside, y comes from the lane itself
    ushort from = ushort(inside ? lane + (r ^ m) - r : lane);
    TQ_UNROLL for (int i = 0; i < DIMS_PER_LANE; i++) {
      float other = ALL ? simd_shuffle_xor(y[i], ushort(m)) : simd_shuffle(y[i], from);
      y[i] = fma(sign, y[i], other);
    }
  }
}

// ---- the output of one row of queries (attend.metal with one launch, merge.metal)
// Lanes t = 0 .. LANES - 1 hold DIMS_PER_LANE dims each of the sums of packed values (rotated, without UNIT) and of
// exact ones.
// mean: of the packed values, rotated; packed_sum: the sum of their weights.
template <int BITS, int D, bool MEAN, class T>
METAL_FUNC void tq_finish(thread float *rotated, const thread float *exact, float sum, float packed_sum,
                          const device float *diag, const device half *mean, device T *out, bool live, int lane,
                          int t) {
  typedef Row<4, D> R;
  constexpr int DIMS_PER_LANE = R::DIMS_PER_LANE, LANES = R::LANES, P = tq_power_of_two_from(D / 2 + 1);
  if (MEAN) {
    float weight = packed_sum * (1.0f / Levels<(BITS ? BITS : 4)>::UNIT);
    TQ_UNROLL for (int i = 0; i < DIMS_PER_LANE; i++) {
      if (R::has(t, i)) rotated[i] = fma(weight, float(mean[t * DIMS_PER_LANE + i]), rotated[i]);
    }
  }
  if (BITS) {
    if (P != D) {
      tq_hadamard<D, DIMS_PER_LANE, LANES, D - P, P>(rotated, lane, t);
      TQ_UNROLL for (int i = 0; i < DIMS_PER_LANE; i++) {
        if (R::has(t, i)) rotated[i] *= diag[D + t * DIMS_PER_LANE + i];
      }
    }
    tq_hadamard<D, DIMS_PER_LANE, LANES, 0, P>(rotated, lane, t);
  }
  float inverse = sum > 0 ? 1.0f / sum : 0.0f;  // a row that attends to nothing gives 0
  TQ_UNROLL for (int i = 0; i < DIMS_PER_LANE; i++) {
    int d = t * DIMS_PER_LANE + i;
    if (live && R::has(t, i)) {
      float y = exact[i];
      if (BITS) y = fma(diag[d] * Levels<(BITS ? BITS : 4)>::UNIT, rotated[i], y);
      out[d] = T(y * inverse);
    }
  }
}
