// attend.metal: decode attention straight from a packed KV cache. Pass 1 of 2 (the partial results of "flash
// decoding"), or the whole of it in a single launch.
// Compiled behind shared.metal, which describes the packed row. The text above the line "// ==== body" is the end of
// the header of mx.fast.metal_kernel, the rest is its source.
//
// MATHEMATICS
//   The cache is [sink: exact][packed][recent: exact], in the order of the tokens. A packed row is levels * scale of a
//   rotated vector, plus a rotated mean. Keys have a mean per segment of tokens (RoPE turns a bias of the keys with the
//   position), values have one mean for all tokens. With R the rotation:
//     q.k     = (R q).(levels * scale) + (R q).mean
//     sum p v = R^T (sum p (levels * scale) + (sum p) mean)
//   Where the channels of the keys are balanced, R begins with a diagonal of the kv head's own, for the query the
//   inverse of that for the keys.
//   So the query is rotated once and nothing is un-rotated in the loop over tokens. A mean costs one addition per row
//   and token. Sums over packed values and over exact values stay apart until the end, where the former are un-rotated.
//   Logits, the running maximum and sums are float32. Softmax has base 2: the query carries scale * log2 e. When the
//   maximum of a row in a tile exceeds m, m becomes that maximum + SLACK = 8 and the sums are rescaled; in practice
//   this happens in the first tile only. Weights are then at most 1, and the largest is at least 2^-8.
//
// MAPPING
//   A row is one query head of one query token. A simdgroup works on ROWS rows of a kv head and on a run of tokens, in
//   tiles of 32 * TOKENS_PER_LANE tokens. A packed word is read and decoded once for its ROWS rows.
//   Keys: a lane owns TOKENS_PER_LANE whole tokens and forms their ROWS dot products alone. The query is broadcast from
//     threadgroup memory. There are no shuffles, and exp2 and the scales cost once per row and token.
//   Weights, times the scales of the values, pass through threadgroup memory of the simdgroup.
//   Values: a lane sums DIMS_PER_LANE dims, so VALUE_DIM / DIMS_PER_LANE lanes share a token and several tokens are in
//     flight. A lane holds ROWS * DIMS_PER_LANE sums.
//   SHARED_TILES, for more rows than one simdgroup holds: the simdgroups of a threadgroup have ROWS rows each and the
//     same tokens. Together they decode each tile to threadgroup memory, in CHUNKS pieces: of the dims of the keys, of
//     the tokens of the values. A simdgroup that has no row of its own only helps to decode.
//   QUERIES_IN_DEVICE_MEMORY, if the queries of so many rows do not fit into threadgroup memory: they wait in `acc`,
//     where the results of the block will be written at the end.
//   SAME_SIDES, for the latents of multi-head latent attention, which serve as keys and values: the rows of k_* are
//     both. Simdgroups that share tiles decode each row once for both. With CHUNKS = 2 a tile has half as many tokens,
//     and two lanes form the dot product of a token, each that of half the dims.
//   ROPE_DIM, only with SAME_SIDES: what the position adds to a logit is the dot product of further dims of the query,
//     which come with a scale of their own, and a row of v_*. A shared tile holds these beside the latents.
//   A block is the tokens of a threadgroup: a run for each of its simdgroups, or one for all if they share tiles. Where
//   each has its own, their results are merged at the end.
//   Exact tokens (sink and recent as one list) and packed ones are different runs of the same code: blocks below X are
//   exact. Masks and the end of a run are looked at only in tiles that some row does not see whole.
//
// INPUTS  (T: any float type, each input its own. "Whole buffer": the tokens of a head follow one another)
//   queries               T [B, Hq, L, KEY_DIM + ROPE_DIM], any strides; the last ROPE_DIM dims carry their scale
//   k_sink, k_recent      T [B, Hkv, CAPACITY, KEY_DIM], whole buffers
//   v_sink, v_recent      T [B, Hkv, CAPACITY, VALUE_DIM], whole buffers
//   k_codes, v_codes      uint32 [B, Hkv, CAPACITY, WORDS], whole buffers; with 0 bits the exact vectors, as k_sink
//   k_scale, v_scale      float16 [B, Hkv, CAPACITY, 1], tokens contiguous. Not read with 0 bits
//                         With ROPE_DIM, v_* are RoPE keys: read ROPE for VALUE. With SAME_SIDES alone: not read
//   k_means               float16 [B, Hkv, CAPACITY, KEY_DIM], a whole buffer, rotated. Row i belongs to the packed
//                         tokens i * SEGMENT .. (i + 1) * SEGMENT - 1. Read only if KEY_MEANS
//   v_means               float16 [B, Hkv, CAPACITY, VALUE_DIM], rotated. Row 0: of all. Read only if VALUE_MEANS
//   mask                  bool or T [B, Hq, L, N], any strides, columns in the order of the tokens. Read only if flag 2
//   sinks                 T [Hq], a logit per head that takes weight and gives no value. Read here only if flag 8 and
//                         SINGLE_LAUNCH
//   diagonals             float [..] + 8 dims of size 1: of the rotation of the keys [ROUNDS, KEY_DIM], then of the
//                         values [ROUNDS, VALUE_DIM], then of RoPE keys [ROUNDS, ROPE_DIM]. With balanced keys then
//                         those by which the queries of each kv head are rotated [B, Hkv, ROUNDS, KEY_DIM]. The
//                         strides of the 8 dims are 16 numbers of 32 bits, two in each, which so reach the kernel
//                         without a buffer: n_sink, n_packed, n_recent, X = exact blocks, blocks, row groups, flags, L,
//                         Hq, Hkv, scale * log2 e (the bits of a float), SEGMENT (a multiple of 128), ACC_ROWS, B,
//                         simdgroups of merge.metal, where the diagonals of the kv heads begin (0: there are none)
//                         flags: 1 causal (query l is token N - L + l), 2 mask, 8 sinks
// OUTPUT  acc
//   SINGLE_LAUNCH: the output of attention, T [B, Hq, L, VALUE_DIM]
//   else float [B, Hkv, blocks, ACC_ROWS, ACC_ROW]: the first VALUE_DIM numbers of the first R rows are sums of
//     2^(logit - m) * value; those of blocks >= X are still rotated and without UNIT. Behind them
//     float [B, Hkv, R, blocks, 2]: m (base 2) and the sum of 2^(logit - m). An empty block has m = LOWEST and sum 0.
// TEMPLATE
//   T type of acc; EXACT_KEY, EXACT_VALUE types of the exact rows of k_* and v_*
//   KEY_BITS, VALUE_BITS in {0, 2, 3, 4, 5, 6, 8}; KEY_DIM, VALUE_DIM head dims, multiples of 16 from 32 to 576
//   KEY_MEANS, VALUE_MEANS: packed keys, values have a mean; not with SAME_SIDES
//   SAME_SIDES, ROPE_DIM (0: none), ROPE_BITS (0 without): as above. With SAME_SIDES, VALUE_DIM = KEY_DIM, VALUE_BITS =
//     KEY_BITS
//   ROWS per simdgroup, 1 to 8, or to 12 if SHARED_TILES; TOKENS_PER_LANE 1, 2 or 4
//   DIMS_PER_LANE of the values: a multiple of 8 (of 4 if SHARED_TILES; 8 or a multiple of 16 if VALUE_BITS = 3) that
//     divides VALUE_DIM, with VALUE_DIM / DIMS_PER_LANE <= 32
//   SIMDGROUPS per threadgroup; SHARED_TILES, QUERIES_IN_DEVICE_MEMORY (only with SHARED_TILES): as above
//   CHUNKS of a shared tile: 1, or 2 if 64 divides KEY_DIM
//   SINGLE_LAUNCH: a threadgroup has all blocks of its rows, merges them and writes the output (not if SHARED_TILES)
// LAUNCH
//   R = Hq / Hkv * L rows per kv head. How many tokens a block gets is computed here: lengths are data, and nothing is
//   compiled again when they change. merge.metal follows, unless SINGLE_LAUNCH.
//   grid (32, SIMDGROUPS * blocks, B * Hkv * row groups), threadgroup (32, SIMDGROUPS, 1), X <= blocks,
//     row groups = ceil(R / ROWS), or if SHARED_TILES ceil(R / (SIMDGROUPS * ROWS)).
//   SINGLE_LAUNCH: blocks = 1, and X is the number of simdgroups, up to SIMDGROUPS, that have exact tokens.
//   ACC_ROWS = R and ACC_ROW = VALUE_DIM; if QUERIES_IN_DEVICE_MEMORY, ACC_ROWS = row groups * SIMDGROUPS * ROWS and
//     ACC_ROW = max(KEY_DIM + ROPE_DIM, VALUE_DIM).
//
// REGISTERS (estimate, 32 bits each, D = 128): ROWS * DIMS_PER_LANE sums, TOKENS_PER_LANE * ROWS logits, 2 * ROWS, and
//   12 * TOKENS_PER_LANE + 15 to decode: 77 for 1 row, 91 for 2, 87 for 4, 135 for 8 (115 with TOKENS_PER_LANE = 1).
//   KEY_MEANS adds 2 * ROWS. With more than 8 rows, lanes share what is equal in all of them: 102 for 12 rows.
// THREADGROUP MEMORY, in floats: ROWS * (KEY_DIM + ROPE_DIM) for the queries (twice that if SINGLE_LAUNCH; of all
//   simdgroups if SHARED_TILES; none if QUERIES_IN_DEVICE_MEMORY), SIMDGROUPS * 32 * TOKENS_PER_LANE * PADDED_ROWS for
//   the weights, and the tile. The launch keeps it below 31 KB.

constant constexpr const float TQ_LOG2E = 1.44269504f, TQ_SLACK = 8.0f;
constant constexpr const float TQ_DEAD = -1e30f, TQ_LOWEST = -1e29f;  // finite: safe under fast math
constexpr int tq_min(int a, int b) {
  return a < b ? a : b;
}
constexpr int tq_max(int a, int b) {
  return a > b ? a : b;
}

// ---- rows of keys or values -------------------------------------------------------------------------------------
// at(t): row t. read, eight: 32 (or the last 16) dims of a key, as they lie in memory and 8 decoded ones.
// read_values, values: DIMS_PER_LANE dims of a value, as they lie in memory and decoded.
template <class T, int D>
struct ExactRows {  // tokens of two buffers as one list
  typedef const device T *Pointer;
  static constant constexpr const int BITS = 0, STRIDE = D;
  static constant constexpr const bool AHEAD = false;  // values are read while those before them are summed
  static constant constexpr const float UNIT = 1.0f;
  const device T *first, *second;
  int split;
  METAL_FUNC Pointer at(int t) const { return t < split ? first + (long)t * D : second + (long)(t - split) * D; }
  METAL_FUNC float scale(int t) const { return 1.0f; }
  struct Raw {
    vec<T, 4> v[8];
  };
  template <int N>
  static METAL_FUNC void read(Pointer row, int c, thread Raw &raw) {
    TQ_UNROLL for (int i = 0; i < N / 4; i++)
      raw.v[i] = ((const device vec<T, 4> *)row)[c * 8 + i];
  }
  static METAL_FUNC void eight(const thread Raw &raw, int x, thread float *y) {
    TQ_UNROLL for (int i = 0; i < 8; i++)
      y[i] = float(raw.v[2 * x + i / 4][i % 4]);
  }
  template <int DIMS_PER_LANE>
  struct RawValues {
    vec<T, 4> v[DIMS_PER_LANE / 4];
  };
  template <int DIMS_PER_LANE>
  static METAL_FUNC void read_values(Pointer row, int u, thread RawValues<DIMS_PER_LANE> &raw) {
    TQ_UNROLL for (int i = 0; i < DIMS_PER_LANE / 4; i++)
      raw.v[i] = ((const device vec<T, 4> *)row)[u * (DIMS_PER_LANE / 4) + i];
  }
  template <int DIMS_PER_LANE>
  static METAL_FUNC void values(const thread RawValues<DIMS_PER_LANE> &raw, int u, thread float *y) {
    TQ_UNROLL for (int i = 0; i < DIMS_PER_LANE; i++)
      y[i] = float(raw.v[i / 4][i % 4]);
  }
};

// N words at p, which is aligned to A words.
template <int A, int N>
METAL_FUNC void tq_words(const device uint *p, thread uint *w) {
  constexpr int FOUR = A % 4 == 0 ? N / 4 * 4 : 0, TWO = A % 2 == 0 ? N / 2 * 2 : FOUR;
  TQ_UNROLL for (int i = 0; i < FOUR; i += 4) {
    uint4 v = *(const device uint4 *)(p + i);
    w[i] = v.x;
    w[i + 1] = v.y;
    w[i + 2] = v.z;
    w[i + 3] = v.w;
  }
  TQ_UNROLL for (int i = FOUR; i < TWO; i += 2) {
    uint2 v = *(const device uint2 *)(p + i);
    w[i] = v.x;
    w[i + 1] = v.y;
  }
  TQ_UNROLL for (int i = TWO; i < N; i++)
    w[i] = p[i];
}

// SCALE: pointer to half (constant if the array is tiny, else device).
template <int B, int D, class SCALE>
struct PackedRows {
  typedef const device uint *Pointer;
  typedef Row<B, D> R;
  static constant constexpr const int BITS = B, STRIDE = R::WORDS;
  static constant constexpr const bool AHEAD = true;
  static constant constexpr const float UNIT = Levels<B>::UNIT;
  const device uint *codes;
  SCALE scales;
  METAL_FUNC Pointer at(int t) const { return codes + (long)t * R::WORDS; }
  METAL_FUNC float scale(int t) const { return float(scales[t]); }
  struct Raw {
    uint w[8];
  };
  template <int N>
  static METAL_FUNC void read(Pointer row, int c, thread Raw &raw) {
    if (!R::PLANES) {
      tq_words<R::WORDS, N * B / 32>(row + c * B, raw.w);
    } else if (B == 5 || B == 6) {
      tq_words<R::WORDS, N / 8>(row + 4 * c, raw.w);
      if (B == 5)
        raw.w[4] = row[R::PLANE_A + c];
      else
        tq_words<R::WORDS, N / 16>(row + R::PLANE_A + 2 * c, raw.w + 4);
    } else {
      tq_words<R::WORDS, N / 16>(row + 2 * c, raw.w);
      raw.w[2] = row[R::PLANE_A + c];
    }
  }
  static METAL_FUNC void eight(const thread Raw &raw, int x, thread float *y) {  // x is a constant once unrolled
    half2 z[8];
    if (B == 4) {
      Levels<4>::eight(raw.w[x], z);
    } else if (B == 8) {
      Levels<8>::four(raw.w[2 * x], z);
      Levels<8>::four(raw.w[2 * x + 1], z + 2);
    } else if (B == 2) {
      Levels<2>::sixteen(raw.w[x / 2], z);  // the half not used folds away
    } else if (B == 5) {
      Levels<5>::eight(raw.w[x], raw.w[4] >> (4 * x), z);
    } else if (B == 6) {
      Levels<6>::eight(raw.w[x], raw.w[4 + x / 2] >> (x % 2 * 8), z);
    } else {
      Levels<3>::sixteen(raw.w[x / 2], (raw.w[2] >> (x / 2 * 8)) & 0x00ff00ffu, z);
    }
    constexpr bool HALF = B == 2 || B == 3;
    TQ_UNROLL for (int i = 0; i < 8; i++)
      y[i] = float(z[(HALF ? x % 2 * 4 : 0) + i / 2][i % 2]);
  }
  template <int DIMS_PER_LANE>
  struct RawValues {  // 2 bits: a word per 16 dims, or two bytes per 8; 3 bits: a word and two bytes per unit, or half
    // 5 and 6 bits: the words of plane A, and what plane B has of each unit, or of each 8 dims
    static constant constexpr const int EIGHTS = DIMS_PER_LANE / 8, UNITS = DIMS_PER_LANE / 16;
    static constant constexpr const int PIECES = DIMS_PER_LANE % 16 == 0 ? UNITS : EIGHTS;
    uint w[tq_max(1, B == 3 ? EIGHTS : B == 5 || B == 6 ? EIGHTS + PIECES : B >= 4 ? EIGHTS * B / 4 : PIECES)];
  };
  template <int DIMS_PER_LANE>
  static METAL_FUNC void read_values(Pointer row, int u, thread RawValues<DIMS_PER_LANE> &raw) {
    if (B == 4) {
      TQ_UNROLL for (int i = 0; i < DIMS_PER_LANE / 8; i++)
        raw.w[i] = row[u * (DIMS_PER_LANE / 8) + i];
    } else if (B == 8) {
      TQ_UNROLL for (int i = 0; i < DIMS_PER_LANE / 8; i++)
        tq_words<R::WORDS, 2>(row + u * (DIMS_PER_LANE / 4) + 2 * i, raw.w + 2 * i);
    } else if (B == 2 && DIMS_PER_LANE % 16 == 0) {
      TQ_UNROLL for (int i = 0; i < DIMS_PER_LANE / 16; i++)
        raw.w[i] = row[u * (DIMS_PER_LANE / 16) + i];
    } else if (B == 2) {  // one byte of each half per 8 dims
      TQ_UNROLL for (int i = 0; i < DIMS_PER_LANE / 8; i++)
        raw.w[i] = bytes(row, u * (DIMS_PER_LANE / 8) + i);
    } else if (B == 5 || B == 6) {
      constexpr int EIGHTS = DIMS_PER_LANE / 8, UNITS = DIMS_PER_LANE / 16;
      tq_words<(DIMS_PER_LANE % 16 == 0 ? R::WORDS : 1), EIGHTS>(row + u * EIGHTS, raw.w);
      if (DIMS_PER_LANE % 16 == 0) {
        TQ_UNROLL for (int i = 0; i < UNITS; i++)
          raw.w[EIGHTS + i] = B == 6 ? row[R::PLANE_A + u * UNITS + i] : bytes(row + R::PLANE_A, u * UNITS + i);
      } else {
        TQ_UNROLL for (int i = 0; i < EIGHTS; i++) {
          int e = u * EIGHTS + i;
          raw.w[EIGHTS + i] = B == 6 ? bytes(row + R::PLANE_A, e) : bytes(row + R::PLANE_A, e / 2) >> (e % 2 * 4);
        }
      }
    } else if (DIMS_PER_LANE == 8) {  // half a unit: one of two lanes reads its word, the other its byte
      int t = u / 2;
      raw.w[0] = u & 1 ? bytes(row + R::PLANE_A, t) : row[t];
    } else {
      TQ_UNROLL for (int i = 0; i < DIMS_PER_LANE / 16; i++) {
        int t = u * (DIMS_PER_LANE / 16) + i;
        raw.w[2 * i] = row[t];
        raw.w[2 * i + 1] = bytes(row + R::PLANE_A, t);
      }
    }
  }
  static METAL_FUNC uint bytes(Pointer words, int i) {  // bytes i and i + 2 of those of a word: one in each half
    const device uchar *b = (const device uchar *)(words + i / 2) + (i & 1);
    return as_type<uint>(ushort2(b[0], b[2]));
  }
  template <int DIMS_PER_LANE>
  static METAL_FUNC void values(const thread RawValues<DIMS_PER_LANE> &raw, int u, thread float *y) {
    half2 z[DIMS_PER_LANE / 2];
    if (B == 4) {
      TQ_UNROLL for (int i = 0; i < DIMS_PER_LANE / 8; i++)
        Levels<4>::eight(raw.w[i], z + 4 * i);
    } else if (B == 8) {
      TQ_UNROLL for (int i = 0; i < DIMS_PER_LANE / 4; i++)
        Levels<8>::four(raw.w[i], z + 2 * i);
    } else if (B == 2 && DIMS_PER_LANE % 16 == 0) {
      TQ_UNROLL for (int i = 0; i < DIMS_PER_LANE / 16; i++)
        Levels<2>::sixteen(raw.w[i], z + 8 * i);
    } else if (B == 2) {
      TQ_UNROLL for (int i = 0; i < DIMS_PER_LANE / 8; i++) {
        uint x = raw.w[i], a = x << 4;
        z[4 * i] = Levels<2>::at4(a);
        z[4 * i + 1] = Levels<2>::at6(a);
        z[4 * i + 2] = Levels<2>::at4(x);
        z[4 * i + 3] = Levels<2>::at6(x);
      }
    } else if (B == 5 || B == 6) {
      constexpr int EIGHTS = DIMS_PER_LANE / 8;
      TQ_UNROLL for (int i = 0; i < EIGHTS; i++) {
        constexpr bool WHOLE = DIMS_PER_LANE % 16 == 0;
        uint b = raw.w[EIGHTS + (WHOLE ? i / 2 : i)] >> (WHOLE ? i % 2 * (B == 5 ? 4 : 8) : 0);
        if (B == 5) Levels<5>::eight(raw.w[i], b, z + 4 * i);
        if (B == 6) Levels<6>::eight(raw.w[i], b, z + 4 * i);
      }
    } else if (DIMS_PER_LANE == 8) {  // two lanes, both at this token
      uint x = raw.w[0], a = simd_shuffle_xor(x, ushort(1));
      if (u & 1) x = ((a >> 12) & 0x00070007u) | (x << 3) | ((a >> 4) & 0x08000800u);
      z[0] = Levels<3>::at3(x << 3);
      z[1] = Levels<3>::at3(x);
      z[2] = Levels<3>::at6(x);
      z[3] = Levels<3>::at3(x >> 6);
    } else {
      TQ_UNROLL for (int i = 0; i < DIMS_PER_LANE / 16; i++)
        Levels<3>::sixteen(raw.w[2 * i], raw.w[2 * i + 1], z + 8 * i);
    }
    TQ_UNROLL for (int i = 0; i < DIMS_PER_LANE; i++)
      y[i] = float(z[i / 2][i % 2]);
  }
};
// The packed part of a cache: packed rows, or with 0 bits exact ones.
template <int B, int D, class SCALE>
METAL_FUNC PackedRows<B, D, SCALE> tq_rows(const device uint *codes, SCALE scale) {
  return {codes, scale};
}
template <int B, int D, class T, class SCALE>
METAL_FUNC ExactRows<T, D> tq_rows(const device T *rows, SCALE scale) {
  return {rows, rows, 0};
}

// D dims of packed rows decoded to threadgroup memory, as levels: 8 halves more, so that lanes hit different banks, the
// first two of which are the scales, of the key and of the value.
template <int D>
struct TileRows {
  typedef const threadgroup half *Pointer;
  static constant constexpr const int STRIDE = D + 8;
  static constant constexpr const bool AHEAD = false;
  struct Raw {
    half4 v[8];
  };
  template <int N>
  static METAL_FUNC void read(Pointer row, int c, thread Raw &raw) {
    TQ_UNROLL for (int i = 0; i < N / 4; i++)
      raw.v[i] = ((const threadgroup half4 *)row)[c * 8 + i];
  }
  static METAL_FUNC void eight(const thread Raw &raw, int x, thread float *y) {
    TQ_UNROLL for (int i = 0; i < 8; i++)
      y[i] = float(raw.v[2 * x + i / 4][i % 4]);
  }
  template <int DIMS_PER_LANE>
  struct RawValues {
    half4 v[DIMS_PER_LANE / 4];
  };
  template <int DIMS_PER_LANE>
  static METAL_FUNC void read_values(Pointer row, int u, thread RawValues<DIMS_PER_LANE> &raw) {
    TQ_UNROLL for (int i = 0; i < DIMS_PER_LANE / 4; i++)
      raw.v[i] = ((const threadgroup half4 *)row)[u * (DIMS_PER_LANE / 4) + i];
  }
  template <int DIMS_PER_LANE>
  static METAL_FUNC void values(const thread RawValues<DIMS_PER_LANE> &raw, int u, thread float *y) {
    TQ_UNROLL for (int i = 0; i < DIMS_PER_LANE; i++)
      y[i] = float(raw.v[i / 4][i % 4]);
  }
};
template <class PACKED, int N>
METAL_FUNC void tq_decode_dims(typename PACKED::Pointer row, int c, threadgroup half *to) {
  typename PACKED::Raw raw;
  PACKED::template read<N>(row, c, raw);
  TQ_UNROLL for (int x = 0; x < N / 8; x++) {
    float y[8];
    PACKED::eight(raw, x, y);
    TQ_UNROLL for (int i = 0; i < 2; i++)
      ((threadgroup half4 *)to)[2 * x + i] =
          half4(half(y[4 * i]), half(y[4 * i + 1]), half(y[4 * i + 2]), half(y[4 * i + 3]));
  }
}
// D dims, from 32 * first on, of rows t0 .. end - 1, at most N, by all threads of the threadgroup.
template <int D, int N, int SIMDGROUPS, class PACKED>
METAL_FUNC void tq_decode(PACKED rows, int t0, int end, int first, threadgroup half *tile, int thread_index) {
  for (int i = thread_index; i < N * (D / 32); i += 32 * SIMDGROUPS) {
    int token = uint(i) / (D / 32), c = uint(i) % (D / 32);  // unsigned: no division
    if (t0 + token < end) tq_decode_dims<PACKED, 32>(rows.at(t0 + token), first + c, tile + token * (D + 8) + 32 * c);
  }
  if (D % 32 != 0) {
    for (int token = thread_index; token < min(N, end - t0); token += 32 * SIMDGROUPS)
      tq_decode_dims<PACKED, 16>(rows.at(t0 + token), first + D / 32, tile + token * (D + 8) + D / 32 * 32);
  }
}

// ---- masks -----------------------------------------------------------------------------------------------------
METAL_FUNC float tq_mask(bool attend) {
  return attend ? 0.0f : TQ_DEAD;
}
METAL_FUNC float tq_mask(float added) {
  return max(added * TQ_LOG2E, TQ_DEAD);
}
METAL_FUNC float tq_mask(half added) {
  return tq_mask(float(added));
}
METAL_FUNC float tq_mask(bfloat16_t added) {
  return tq_mask(float(added));
}

// How many tokens of a run come before column `column`; token t of a run is column t, plus `shift` from `split` on.
METAL_FUNC int tq_before(int column, int split, int shift) {
  return max(min(column, split), column - shift);
}

template <class M>
struct Mask {
  M mask;  // of this batch row
  long head_stride, token_stride, column_stride;
  bool causal, array;
  int L, newest;                        // newest: the column of query 0
  int first_head, first_row, last_row;  // row r: head first_head + r / L
  METAL_FUNC float add(float logit, int h, int column) const {
    int r = min(first_row + h, last_row), g = r / L, l = r - g * L;
    if (causal && column > newest + l) logit = TQ_DEAD;
    if (!array) return logit;
    long at = (first_head + g) * head_stride + l * token_stride + column * column_stride;
    float added = tq_mask(mask[at]);
    return added > TQ_DEAD ? logit + added : TQ_DEAD;  // a masked logit may be NaN
  }
};

// ---- the loop over tokens --------------------------------------------------------------------------------------
// A number per row that all lanes know: each lane has all of them, or lane h that of row h, which saves registers.
template <int ROWS, bool SPREAD = (ROWS > 8)>
struct PerRow {
  float x[ROWS];
  METAL_FUNC float get(int h) const { return x[h]; }
  METAL_FUNC void set(int h, float value, int lane) { x[h] = value; }
};
template <int ROWS>
struct PerRow<ROWS, true> {
  float x;
  METAL_FUNC float get(int h) const { return simd_broadcast(x, ushort(h)); }
  METAL_FUNC void set(int h, float value, int lane) { x = lane == h ? value : x; }
};
template <int ROWS, int DIMS_PER_LANE>
struct Partial {
  float acc[ROWS][DIMS_PER_LANE], sum[ROWS];  // of this lane's dims; of its tokens
  PerRow<ROWS> m;
};

// Where the rows of the query lie, FLOATS apart: in threadgroup memory, or where the results will.
template <bool QUERIES_IN_DEVICE_MEMORY, int NEAR_FLOATS, int FAR_FLOATS>
struct Queries {
  typedef threadgroup float *Pointer;
  static constant constexpr const int FLOATS = NEAR_FLOATS;
  static METAL_FUNC Pointer choose(threadgroup float *near, device void *far) { return near; }
};
template <int NEAR_FLOATS, int FAR_FLOATS>
struct Queries<true, NEAR_FLOATS, FAR_FLOATS> {
  typedef device float *Pointer;
  static constant constexpr const int FLOATS = FAR_FLOATS;
  static METAL_FUNC Pointer choose(threadgroup float *near, device void *far) { return (device float *)far; }
};
METAL_FUNC const threadgroup float4 *tq_fours(const threadgroup float *p) {
  return (const threadgroup float4 *)p;
}
METAL_FUNC const device float4 *tq_fours(const device float *p) {
  return (const device float4 *)p;
}

// s[i][h] += query row h . dims 32c .. 32c + N - 1 of the key at row[i]. Query rows are QUERY_STRIDE floats apart.
template <int N, int ROWS, int TOKENS_PER_LANE, int QUERY_STRIDE, class KEYS, class QUERIES>
METAL_FUNC void tq_dots(const thread typename KEYS::Pointer *row, int c, QUERIES q, thread float *s) {
  typename KEYS::Raw raw[TOKENS_PER_LANE];
  TQ_UNROLL for (int i = 0; i < TOKENS_PER_LANE; i++)
    KEYS::template read<N>(row[i], c, raw[i]);
  TQ_UNROLL for (int x = 0; x < N / 8; x++) {
    float y[TOKENS_PER_LANE][8];
    TQ_UNROLL for (int i = 0; i < TOKENS_PER_LANE; i++)
      KEYS::eight(raw[i], x, y[i]);
    TQ_UNROLL for (int h = 0; h < ROWS; h++) {
      TQ_UNROLL for (int k = 0; k < 2; k++) {
        float4 a = q[h * (QUERY_STRIDE / 4) + x * 2 + k];
        TQ_UNROLL for (int i = 0; i < TOKENS_PER_LANE; i++) {
          s[i * ROWS + h] = fma(a.x, y[i][4 * k], s[i * ROWS + h]);
          s[i * ROWS + h] = fma(a.y, y[i][4 * k + 1], s[i * ROWS + h]);
          s[i * ROWS + h] = fma(a.z, y[i][4 * k + 2], s[i * ROWS + h]);
          s[i * ROWS + h] = fma(a.w, y[i][4 * k + 3], s[i * ROWS + h]);
        }
      }
    }
  }
}

// ... of N dims.
template <int ROWS, int TOKENS_PER_LANE, int QUERY_STRIDE, int N, class KEYS, class QUERIES>
METAL_FUNC void tq_all_dots(const thread typename KEYS::Pointer *row, QUERIES q, thread float *s) {
  constexpr int AT_ONCE = ROWS <= 2 && N % 64 == 0 ? 2 : 1;  // more in a row: the code gets long
  auto q32 = tq_fours(q);
  TQ_ROLLED for (int c = 0; c < N / 32; c += AT_ONCE, q32 += 8 * AT_ONCE) {
    TQ_UNROLL for (int i = 0; i < AT_ONCE; i++)
      tq_dots<32, ROWS, TOKENS_PER_LANE, QUERY_STRIDE, KEYS>(row, c + i, q32 + 8 * i, s);
  }
  if (N % 32 != 0) tq_dots<16, ROWS, TOKENS_PER_LANE, QUERY_STRIDE, KEYS>(row, N / 32, q32, s);
}

// ... of N dims, by PARTS lanes: dims 32c .. 32c + 31 for c = part, part + PARTS, ...
template <int ROWS, int TOKENS_PER_LANE, int QUERY_STRIDE, int N, int PARTS, class KEYS, class QUERIES>
METAL_FUNC void tq_some_dots(const thread typename KEYS::Pointer *row, int part, QUERIES q, thread float *s) {
  auto q32 = tq_fours(q);
  TQ_ROLLED for (int c = part; c < N / 32; c += PARTS)
    tq_dots<32, ROWS, TOKENS_PER_LANE, QUERY_STRIDE, KEYS>(row, c, q32 + 8 * c, s);
  if (N % 32 != 0 && part == 0) tq_dots<16, ROWS, TOKENS_PER_LANE, QUERY_STRIDE, KEYS>(row, N / 32, q32 + N / 4 - 4, s);
}

template <int PADDED_ROWS>
METAL_FUNC void tq_store_weights(const thread float *p, threadgroup float *to) {
  if (PADDED_ROWS <= 2) {
    TQ_UNROLL for (int i = 0; i < PADDED_ROWS; i++)
      to[i] = p[i];
  } else {
    TQ_UNROLL for (int i = 0; i < PADDED_ROWS / 4; i++) {
      float4 a;
      a.x = p[4 * i];
      a.y = p[4 * i + 1];
      a.z = p[4 * i + 2];
      a.w = p[4 * i + 3];
      ((threadgroup float4 *)to)[i] = a;
    }
  }
}

template <int PADDED_ROWS>
METAL_FUNC void tq_weights(const threadgroup float *from, thread float *p) {
  if (PADDED_ROWS == 1) {
    p[0] = from[0];
  } else if (PADDED_ROWS == 2) {
    float2 a = *(const threadgroup float2 *)from;
    p[0] = a.x;
    p[1] = a.y;
  } else {
    TQ_UNROLL for (int i = 0; i < PADDED_ROWS / 4; i++) {
      float4 a = ((const threadgroup float4 *)from)[i];
      p[4 * i] = a.x;
      p[4 * i + 1] = a.y;
      p[4 * i + 2] = a.z;
      p[4 * i + 3] = a.w;
    }
  }
}

// The first U values of `left` tokens, as they lie in memory, if there are so many and they are read AHEAD.
template <int U, int TOKENS_IN_FLIGHT, class VALUES, int DIMS_PER_LANE>
METAL_FUNC void tq_read_values(typename VALUES::Pointer v, int left, int u,
                               thread typename VALUES::template RawValues<DIMS_PER_LANE> *raw) {
  if (VALUES::AHEAD && left > (U - 1) * TOKENS_IN_FLIGHT) {
    TQ_UNROLL for (int k = 0; k < U; k++)
      VALUES::template read_values<DIMS_PER_LANE>(v + k * TOKENS_IN_FLIGHT * VALUES::STRIDE, u, raw[k]);
  }
}

typedef const threadgroup float *Weights;
// out += weight * value, U * TOKENS_IN_FLIGHT tokens at a time while at least that many are left. `left` counts the
// tokens from this lane's next one to the end. (A pointer set that far back could lie before its array.)
// raw: the first U values, if they are read AHEAD. Then the next ones are read as soon as these are decoded, so that
// the memory works while the sums are formed.
template <int U, int TOKENS_IN_FLIGHT, int PADDED_ROWS, class VALUES, int ROWS, int DIMS_PER_LANE>
METAL_FUNC void tq_sum_values(thread typename VALUES::Pointer &v, thread Weights &w, thread int &left, int u,
                              thread typename VALUES::template RawValues<DIMS_PER_LANE> *raw,
                              thread Partial<ROWS, DIMS_PER_LANE> &out) {
  TQ_ROLLED for (; left > (U - 1) * TOKENS_IN_FLIGHT; left -= U * TOKENS_IN_FLIGHT) {
    typename VALUES::template RawValues<DIMS_PER_LANE> next[U];
    tq_read_values<U, TOKENS_IN_FLIGHT, VALUES, DIMS_PER_LANE>(v + U * TOKENS_IN_FLIGHT * VALUES::STRIDE,
                                                               left - U * TOKENS_IN_FLIGHT, u, next);
    TQ_UNROLL for (int k = 0; k < U; k++) {
      float y[DIMS_PER_LANE], p[PADDED_ROWS];
      if (!VALUES::AHEAD)
        VALUES::template read_values<DIMS_PER_LANE>(v + k * TOKENS_IN_FLIGHT * VALUES::STRIDE, u, raw[k]);
      VALUES::template values<DIMS_PER_LANE>(raw[k], u, y);
      if (VALUES::AHEAD) raw[k] = next[k];
      tq_weights<PADDED_ROWS>(w + k * TOKENS_IN_FLIGHT * PADDED_ROWS, p);
      TQ_UNROLL for (int h = 0; h < ROWS; h++) {
        TQ_UNROLL for (int d = 0; d < DIMS_PER_LANE; d++)
          out.acc[h][d] = fma(p[h], y[d], out.acc[h][d]);
      }
    }
    w += U * TOKENS_IN_FLIGHT * PADDED_ROWS;
    v += U * TOKENS_IN_FLIGHT * VALUES::STRIDE;
  }
}

// The same for one token of a tile that not all rows see whole: of a row that it is masked for, its value adds nothing,
// not even 0 * NaN.
template <int PADDED_ROWS, class VALUES, int ROWS, int DIMS_PER_LANE>
METAL_FUNC void tq_sum_seen(typename VALUES::Pointer v, Weights w, int u, thread Partial<ROWS, DIMS_PER_LANE> &out) {
  typename VALUES::template RawValues<DIMS_PER_LANE> raw;
  float y[DIMS_PER_LANE], p[PADDED_ROWS];
  VALUES::template read_values<DIMS_PER_LANE>(v, u, raw);
  VALUES::template values<DIMS_PER_LANE>(raw, u, y);
  tq_weights<PADDED_ROWS>(w, p);
  TQ_UNROLL for (int h = 0; h < ROWS; h++) {
    TQ_UNROLL for (int d = 0; d < DIMS_PER_LANE; d++)
      out.acc[h][d] = fma(p[h], p[h] == 0 ? 0.0f : y[d], out.acc[h][d]);
  }
}

// to[h] = query row h . mean; q carries UNIT, a mean does not.
template <int ROWS, int QUERY_STRIDE, int KEY_DIM, class KEYS, class QUERIES>
METAL_FUNC void tq_mean_bias(QUERIES q, const device half *mean, thread PerRow<ROWS> &to, int lane) {
  float sum[ROWS];
  TQ_UNROLL for (int h = 0; h < ROWS; h++)
    sum[h] = 0;
  for (int d = lane; d < KEY_DIM; d += 32) {
    float x = float(mean[d]) * (1.0f / KEYS::UNIT);
    TQ_UNROLL for (int h = 0; h < ROWS; h++)
      sum[h] = fma(q[h * QUERY_STRIDE + d], x, sum[h]);
  }
  TQ_UNROLL for (int h = 0; h < ROWS; h++)
    to.set(h, simd_sum(sum[h]), lane);
}

// Tokens begin .. end - 1 of a run. Every row sees all of a tile that ends at safe_end or before.
// has_rows: false for a simdgroup that only helps to decode (SHARED_TILES). q: ROWS rows, QUERY_STRIDE floats apart.
// weights: 32 * TOKENS_PER_LANE * PADDED_ROWS floats of this simdgroup. means: of segments. rope: RoPE keys, if
// ROPE_DIM.
template <int ROWS, int PADDED_ROWS, int TOKENS_PER_LANE, int DIMS_PER_LANE, int SIMDGROUPS, bool SHARED_TILES,
          int CHUNKS, int QUERY_STRIDE, int KEY_DIM, int VALUE_DIM, bool KEY_MEANS, bool SAME_SIDES, int ROPE_DIM,
          class KEYS, class VALUES, class ROPE, class M, class QUERIES>
METAL_FUNC void tq_run(KEYS keys, VALUES values, ROPE rope, int begin, int end, int safe_end, int split, int shift,
                       QUERIES q, threadgroup float *weights, threadgroup half *tile, const device half *means,
                       int segment, Mask<M> mask, thread Partial<ROWS, DIMS_PER_LANE> &out, bool has_rows,
                       int simdgroup, int lane) {
  constexpr bool ONE_TILE = SAME_SIDES && SHARED_TILES && KEYS::BITS != 0;  // of keys that are the values
  constexpr bool ROPE_TILE = ONE_TILE && ROPE_DIM != 0 && ROPE::BITS != 0;
  constexpr int R_DIM = ROPE_DIM ? ROPE_DIM : 32;
  constexpr int PARTS = ONE_TILE ? CHUNKS : 1;                                                // lanes that share a key
  constexpr bool MANY_WORDS = (VALUES::BITS == 5 || VALUES::BITS == 6) && DIMS_PER_LANE > 8;  // of a value, in a lane
  constexpr int LANES_PER_TOKEN = VALUE_DIM / DIMS_PER_LANE, TOKENS_IN_FLIGHT = 32 / LANES_PER_TOKEN,
                TILE = 32 * TOKENS_PER_LANE / PARTS, U = ROWS <= 2 && !MANY_WORDS ? 8 : 4;
  int u = uint(lane) % LANES_PER_TOKEN, slot = uint(lane) / LANES_PER_TOKEN;
  int key_lane = PARTS == 1 ? lane : int(uint(lane) % (32 / PARTS)), part = PARTS == 1 ? 0 : lane / (32 / PARTS);
  threadgroup float *lane_weights = weights + lane * PADDED_ROWS;
  threadgroup half *rope_tile = tile + TILE * (KEY_DIM + 8);
  int segment_start = 0;                  // the first token of the newest segment
  PerRow<ROWS> segment_bias, bias_delta;  // what its mean adds, the last more
  has_rows = has_rows || !SHARED_TILES;
  if (KEY_MEANS && has_rows && begin < end) {
    segment_start = begin / segment * segment;
    tq_mean_bias<ROWS, QUERY_STRIDE, KEY_DIM, KEYS>(q, means + (long)(begin / segment) * KEY_DIM, segment_bias, lane);
  }
  for (int t0 = begin; t0 < end; t0 += TILE) {
    // ---- keys: ROWS dot products for TOKENS_PER_LANE tokens
    float s[TOKENS_PER_LANE * ROWS];
    typename KEYS::Pointer row[TOKENS_PER_LANE];
    int token[TOKENS_PER_LANE];
    TQ_UNROLL for (int i = 0; i < TOKENS_PER_LANE; i++) {
      token[i] = min(t0 + 32 * i + key_lane, end - 1);
      row[i] = keys.at(token[i]);
      TQ_UNROLL for (int h = 0; h < ROWS; h++)
        s[i * ROWS + h] = 0;
    }
    if (ONE_TILE) {
      constexpr int N = KEY_DIM / PARTS;  // dims
      threadgroup half *key = tile + key_lane * (KEY_DIM + 8);
      const threadgroup half *decoded = tile + min(key_lane, end - 1 - t0) * (KEY_DIM + 8) + part * N;
      threadgroup_barrier(mem_flags::mem_threadgroup);  // what the tile holds is not needed now
      tq_decode<KEY_DIM, TILE, SIMDGROUPS>(keys, t0, end, 0, tile, simdgroup * 32 + lane);
      if (ROPE_TILE) tq_decode<R_DIM, TILE, SIMDGROUPS>(rope, t0, end, 0, rope_tile, simdgroup * 32 + lane);
      if (simdgroup == 0 && part == 0) {  // the scales: behind a row's dims
        key[KEY_DIM] = half(keys.scale(token[0]));
        if (ROPE_TILE) key[KEY_DIM + 1] = half(rope.scale(token[0]));
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (has_rows) tq_all_dots<ROWS, 1, QUERY_STRIDE, N, TileRows<N>>(&decoded, q + part * N, s);
    } else if (SHARED_TILES && KEYS::BITS) {
      constexpr int N = KEY_DIM / CHUNKS;  // dims
      const threadgroup half *decoded[TOKENS_PER_LANE];
      TQ_UNROLL for (int i = 0; i < TOKENS_PER_LANE; i++)
        decoded[i] = tile + min(32 * i + lane, end - 1 - t0) * (N + 8);
      TQ_ROLLED for (int c = 0; c < KEY_DIM; c += N) {
        threadgroup_barrier(mem_flags::mem_threadgroup);  // what the tile holds is not needed now
        tq_decode<N, TILE, SIMDGROUPS>(keys, t0, end, c / 32, tile, simdgroup * 32 + lane);
        if (c == 0 && simdgroup == 0) {  // the scales: behind a row's dims
          TQ_UNROLL for (int i = 0; i < TOKENS_PER_LANE; i++) {
            threadgroup half *behind = tile + (32 * i + lane) * (N + 8) + N;
            behind[0] = half(keys.scale(token[i]));
            if (VALUES::BITS) behind[1] = half(values.scale(token[i]));
          }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (has_rows) tq_all_dots<ROWS, TOKENS_PER_LANE, QUERY_STRIDE, N, TileRows<N>>(decoded, q + c, s);
      }
    } else {
      if (has_rows) tq_all_dots<ROWS, TOKENS_PER_LANE, QUERY_STRIDE, KEY_DIM, KEYS>(row, q, s);
    }
    int n = min(TILE, end - t0);
    typename VALUES::Pointer v = values.at(min(t0 + slot, end - 1));
    typename VALUES::template RawValues<DIMS_PER_LANE> raw[U];
    if (!(SHARED_TILES && VALUES::BITS) && has_rows && slot < TOKENS_IN_FLIGHT)
      tq_read_values<U, TOKENS_IN_FLIGHT, VALUES, DIMS_PER_LANE>(v, n - slot, u, raw);
    bool whole = t0 + TILE <= safe_end;  // every row sees all of the tile
    if (has_rows) {
      // ---- logits
      if (KEY_MEANS && min(t0 + TILE, end) > segment_start + segment) {  // a segment is no shorter than a tile
        segment_start += segment;
        bias_delta = segment_bias;
        tq_mean_bias<ROWS, QUERY_STRIDE, KEY_DIM, KEYS>(q, means + (long)(segment_start / segment) * KEY_DIM,
                                                        segment_bias, lane);
        TQ_UNROLL for (int h = 0; h < ROWS; h++)
          bias_delta.set(h, bias_delta.get(h) - segment_bias.get(h), lane);
      }
      float value_scale[TOKENS_PER_LANE], s_rope[TOKENS_PER_LANE * ROWS];
      if (ROPE_DIM) {
        typename ROPE::Pointer rope_row[TOKENS_PER_LANE];
        TQ_UNROLL for (int i = 0; i < TOKENS_PER_LANE; i++) {
          rope_row[i] = rope.at(token[i]);
          TQ_UNROLL for (int h = 0; h < ROWS; h++)
            s_rope[i * ROWS + h] = 0;
        }
        if (ROPE_TILE) {
          const threadgroup half *decoded = rope_tile + min(key_lane, end - 1 - t0) * (R_DIM + 8);
          tq_some_dots<ROWS, 1, QUERY_STRIDE, R_DIM, PARTS, TileRows<R_DIM>>(&decoded, part, q + KEY_DIM, s_rope);
        } else {
          tq_some_dots<ROWS, TOKENS_PER_LANE, QUERY_STRIDE, R_DIM, PARTS, ROPE>(rope_row, part, q + KEY_DIM, s_rope);
        }
      }
      TQ_UNROLL for (int i = 0; i < TOKENS_PER_LANE; i++) {
        constexpr int N = ONE_TILE ? KEY_DIM : KEY_DIM / CHUNKS;
        const threadgroup half *behind = tile + (32 * i + key_lane) * (N + 8) + N;
        float key_scale = SHARED_TILES && KEYS::BITS ? float(behind[0]) : keys.scale(token[i]);
        value_scale[i] = SAME_SIDES                                   ? key_scale
                         : SHARED_TILES && KEYS::BITS && VALUES::BITS ? float(behind[1])
                                                                      : values.scale(token[i]);
        float rope_scale = ROPE_TILE ? float(behind[1]) : ROPE_DIM ? rope.scale(token[i]) : 1.0f;
        TQ_UNROLL for (int h = 0; h < ROWS; h++) {
          if (KEYS::BITS) s[i * ROWS + h] *= key_scale;
          if (ROPE_DIM) s[i * ROWS + h] = fma(s_rope[i * ROWS + h], rope_scale, s[i * ROWS + h]);
          if (PARTS != 1) s[i * ROWS + h] += simd_shuffle_xor(s[i * ROWS + h], ushort(32 / PARTS));
          if (KEY_MEANS) s[i * ROWS + h] += segment_bias.get(h);
        }
      }
      if (KEY_MEANS && t0 < segment_start) {  // the tile is in two segments
        TQ_UNROLL for (int h = 0; h < ROWS; h++) {
          float more = bias_delta.get(h);
          TQ_UNROLL for (int i = 0; i < TOKENS_PER_LANE; i++)
            s[i * ROWS + h] += token[i] < segment_start ? more : 0.0f;
        }
      }
      if (!whole) {
        TQ_UNROLL for (int i = 0; i < TOKENS_PER_LANE; i++) {
          int column = token[i] + (token[i] < split ? 0 : shift);
          bool live = t0 + 32 * i + key_lane < end;
          float not_finite = VALUES::BITS ? value_scale[i] * 0.0f : 0.0f;  // or 0
          value_scale[i] = not_finite == 0 ? value_scale[i] : 0.0f;        // where it is masked, 0 * NaN is NaN:
          TQ_UNROLL for (int h = 0; h < ROWS; h++) {                       // the rows that see it get it by logit
            float logit = mask.add(s[i * ROWS + h], h, column);
            logit = live ? logit : TQ_DEAD;
            s[i * ROWS + h] = logit <= TQ_LOWEST ? logit : logit + not_finite;
          }
        }
      }
      if (PARTS != 1) {  // a token counts once
        TQ_UNROLL for (int h = 0; h < ROWS; h++)
          s[h] = part ? TQ_DEAD : s[h];
      }

      // ---- softmax
      float p[TOKENS_PER_LANE * PADDED_ROWS];
      TQ_UNROLL for (int h = 0; h < ROWS; h++) {
        float top = s[h];
        TQ_UNROLL for (int i = 1; i < TOKENS_PER_LANE; i++)
          top = fmax(top, s[i * ROWS + h]);
        top = simd_max(top);
        float m = out.m.get(h);
        if (top > m) {  // the same for the whole simdgroup
          float f = fast::exp2(m - (top + TQ_SLACK));
          m = top + TQ_SLACK;
          out.m.set(h, m, lane);
          out.sum[h] *= f;
          TQ_UNROLL for (int d = 0; d < DIMS_PER_LANE; d++)
            out.acc[h][d] *= f;
        }
        TQ_UNROLL for (int i = 0; i < TOKENS_PER_LANE; i++) {
          float weight = fast::exp2(s[i * ROWS + h] - m);
          out.sum[h] += weight;
          p[i * PADDED_ROWS + h] = VALUES::BITS ? weight * value_scale[i] : weight;
        }
      }
      TQ_UNROLL for (int i = 0; i < TOKENS_PER_LANE; i++) {
        TQ_UNROLL for (int h = ROWS; h < PADDED_ROWS; h++)
          p[i * PADDED_ROWS + h] = 0;
        tq_store_weights<PADDED_ROWS>(p + i * PADDED_ROWS, lane_weights + 32 * i * PADDED_ROWS);
      }
    }

    // ---- values
    if (ONE_TILE) {
      simdgroup_barrier(mem_flags::mem_threadgroup);
      if (has_rows && (LANES_PER_TOKEN * TOKENS_IN_FLIGHT == 32 || slot < TOKENS_IN_FLIGHT)) {
        Weights w = weights + slot * PADDED_ROWS;
        const threadgroup half *decoded = tile + slot * (VALUE_DIM + 8);
        int left = n - slot;
        typename TileRows<VALUE_DIM>::template RawValues<DIMS_PER_LANE> raw_tile[U];
        tq_sum_values<U, TOKENS_IN_FLIGHT, PADDED_ROWS, TileRows<VALUE_DIM>>(decoded, w, left, u, raw_tile, out);
        tq_sum_values<1, TOKENS_IN_FLIGHT, PADDED_ROWS, TileRows<VALUE_DIM>>(decoded, w, left, u, raw_tile, out);
      }
    } else if (SHARED_TILES && VALUES::BITS) {
      constexpr int N = TILE / CHUNKS;  // tokens
      TQ_ROLLED for (int t = 0; t < (CHUNKS == 1 ? 1 : n); t += N) {
        threadgroup_barrier(mem_flags::mem_threadgroup);  // what the tile holds is not needed now
        tq_decode<VALUE_DIM, N, SIMDGROUPS>(values, t0 + t, end, 0, tile, simdgroup * 32 + lane);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (has_rows && (LANES_PER_TOKEN * TOKENS_IN_FLIGHT == 32 || slot < TOKENS_IN_FLIGHT)) {
          Weights w = weights + (t + slot) * PADDED_ROWS;
          const threadgroup half *decoded = tile + slot * (VALUE_DIM + 8);
          int left = (CHUNKS == 1 ? n : min(N, n - t)) - slot;
          typename TileRows<VALUE_DIM>::template RawValues<DIMS_PER_LANE> raw_tile[U];
          tq_sum_values<U, TOKENS_IN_FLIGHT, PADDED_ROWS, TileRows<VALUE_DIM>>(decoded, w, left, u, raw_tile, out);
          tq_sum_values<1, TOKENS_IN_FLIGHT, PADDED_ROWS, TileRows<VALUE_DIM>>(decoded, w, left, u, raw_tile, out);
        }
      }
    } else {
      simdgroup_barrier(mem_flags::mem_threadgroup);
    }
    if (!(SHARED_TILES && VALUES::BITS) && has_rows &&
        (LANES_PER_TOKEN * TOKENS_IN_FLIGHT == 32 || slot < TOKENS_IN_FLIGHT)) {
      Weights w = weights + slot * PADDED_ROWS;
      int left = n - slot;
      if (VALUES::BITS) {
        tq_sum_values<U, TOKENS_IN_FLIGHT, PADDED_ROWS, VALUES>(v, w, left, u, raw, out);
        tq_read_values<1, TOKENS_IN_FLIGHT, VALUES, DIMS_PER_LANE>(v, left, u, raw);
        tq_sum_values<1, TOKENS_IN_FLIGHT, PADDED_ROWS, VALUES>(v, w, left, u, raw, out);
      } else {
        TQ_ROLLED for (int t = t0 + slot; left > 0; t += TOKENS_IN_FLIGHT, left -= TOKENS_IN_FLIGHT) {  // two buffers
          v = values.at(t);
          if (whole) {
            int one = 1;
            tq_sum_values<1, TOKENS_IN_FLIGHT, PADDED_ROWS, VALUES>(v, w, one, u, raw, out);
          } else {
            tq_sum_seen<PADDED_ROWS, VALUES>(v, w, u, out);
            w += TOKENS_IN_FLIGHT * PADDED_ROWS;
          }
        }
      }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);  // the next tile overwrites the weights
  }
}

// ---- the query -------------------------------------------------------------------------------------------------
// n rows of the query times `factor` to rows that are QUERY_STRIDE floats apart; rotated if ROTATE.
template <int BITS, int D, int SIMDGROUPS, int QUERY_STRIDE, bool ROTATE, class Q, class STRIDES, class TO>
METAL_FUNC void tq_load_query(Q queries, STRIDES strides, int first_head, int L, int first_row, int n, int last_row,
                              float factor, const device float *diag, TO to, int simdgroup, int lane) {
  typedef Row<4, D> R;
  constexpr int DIMS_PER_LANE = R::DIMS_PER_LANE, LANES = R::LANES, VECTORS = R::VECTORS,
                P = tq_power_of_two_from(D / 2 + 1);
  int t = uint(lane) % LANES;
  for (int h0 = simdgroup * VECTORS; h0 < n; h0 += SIMDGROUPS * VECTORS) {
    int h = h0 + uint(lane) / LANES, r = min(first_row + h, last_row), g = r / L, l = r - g * L;
    Q from = queries + (first_head + g) * strides[1] + l * strides[2];
    float y[DIMS_PER_LANE];
    TQ_UNROLL for (int i = 0; i < DIMS_PER_LANE; i++) {
      int d = t * DIMS_PER_LANE + i;
      y[i] = 0;
      if (R::has(t, i)) {
        y[i] = factor * float(from[d * strides[3]]);
        if (ROTATE) y[i] *= diag[d];
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
    float unit = 1.0f;
    if (ROTATE) unit = Levels<(BITS == 0 ? 4 : BITS)>::UNIT;
    TQ_UNROLL for (int i = 0; i < DIMS_PER_LANE; i++) {
      if (ROTATE) y[i] *= unit;
      if (h < n && R::has(t, i)) to[h * QUERY_STRIDE + t * DIMS_PER_LANE + i] = y[i];
    }
  }
}

// The first of two, or with SECOND the other.
template <bool SECOND>
struct Choose {
  template <class A, class B>
  static METAL_FUNC A of(A a, B b) {
    return a;
  }
};
template <>
struct Choose<true> {
  template <class A, class B>
  static METAL_FUNC B of(A a, B b) {
    return b;
  }
};

// ==== body
constexpr int QUERY_DIM = KEY_DIM + ROPE_DIM;
constexpr bool ROTATED = KEY_BITS != 0 || ROPE_BITS != 0;  // the query is another one for packed tokens
constexpr int PADDED_ROWS = ROWS <= 2 ? ROWS : (ROWS + 3) / 4 * 4, LANES_PER_TOKEN = VALUE_DIM / DIMS_PER_LANE,
              TOKENS_IN_FLIGHT = 32 / LANES_PER_TOKEN;
constexpr int ALL_ROWS = SHARED_TILES ? SIMDGROUPS * ROWS : ROWS,
              QUERIES = QUERIES_IN_DEVICE_MEMORY ? 0 : (SINGLE_LAUNCH && ROTATED ? 2 : 1) * ALL_ROWS * QUERY_DIM;
constexpr int WEIGHTS = 32 * TOKENS_PER_LANE * PADDED_ROWS,
              ACC_ROW = QUERIES_IN_DEVICE_MEMORY ? tq_max(QUERY_DIM, VALUE_DIM) : VALUE_DIM;
constexpr int TILE_WORDS =
    SHARED_TILES
        ? (tq_max(32 * TOKENS_PER_LANE * (KEY_DIM / CHUNKS + 8), 32 * TOKENS_PER_LANE / CHUNKS * (VALUE_DIM + 8)) +
           (ROPE_BITS ? 32 * TOKENS_PER_LANE / CHUNKS * (ROPE_DIM + 8) : 0)) /
              2
        : 0;
constexpr int IN_THE_LOOP = QUERIES + SIMDGROUPS * WEIGHTS + TILE_WORDS;
constexpr int ROWS_AT_ONCE = tq_max(  // rows that are merged at a time
    1, tq_min(ROWS, (SINGLE_LAUNCH ? 4096 : IN_THE_LOOP) / (SIMDGROUPS * VALUE_DIM)));
constexpr int MEMORY = tq_max(IN_THE_LOOP, SHARED_TILES ? 0 : SIMDGROUPS * ROWS_AT_ONCE * VALUE_DIM);
threadgroup float4 memory4[MEMORY / 4];
threadgroup float run_ml[SHARED_TILES ? 1 : 2 * SIMDGROUPS * ROWS];
threadgroup float *memory = (threadgroup float *)memory4;
int lane = thread_index_in_simdgroup, simdgroup = thread_position_in_threadgroup.y,
    block = uint(thread_position_in_grid.y) / SIMDGROUPS;
int n_sink = tq_number(diagonals_strides, 0), n_packed = tq_number(diagonals_strides, 1),
    n_recent = tq_number(diagonals_strides, 2), exact_blocks = tq_number(diagonals_strides, 3),
    blocks = tq_number(diagonals_strides, 4), row_groups = tq_number(diagonals_strides, 5);
int flags = tq_number(diagonals_strides, 6), L = tq_number(diagonals_strides, 7), Hq = tq_number(diagonals_strides, 8),
    Hkv = tq_number(diagonals_strides, 9), acc_rows = tq_number(diagonals_strides, 12),
    N = n_sink + n_packed + n_recent;
int G = Hq / Hkv, R = G * L, z = thread_position_in_grid.z, head = z / row_groups,
    group_row = (z - head * row_groups) * ALL_ROWS;
int b = head / Hkv, kvh = head - b * Hkv;
int first_row = group_row + (SHARED_TILES ? simdgroup * ROWS : 0), rows = min(ROWS, R - first_row);
int group_rows = min((R - group_row + ROWS - 1) / ROWS * ROWS, ALL_ROWS);  // of the simdgroups that have rows
bool exact = (SINGLE_LAUNCH ? simdgroup : block) < exact_blocks;
constexpr int KEY_ROUNDS = tq_power_of_two_from(KEY_DIM / 2 + 1) == KEY_DIM ? 1 : 2;
int balanced = tq_number(diagonals_strides, 15);
const device float *q_diag = diagonals + (balanced ? balanced + head * (KEY_ROUNDS * KEY_DIM) : 0);

// ---- the query: as it is for exact keys, rotated for packed ones
typedef Queries<QUERIES_IN_DEVICE_MEMORY, QUERY_DIM, ACC_ROW> Q;
device float *results = (device float *)acc + (((long)head * blocks + block) * acc_rows + group_row) * ACC_ROW;
typename Q::Pointer q = Q::choose(memory, results), q_rotated = q + (SINGLE_LAUNCH && ROTATED ? ROWS * QUERY_DIM : 0);
const device float *v_diag = diagonals + KEY_ROUNDS * KEY_DIM;
float factor = as_type<float>(tq_number(diagonals_strides, 10));
if (SINGLE_LAUNCH || exact || !ROTATED)
  tq_load_query<0, KEY_DIM, SIMDGROUPS, Q::FLOATS, false>(queries + b * queries_strides[0], queries_strides, kvh *G, L,
                                                          group_row, group_rows, R - 1, factor, q_diag, q, simdgroup,
                                                          lane);
if (ROTATED && (SINGLE_LAUNCH || !exact))
  tq_load_query<KEY_BITS, KEY_DIM, SIMDGROUPS, Q::FLOATS, KEY_BITS != 0>(queries + b * queries_strides[0],
                                                                         queries_strides, kvh *G, L, group_row,
                                                                         group_rows, R - 1, factor, q_diag, q_rotated,
                                                                         simdgroup, lane);
constexpr int R_DIM = ROPE_DIM ? ROPE_DIM : 32;
if (ROPE_DIM) {  // it carries its scale
  const device float *r_diag = v_diag + KEY_ROUNDS * KEY_DIM;
  auto from = queries + b * queries_strides[0] + KEY_DIM * queries_strides[3];
  if (SINGLE_LAUNCH || exact || !ROTATED)
    tq_load_query<0, R_DIM, SIMDGROUPS, Q::FLOATS, false>(from, queries_strides, kvh * G, L, group_row, group_rows,
                                                          R - 1, TQ_LOG2E, r_diag, q + KEY_DIM, simdgroup, lane);
  if (ROTATED && (SINGLE_LAUNCH || !exact))
    tq_load_query<ROPE_BITS, R_DIM, SIMDGROUPS, Q::FLOATS, ROPE_BITS != 0>(from, queries_strides, kvh * G, L, group_row,
                                                                           group_rows, R - 1, TQ_LOG2E, r_diag,
                                                                           q_rotated + KEY_DIM, simdgroup, lane);
}
if (QUERIES_IN_DEVICE_MEMORY) threadgroup_barrier(mem_flags::mem_device);
threadgroup_barrier(mem_flags::mem_threadgroup);

// ---- this simdgroup's run of tokens
Partial<ROWS, DIMS_PER_LANE> out;
TQ_UNROLL for (int h = 0; h < ROWS; h++) {
  out.m.set(h, TQ_LOWEST, lane);
  out.sum[h] = 0;
  TQ_UNROLL for (int d = 0; d < DIMS_PER_LANE; d++)
    out.acc[h][d] = 0;
}
int n = exact ? n_sink + n_recent : n_packed, split = exact ? n_sink : 0, shift = exact ? n_packed : n_sink;
int of = exact ? exact_blocks : (SINGLE_LAUNCH ? SIMDGROUPS : blocks) - exact_blocks,  // runs of this kind
    index = (SINGLE_LAUNCH ? simdgroup : block) - (exact ? 0 : exact_blocks);
if (!SINGLE_LAUNCH && !SHARED_TILES) {  // each simdgroup of a block has a run
  of *= SIMDGROUPS;
  index = index * SIMDGROUPS + simdgroup;
}
int tiles = (n + 32 * TOKENS_PER_LANE - 1) / (32 * TOKENS_PER_LANE), per = (tiles + of - 1) / of * 32 * TOKENS_PER_LANE;
int begin = index * per, end = min(begin + per, n);
// tokens that every row sees
int safe_end = flags & 2 ? 0 : flags & 1 ? min(tq_before(N - L + 1, split, shift), end) : end;
Mask<decltype(mask)> masks = {mask + (flags & 2 ? b * mask_strides[0] : 0),
                              mask_strides[1],
                              mask_strides[2],
                              mask_strides[3],
                              bool(flags & 1),
                              bool(flags & 2),
                              L,
                              N - L,
                              kvh * G,
                              first_row,
                              R - 1};
threadgroup float *weights = memory + QUERIES + simdgroup * WEIGHTS;
q += (first_row - group_row) * Q::FLOATS;
q_rotated += (first_row - group_row) * Q::FLOATS;
threadgroup half *tile = (threadgroup half *)(memory + QUERIES + SIMDGROUPS * WEIGHTS);
const device half *key_means = k_means + b * k_means_strides[0] + kvh * k_means_strides[1];
constexpr int OTHER_DIM = ROPE_DIM ? ROPE_DIM : VALUE_DIM, OTHER_BITS = ROPE_DIM ? ROPE_BITS : VALUE_BITS;
if (exact) {
  ExactRows<EXACT_KEY, KEY_DIM> keys = {k_sink + b * k_sink_strides[0] + kvh * k_sink_strides[1],
                                        k_recent + b * k_recent_strides[0] + kvh * k_recent_strides[1], n_sink};
  ExactRows<EXACT_VALUE, OTHER_DIM> others = {v_sink + b * v_sink_strides[0] + kvh * v_sink_strides[1],
                                              v_recent + b * v_recent_strides[0] + kvh * v_recent_strides[1], n_sink};
  tq_run<ROWS, PADDED_ROWS, TOKENS_PER_LANE, DIMS_PER_LANE, SIMDGROUPS, SHARED_TILES, CHUNKS, Q::FLOATS, KEY_DIM,
         VALUE_DIM, false, SAME_SIDES, ROPE_DIM>(keys, Choose<SAME_SIDES>::of(others, keys), others, begin, end,
                                                 safe_end, split, shift, q, weights, tile, key_means, 0, masks, out,
                                                 rows > 0, simdgroup, lane);
} else {
  auto keys = tq_rows<KEY_BITS, KEY_DIM>(k_codes + b * k_codes_strides[0] + kvh * k_codes_strides[1],
                                         k_scale + b * k_scale_strides[0] + kvh * k_scale_strides[1]);
  auto others = tq_rows<OTHER_BITS, OTHER_DIM>(v_codes + b * v_codes_strides[0] + kvh * v_codes_strides[1],
                                               v_scale + b * v_scale_strides[0] + kvh * v_scale_strides[1]);
  tq_run<ROWS, PADDED_ROWS, TOKENS_PER_LANE, DIMS_PER_LANE, SIMDGROUPS, SHARED_TILES, CHUNKS, Q::FLOATS, KEY_DIM,
         VALUE_DIM, KEY_MEANS, SAME_SIDES, ROPE_DIM>(
      keys, Choose<SAME_SIDES>::of(others, keys), others, begin, end, safe_end, split, shift, q_rotated, weights, tile,
      key_means, tq_number(diagonals_strides, 11), masks, out, rows > 0, simdgroup, lane);
}

// ---- results of the simdgroup: its sums over tokens in flight
int u = uint(lane) % LANES_PER_TOKEN, slot = uint(lane) / LANES_PER_TOKEN;
TQ_UNROLL for (int h = 0; h < ROWS; h++) {
  out.sum[h] = simd_sum(out.sum[h]);
  TQ_UNROLL for (int d = 0; d < DIMS_PER_LANE; d++) {
    float a = out.acc[h][d];
    if (LANES_PER_TOKEN * TOKENS_IN_FLIGHT == 32) {
      TQ_UNROLL for (int k = LANES_PER_TOKEN; k < 32; k *= 2)
        a += simd_shuffle_xor(a, ushort(k));
    } else {
      TQ_UNROLL for (int k = 1; k < TOKENS_IN_FLIGHT; k++)
        a += simd_shuffle(out.acc[h][d], ushort(min(lane + k * LANES_PER_TOKEN, 31)));
    }
    out.acc[h][d] = a;
  }
}
device float *ml = (device float *)acc + (long)tq_number(diagonals_strides, 13) * Hkv * blocks * acc_rows * ACC_ROW +
                   (((long)head * R + first_row) * blocks + block) * 2;
if (SHARED_TILES) {
  if (QUERIES_IN_DEVICE_MEMORY) simdgroup_barrier(mem_flags::mem_device);  // the queries are not needed now
  results += (first_row - group_row) * ACC_ROW + u * DIMS_PER_LANE;
  TQ_UNROLL for (int h = 0; h < ROWS; h++) {
    float m = out.m.get(h);
    if (h < rows) {
      if (slot == 0) {
        TQ_UNROLL for (int d = 0; d < DIMS_PER_LANE; d++)
          results[h * ACC_ROW + d] = out.acc[h][d];
      }
      if (lane == 0) {
        ml[h * blocks * 2] = m;
        ml[h * blocks * 2 + 1] = out.sum[h];
      }
    }
  }
} else {
  // ---- merge the simdgroups of the threadgroup, ROWS_AT_ONCE rows at a time
  if (lane == 0) {
    TQ_UNROLL for (int h = 0; h < ROWS; h++) {
      run_ml[(simdgroup * ROWS + h) * 2] = out.m.get(h);
      run_ml[(simdgroup * ROWS + h) * 2 + 1] = out.sum[h];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // the queries are not needed now
  typedef Row<4, VALUE_DIM> F;
  TQ_ROLLED for (int h0 = 0; h0 < ROWS; h0 += ROWS_AT_ONCE) {  // one copy of what follows
    TQ_UNROLL for (int h = 0; h < ROWS; h++) {
      if (slot == 0 && h >= h0 && h < h0 + ROWS_AT_ONCE) {
        TQ_UNROLL for (int d = 0; d < DIMS_PER_LANE; d++)
          memory[((h - h0) * SIMDGROUPS + simdgroup) * VALUE_DIM + u * DIMS_PER_LANE + d] = out.acc[h][d];
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    TQ_ROLLED for (int i = simdgroup; !SINGLE_LAUNCH && i < min(ROWS_AT_ONCE, rows - h0); i += SIMDGROUPS) {
      float top = TQ_LOWEST, sum = 0, f[SIMDGROUPS];
      TQ_UNROLL for (int j = 0; j < SIMDGROUPS; j++)
        top = max(top, run_ml[(j * ROWS + h0 + i) * 2]);
      TQ_UNROLL for (int j = 0; j < SIMDGROUPS; j++) {
        f[j] = fast::exp2(run_ml[(j * ROWS + h0 + i) * 2] - top);
        sum = fma(f[j], run_ml[(j * ROWS + h0 + i) * 2 + 1], sum);
      }
      TQ_ROLLED for (int d = lane; d < VALUE_DIM; d += 32) {
        float y = 0;
        TQ_UNROLL for (int j = 0; j < SIMDGROUPS; j++)
          y = fma(f[j], memory[(i * SIMDGROUPS + j) * VALUE_DIM + d], y);
        results[(h0 + i) * ACC_ROW + d] = y;
      }
      if (lane == 0) {
        ml[(h0 + i) * blocks * 2] = top;
        ml[(h0 + i) * blocks * 2 + 1] = sum;
      }
    }
    TQ_ROLLED for (int k = simdgroup * F::VECTORS; SINGLE_LAUNCH && k < ROWS_AT_ONCE; k += SIMDGROUPS * F::VECTORS) {
      int t = uint(lane) % F::LANES, i = k + uint(lane) / F::LANES, h = min(h0 + i, ROWS - 1), r = first_row + h;
      bool live = i < ROWS_AT_ONCE && h0 + i < ROWS && h < rows;
      int g = r / L, query_head = kvh * G + g;
      float top = TQ_LOWEST, sum = 0, packed_sum = 0, rotated_y[F::DIMS_PER_LANE], exact_y[F::DIMS_PER_LANE];
      TQ_ROLLED for (int j = 0; j < SIMDGROUPS; j++)
        top = max(top, run_ml[(j * ROWS + h) * 2]);
      if ((flags & 8) && live) {
        float sink = float(sinks[query_head]) * TQ_LOG2E;
        top = max(top, sink);
        sum = fast::exp2(sink - top);
      }
      TQ_UNROLL for (int d = 0; d < F::DIMS_PER_LANE; d++)
        rotated_y[d] = exact_y[d] = 0;
      TQ_ROLLED for (int j = 0; j < SIMDGROUPS; j++) {
        float f = fast::exp2(run_ml[(j * ROWS + h) * 2] - top), part = f * run_ml[(j * ROWS + h) * 2 + 1];
        bool rotated = VALUE_BITS != 0 && j >= exact_blocks;
        sum += part;
        if (j >= exact_blocks) packed_sum += part;
        TQ_UNROLL for (int d = 0; d < F::DIMS_PER_LANE; d++) {
          if (live && F::has(t, d)) {
            float a = f * memory[((h - h0) * SIMDGROUPS + j) * VALUE_DIM + t * F::DIMS_PER_LANE + d];
            if (rotated)
              rotated_y[d] += a;
            else
              exact_y[d] += a;
          }
        }
      }
      tq_finish<VALUE_BITS, VALUE_DIM, VALUE_MEANS>(
          rotated_y, exact_y, sum, packed_sum, v_diag, v_means + b * v_means_strides[0] + kvh * v_means_strides[1],
          acc + (((long)b * Hq + query_head) * L + (r - g * L)) * VALUE_DIM, live, lane, t);
    }
    if (h0 + ROWS_AT_ONCE < ROWS) threadgroup_barrier(mem_flags::mem_threadgroup);  // the next rows overwrite these
  }
}
