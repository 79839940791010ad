// attend.metal: decode attention straight from a packed KV cache; pass 1 of 2 (partials of "flash decoding"), or all.
// Compiled behind shared.metal, which describes the packed row. The text above the line "// ==== body" is the end of
// the header of mx.fast.metal_kernel, the rest its source.
//
// MATHEMATICS. The cache is [sink: exact][packed][recent: exact], in the order of the tokens. Packed rows are levels *
//   scale of a rotated vector, plus a rotated mean: of the packed keys' segment (a stretch of tokens: RoPE turns a bias
//   of the keys with the position), one mean for all packed values. q.k = (R q).(levels * scale) + (R q).mean, and
//   sum p v = R^T (sum p (levels * scale) + (sum p) mean). So the query is rotated once, nothing is un-rotated inside
//   the loop over tokens, a mean costs one addition per row and token, and sums over packed values and over exact
//   values are kept apart until the end, where the packed ones are un-rotated.
//   Logits, running maximum and sums are float32. Softmax is base 2: the query carries scale * log2 e. One maximum per
//   row and tile; when it exceeds m, m becomes the maximum + SLACK = 8 and sums are rescaled: in practice on the first
//   tile only. Weights are then at most 1 and the largest is 2^-8 or more in the tile that set m: harmless in float.
//
// MAPPING. A row is one query head of one query token of a kv head; a simdgroup works on H rows and a run of tokens, in
//   tiles of 32 * TPL, so that a packed word is read and decoded once for H rows.
//   Keys: a lane owns TPL whole tokens and forms their H dot products alone; the query is broadcast from threadgroup
//         memory. No shuffles, and exp2 and the scales cost once per row and token.
//   Weights, times the values' scale, go through a piece of threadgroup memory of the simdgroup.
//   Values: LV = DV / E lanes own E dims each, 32 / LV tokens in flight, H * E accumulators.
//   SHARED, for more rows than a simdgroup has: the NS simdgroups of a threadgroup have H rows each and the same
//         tokens, which all of them together decode to threadgroup memory, tile by tile, or in CHUNKS of one: of the
//         keys' dims, of the values' tokens. FAR, for so many rows that their queries do not fit there too: these wait
//         in `acc`, where the block's results will be written in the end.
//   Exact tokens (sink and recent as one list) and packed ones are different runs of the same code: block < X is exact.
//   What tells rows and tokens apart (causal, an array, the end) is looked at only in tiles that not all of them see.
//   Simdgroups of a SHARED threadgroup that have no row of their own only help to decode.
//
// INPUTS  (T: any float type, a type for each)
//   queries                 T [B, Hq, L, DK], any strides
//   k_sink, k_recent        T [B, Hkv, CAPACITY, DK], the tokens of a head one behind the other: whole buffers. v_: DV
//   k_codes                 uint32 [B, Hkv, CAPACITY, WORDS]; with KB = 0 T [B, Hkv, CAPACITY, DK]. As k_sink. v_: DV
//   k_scale, v_scale        float16 [B, Hkv, CAPACITY, 1], tokens contiguous. Not read with 0 bits
//   k_means                 float16 [B, Hkv, CAPACITY, DK], rotated: row i is of the SEGMENT packed tokens from i *
//                           SEGMENT on. As k_sink, read only if KM
//   v_means                 float16 [B, Hkv, CAPACITY, DV], rotated: row 0 is of all tokens. Read only if VM
//   mask                    bool or T [B, Hq, L, N], any strides, columns in order of the tokens. Read only if flag 2
//   sinks                   T [Hq], a logit per head that takes weight and gives no value. Read only if flag 8 and ONE
//   dims                    int32 [16]: n_sink, n_packed, n_recent, X = exact blocks, blocks, RG, flags, L, Hq, Hkv,
//                           scale * log2 e (bits of a float), SEGMENT, a multiple of 128, ACC_ROWS, B, 0, 0; then, as
//                           floats, the diagonals of the keys' rotation [ROUNDS, DK] and of the values' [ROUNDS, DV].
//                           flags: 1 causal (query l is token N - L + l), 2 mask, 8 sinks
// OUTPUTS
//   ONE:  acc = the output, T [B, Hq, L, DV]
//   else: acc float [B, Hkv, blocks, ACC_ROWS, ACC_ROW], of R rows the first DV numbers: sums of 2^(logit - m) * value,
//         of blocks >= X still rotated, without UNIT; FAR: before that, a block's rows hold its queries.
//         Behind it, float [B, Hkv, R, blocks, 2] = m (base 2), sum of 2^(logit - m). An empty block has m = LOWEST,
//         sum 0.
// TEMPLATE  T type of acc; EXACT_K, EXACT_V types of exact keys and values; KB, VB bits in {0, 2, 3, 4, 8}; DK, DV head
//   dims, multiples of 16, 32 to 576; KM, VM: packed keys / values have a mean; H rows per simdgroup, 1 to 8, or 12 if
//   SHARED; TPL tokens per lane (1, 2, 4); E dims per lane of the values: a multiple of 8 (if VB = 3, 8 or a multiple
//   of 16; of 4 if SHARED) that divides DV with DV / E <= 32; NS simdgroups per threadgroup; SHARED: they share decoded
//   tiles; CHUNKS of such a tile: 1, or 2 if 64 divides DK; FAR: queries in acc (only if SHARED); ONE: a threadgroup
//   holds all blocks, merges them and writes the output (not if SHARED).
// LAUNCH  grid (32, blocks, B * Hkv * RG), threadgroup (32, NS, 1); RG = ceil(R / H) row groups, R = Hq / Hkv * L;
//   blocks and X are multiples of NS (ONE: blocks = NS, any X <= NS). SHARED: grid (32, NS * blocks, B * Hkv * RG),
//   RG = ceil(R / (NS * H)), any X <= blocks. ACC_ROWS = R and ACC_ROW = DV, or if FAR RG * NS * H and max(DK, DV).
//   How many tokens a block gets is computed here: lengths are data, nothing is compiled again when they change.
//   merge.metal follows, unless ONE.
//
// REGISTERS (estimate, 32-bit, D = 128): H*E accumulators + TPL*H logits + 2*H + decode 12*TPL + 15:
//   H=1 77, H=2 91, H=4 87, H=8 135 (115 with TPL = 1); with KM 2*H more. Of more than 8 rows, lanes share what is the
//   same in all of them: H*E + TPL*H + H + 3 + decode: H=12 (E=4) 102.
//   Threadgroup memory: 4 bytes * (H * DK + NS * 32 * TPL * H'), H' = 1, 2, or H up to a multiple of 4; with ONE twice
//   the queries, or NS * DV and more of the merge; with SHARED the queries of all simdgroups (none if FAR) and a tile
//   of 64 * TPL * max(DK / CHUNKS + 8, (DV + 8) / CHUNKS) bytes. kernels.py keeps it below 31 KB.

constant constexpr const float TQ_LOG2E = 1.44269504f, TQ_SLACK = 8.0f;
constant constexpr const float TQ_DEAD = -1e30f, TQ_LOWEST = -1e29f;            // finite: safe under fast math
constexpr int tq_min(int a, int b) { return a < b ? a : b; }
constexpr int tq_max(int a, int b) { return a > b ? a : b; }

// ---- rows of keys or values. at(t): row t. Raw, read, eight: 32 (or the last 16) dims of a key. values: E dims ----
template <class T, int D> struct ExactRows {                                    // tokens of two buffers as one list
  typedef const device T *Pointer;
  static constant constexpr const int BITS = 0, STRIDE = D;
  static constant constexpr const float UNIT = 1.0f;
  const device T *first, *second;
  int split;
  METAL_FUNC Pointer at(int t) const { return t < split ? first + (long)t * D : second + (long)(t - split) * D; }
  METAL_FUNC float scale(int t) const { return 1.0f; }
  struct Raw { vec<T, 4> v[8]; };
  template <int N> static METAL_FUNC void read(Pointer row, int c, thread Raw &raw) {
    TQ_UNROLL for (int i = 0; i < N / 4; i++) raw.v[i] = ((const device vec<T, 4> *)row)[c * 8 + i];
  }
  static METAL_FUNC void eight(const thread Raw &raw, int x, thread float *y) {
    TQ_UNROLL for (int i = 0; i < 8; i++) y[i] = float(raw.v[2 * x + i / 4][i % 4]);
  }
  template <int E> static METAL_FUNC void values(Pointer row, int u, thread float *y) {
    TQ_UNROLL for (int i = 0; i < E / 4; i++) {
      vec<T, 4> v = ((const device vec<T, 4> *)row)[u * (E / 4) + i];
      TQ_UNROLL for (int k = 0; k < 4; k++) y[4 * i + k] = float(v[k]);
    }
  }
};

// N words at p, which is aligned to A words.
template <int A, int N> METAL_FUNC void tq_words(const device uint *p, thread uint *w) {
  constexpr int FOUR = A % 4 == 0 ? N / 4 * 4 : 0, TWO = A % 2 == 0 ? N / 2 * 2 : FOUR;
  TQ_UNROLL for (int i = 0; i < FOUR; i += 4) {
    uint4 v = *(const device uint4 *)(p + i);
    w[i] = v.x; w[i + 1] = v.y; w[i + 2] = v.z; w[i + 3] = v.w;
  }
  TQ_UNROLL for (int i = FOUR; i < TWO; i += 2) {
    uint2 v = *(const device uint2 *)(p + i);
    w[i] = v.x; w[i + 1] = v.y;
  }
  TQ_UNROLL for (int i = TWO; i < N; i++) w[i] = p[i];
}

// SCALE: pointer to half (constant if the array is tiny, else device).
template <int B, int D, class SCALE> struct PackedRows {
  typedef const device uint *Pointer;
  typedef Row<B, D> R;
  static constant constexpr const int BITS = B, STRIDE = R::WORDS;
  static constant constexpr const float UNIT = Levels<B>::UNIT;
  const device uint *codes;
  SCALE scales;
  METAL_FUNC Pointer at(int t) const { return codes + (long)t * R::WORDS; }
  METAL_FUNC float scale(int t) const { return float(scales[t]); }
  struct Raw { uint w[8]; };
  template <int N> static METAL_FUNC void read(Pointer row, int c, thread Raw &raw) {
    if (B != 3) {
      tq_words<R::WORDS, N * B / 32>(row + c * B, raw.w);
    } else {
      tq_words<R::WORDS, N / 16>(row + 2 * c, raw.w);
      raw.w[2] = row[R::UNITS + c];
    }
  }
  static METAL_FUNC void eight(const thread Raw &raw, int x, thread float *y) { // x is a constant once unrolled
    half2 z[8];
    if (B == 4) {
      Levels<4>::eight(raw.w[x], z);
    } else if (B == 8) {                                                        // 1024 + code: 1152 too high, see bias
      TQ_UNROLL for (int i = 0; i < 4; i++)
        z[i] = as_type<half2>(((raw.w[2 * x + i / 2] >> (i % 2 * 8)) & 0x00ff00ffu) | 0x64006400u);
    } else if (B == 2) {
      Levels<2>::sixteen(raw.w[x / 2], z);                                      // the half not used folds away
    } else {
      Levels<3>::sixteen(raw.w[x / 2], (raw.w[2] >> (x / 2 * 8)) & 0x00ff00ffu, z);
    }
    constexpr bool HALF = B == 2 || B == 3;
    TQ_UNROLL for (int i = 0; i < 8; i++) y[i] = float(z[(HALF ? x % 2 * 4 : 0) + i / 2][i % 2]);
  }
  template <int E> static METAL_FUNC void values(Pointer row, int u, thread float *y) {
    half2 z[E / 2];
    if (B == 4) {
      TQ_UNROLL for (int i = 0; i < E / 8; i++) Levels<4>::eight(row[u * (E / 8) + i], z + 4 * i);
    } else if (B == 8) {
      TQ_UNROLL for (int i = 0; i < E / 8; i++) {
        uint w[2];
        tq_words<R::WORDS, 2>(row + u * (E / 4) + 2 * i, w);
        Levels<8>::four(w[0], z + 4 * i);
        Levels<8>::four(w[1], z + 4 * i + 2);
      }
    } else if (B == 2 && E % 16 == 0) {
      TQ_UNROLL for (int i = 0; i < E / 16; i++) Levels<2>::sixteen(row[u * (E / 16) + i], z + 8 * i);
    } else if (B == 2) {                                                        // one byte of each half per 8 dims
      TQ_UNROLL for (int i = 0; i < E / 8; i++) {
        int e = u * (E / 8) + i;
        const device uchar *b = (const device uchar *)(row + e / 2) + (e & 1);
        uint x = as_type<uint>(ushort2(b[0], b[2])), a = x << 4;
        z[4 * i] = Levels<2>::at4(a); z[4 * i + 1] = Levels<2>::at6(a);
        z[4 * i + 2] = Levels<2>::at4(x); z[4 * i + 3] = Levels<2>::at6(x);
      }
    } else if (E == 8) {                                                        // half a unit: two lanes, both at this
      int t = u / 2;                                                            // token, read it together
      const device uchar *b = (const device uchar *)(row + R::UNITS + t / 2) + (t & 1);
      uint x = u & 1 ? as_type<uint>(ushort2(b[0], b[2])) : row[t], a = simd_shuffle_xor(x, ushort(1));
      if (u & 1) x = ((a >> 12) & 0x00070007u) | (x << 3) | ((a >> 4) & 0x08000800u);
      z[0] = Levels<3>::at3(x << 3); z[1] = Levels<3>::at3(x);
      z[2] = Levels<3>::at6(x); z[3] = Levels<3>::at3(x >> 6);
    } else {
      TQ_UNROLL for (int i = 0; i < E / 16; i++) {
        int t = u * (E / 16) + i;
        const device uchar *b = (const device uchar *)(row + R::UNITS + t / 2) + (t & 1);
        Levels<3>::sixteen(row[t], as_type<uint>(ushort2(b[0], b[2])), z + 8 * i);
      }
    }
    TQ_UNROLL for (int i = 0; i < E; i++) y[i] = float(z[i / 2][i % 2]);
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
template <int D> struct TileRows {
  typedef const threadgroup half *Pointer;
  static constant constexpr const int STRIDE = D + 8;
  struct Raw { half4 v[8]; };
  template <int N> static METAL_FUNC void read(Pointer row, int c, thread Raw &raw) {
    TQ_UNROLL for (int i = 0; i < N / 4; i++) raw.v[i] = ((const threadgroup half4 *)row)[c * 8 + i];
  }
  static METAL_FUNC void eight(const thread Raw &raw, int x, thread float *y) {
    TQ_UNROLL for (int i = 0; i < 8; i++) y[i] = float(raw.v[2 * x + i / 4][i % 4]);
  }
  template <int E> static METAL_FUNC void values(Pointer row, int u, thread float *y) {
    TQ_UNROLL for (int i = 0; i < E / 4; i++) {
      half4 v = ((const threadgroup half4 *)row)[u * (E / 4) + i];
      TQ_UNROLL for (int k = 0; k < 4; k++) y[4 * i + k] = float(v[k]);
    }
  }
};
template <class ROWS, int N> METAL_FUNC void tq_decode_dims(typename ROWS::Pointer row, int c, float less,
                                                            threadgroup half *to) {
  typename ROWS::Raw raw;
  ROWS::template read<N>(row, c, raw);
  TQ_UNROLL for (int x = 0; x < N / 8; x++) {
    float y[8];
    ROWS::eight(raw, x, y);
    TQ_UNROLL for (int i = 0; i < 2; i++)
      ((threadgroup half4 *)to)[2 * x + i] = half4(half(y[4 * i] - less), half(y[4 * i + 1] - less),
                                                           half(y[4 * i + 2] - less), half(y[4 * i + 3] - less));
  }
}
// D dims, from 32 * first on, of rows t0 .. end - 1, at most N, by all threads of the threadgroup; less: what 8-bit
// codes are too high.
template <int D, int N, int NS, class ROWS>
METAL_FUNC void tq_decode(ROWS rows, int t0, int end, int first, float less, threadgroup half *tile, int thread_index) {
  for (int i = thread_index; i < N * (D / 32); i += 32 * NS) {
    int token = uint(i) / (D / 32), c = uint(i) % (D / 32);                     // unsigned: no division
    if (t0 + token < end)
      tq_decode_dims<ROWS, 32>(rows.at(t0 + token), first + c, less, tile + token * (D + 8) + 32 * c);
  }
  if (D % 32 != 0) {
    for (int token = thread_index; token < min(N, end - t0); token += 32 * NS)
      tq_decode_dims<ROWS, 16>(rows.at(t0 + token), first + D / 32, less, tile + token * (D + 8) + D / 32 * 32);
  }
}

// ---- masks -----------------------------------------------------------------------------------------------------
METAL_FUNC float tq_mask(bool attend) { return attend ? 0.0f : TQ_DEAD; }
METAL_FUNC float tq_mask(float added) { return max(added * TQ_LOG2E, TQ_DEAD); }
METAL_FUNC float tq_mask(half added) { return tq_mask(float(added)); }
METAL_FUNC float tq_mask(bfloat16_t added) { return tq_mask(float(added)); }

// How many tokens of a run come before column `column`; token t of a run is column t, plus `shift` from `split` on.
METAL_FUNC int tq_before(int column, int split, int shift) { return max(min(column, split), column - shift); }

template <class M> struct Mask {
  M mask;                                                                       // of this batch row
  long head_stride, token_stride, column_stride;
  bool causal, array;
  int L, newest;                                                                // newest: the column of query 0
  int first_head, first_row, last_row;                                          // row r: head first_head + r / L
  METAL_FUNC float add(float logit, int h, int column) const {
    int r = min(first_row + h, last_row), g = r / L, l = r - g * L;
    if (causal && column > newest + l) logit = TQ_DEAD;
    if (!array) return logit;
    long at = (first_head + g) * head_stride + l * token_stride + column * column_stride;
    float added = tq_mask(mask[at]);
    return added > TQ_DEAD ? logit + added : TQ_DEAD;                           // a masked logit may be NaN
  }
};

// ---- the loop over tokens --------------------------------------------------------------------------------------
// A number per row that all lanes know: each lane has all of them, or lane h that of row h, which saves registers.
template <int H, bool SPREAD = (H > 8)> struct PerRow {
  float x[H];
  METAL_FUNC float get(int h) const { return x[h]; }
  METAL_FUNC void set(int h, float value, int lane) { x[h] = value; }
};
template <int H> struct PerRow<H, true> {
  float x;
  METAL_FUNC float get(int h) const { return simd_broadcast(x, ushort(h)); }
  METAL_FUNC void set(int h, float value, int lane) { x = lane == h ? value : x; }
};
template <int H, int E> struct Partial {
  float acc[H][E], sum[H];                                                      // of this lane's dims; of its tokens
  PerRow<H> m;
};

// Where the rows of the query lie, FLOATS apart: in threadgroup memory, or where the results will.
template <bool FAR, int NEAR_FLOATS, int FAR_FLOATS> struct Queries {
  typedef threadgroup float *Pointer;
  static constant constexpr const int FLOATS = NEAR_FLOATS;
  static METAL_FUNC Pointer choose(threadgroup float *near, device void *far) { return near; }
};
template <int NEAR_FLOATS, int FAR_FLOATS> struct Queries<true, NEAR_FLOATS, FAR_FLOATS> {
  typedef device float *Pointer;
  static constant constexpr const int FLOATS = FAR_FLOATS;
  static METAL_FUNC Pointer choose(threadgroup float *near, device void *far) { return (device float *)far; }
};
METAL_FUNC const threadgroup float4 *tq_fours(const threadgroup float *p) { return (const threadgroup float4 *)p; }
METAL_FUNC const device float4 *tq_fours(const device float *p) { return (const device float4 *)p; }

// s[i][h] += query row h . dims 32c .. 32c + N - 1 of the key at row[i]. Rows of the query are ROW floats apart.
template <int N, int H, int TPL, int ROW, class KEYS, class QUERIES>
METAL_FUNC void tq_dots(const thread typename KEYS::Pointer *row, int c, QUERIES q, thread float *s) {
  typename KEYS::Raw raw[TPL];
  TQ_UNROLL for (int i = 0; i < TPL; i++) KEYS::template read<N>(row[i], c, raw[i]);
  TQ_UNROLL for (int x = 0; x < N / 8; x++) {
    float y[TPL][8];
    TQ_UNROLL for (int i = 0; i < TPL; i++) KEYS::eight(raw[i], x, y[i]);
    TQ_UNROLL for (int h = 0; h < H; h++) {
      TQ_UNROLL for (int k = 0; k < 2; k++) {
        float4 a = q[h * (ROW / 4) + x * 2 + k];
        TQ_UNROLL for (int i = 0; i < TPL; i++) {
          s[i * H + h] = fma(a.x, y[i][4 * k], s[i * H + h]);
          s[i * H + h] = fma(a.y, y[i][4 * k + 1], s[i * H + h]);
          s[i * H + h] = fma(a.z, y[i][4 * k + 2], s[i * H + h]);
          s[i * H + h] = fma(a.w, y[i][4 * k + 3], s[i * H + h]);
        }
      }
    }
  }
}

// ... of N dims.
template <int H, int TPL, int ROW, int N, class KEYS, class QUERIES>
METAL_FUNC void tq_all_dots(const thread typename KEYS::Pointer *row, QUERIES q, thread float *s) {
  constexpr int AT_ONCE = H <= 2 && N % 64 == 0 ? 2 : 1;                       // more in a row: the code gets long
  auto q32 = tq_fours(q);
  _Pragma("clang loop unroll(disable)") for (int c = 0; c < N / 32; c += AT_ONCE, q32 += 8 * AT_ONCE) {
    TQ_UNROLL for (int i = 0; i < AT_ONCE; i++) tq_dots<32, H, TPL, ROW, KEYS>(row, c + i, q32 + 8 * i, s);
  }
  if (N % 32 != 0) tq_dots<16, H, TPL, ROW, KEYS>(row, N / 32, q32, s);
}

template <int HP> METAL_FUNC void tq_weights(const threadgroup float *from, thread float *p) {
  if (HP == 1) {
    p[0] = from[0];
  } else if (HP == 2) {
    float2 a = *(const threadgroup float2 *)from;
    p[0] = a.x; p[1] = a.y;
  } else {
    TQ_UNROLL for (int i = 0; i < HP / 4; i++) {
      float4 a = ((const threadgroup float4 *)from)[i];
      p[4 * i] = a.x; p[4 * i + 1] = a.y; p[4 * i + 2] = a.z; p[4 * i + 3] = a.w;
    }
  }
}

typedef const threadgroup float *Weights;
// out += weight * value, U * TV tokens at a time while at least that many are left. `left` counts the tokens from this
// lane's next one to the end: a pointer that far back could lie before its array.
template <int U, int TV, int HP, class VALUES, int H, int E>
METAL_FUNC void tq_sum_values(thread typename VALUES::Pointer &v, thread Weights &w, thread int &left, int u,
                              thread Partial<H, E> &out) {
  _Pragma("clang loop unroll(disable)") for (; left > (U - 1) * TV; left -= U * TV) {
    TQ_UNROLL for (int k = 0; k < U; k++) {
      float y[E], p[HP];
      VALUES::template values<E>(v + k * TV * VALUES::STRIDE, u, y);
      tq_weights<HP>(w + k * TV * HP, p);
      TQ_UNROLL for (int h = 0; h < H; h++) {
        TQ_UNROLL for (int d = 0; d < E; d++) out.acc[h][d] = fma(p[h], y[d], out.acc[h][d]);
      }
    }
    w += U * TV * HP;
    v += U * TV * VALUES::STRIDE;
  }
}

// The same for one token of a tile that not all rows see whole: of a row that it is masked for, its value adds nothing,
// not even 0 * NaN.
template <int HP, class VALUES, int H, int E>
METAL_FUNC void tq_sum_seen(typename VALUES::Pointer v, Weights w, int u, thread Partial<H, E> &out) {
  float y[E], p[HP];
  VALUES::template values<E>(v, u, y);
  tq_weights<HP>(w, p);
  TQ_UNROLL for (int h = 0; h < H; h++) {
    TQ_UNROLL for (int d = 0; d < E; d++) out.acc[h][d] = fma(p[h], p[h] == 0 ? 0.0f : y[d], out.acc[h][d]);
  }
}

// to[h] = query row h . mean; q carries UNIT, a mean does not.
template <int H, int ROW, int DK, class KEYS, class QUERIES>
METAL_FUNC void tq_mean_bias(QUERIES q, const device half *mean, thread PerRow<H> &to, int lane) {
  float sum[H];
  TQ_UNROLL for (int h = 0; h < H; h++) sum[h] = 0;
  for (int d = lane; d < DK; d += 32) {
    float x = float(mean[d]) * (1.0f / KEYS::UNIT);
    TQ_UNROLL for (int h = 0; h < H; h++) sum[h] = fma(q[h * ROW + d], x, sum[h]);
  }
  TQ_UNROLL for (int h = 0; h < H; h++) to.set(h, simd_sum(sum[h]), lane);
}

// Tokens begin .. end - 1 of a run. Every row sees all of a tile that ends at safe_end or before.
// has_rows: whether this simdgroup has any; without, it only helps to decode (SHARED). q: H rows of ROW floats.
// weights: 32 * TPL * HP floats of this simdgroup. bias: of the raw logit. means: of segments.
template <int H, int HP, int TPL, int E, int NS, bool SHARED, int CHUNKS, int ROW, int DK, int DV, bool KM, class KEYS,
          class VALUES, class M, class QUERIES>
METAL_FUNC void tq_run(KEYS keys, VALUES values, int begin, int end, int safe_end, int split, int shift,
                       QUERIES q, threadgroup float *weights, threadgroup half *tile,
                       const threadgroup float *bias, const device half *means, int segment, Mask<M> mask,
                       thread Partial<H, E> &out, bool has_rows, int sg, int lane) {
  constexpr int LV = DV / E, TV = 32 / LV, TILE = 32 * TPL, U = H <= 2 ? 8 : 4;
  int u = uint(lane) % LV, tg = uint(lane) / LV;
  threadgroup float *mine = weights + lane * HP;
  int turn = 0;                                                                 // the first token of the newest segment
  PerRow<H> since, before;                                                      // what its mean adds, the last more
  has_rows = has_rows || !SHARED;
  if (KM && has_rows && begin < end) {
    turn = begin / segment * segment;
    tq_mean_bias<H, ROW, DK, KEYS>(q, means + (long)(begin / segment) * DK, since, lane);
  }
  for (int t0 = begin; t0 < end; t0 += TILE) {
    // ---- keys: H dot products for TPL tokens
    float s[TPL * H];
    typename KEYS::Pointer row[TPL];
    int token[TPL];
    TQ_UNROLL for (int i = 0; i < TPL; i++) {
      token[i] = min(t0 + 32 * i + lane, end - 1);
      row[i] = keys.at(token[i]);
      TQ_UNROLL for (int h = 0; h < H; h++) s[i * H + h] = 0;
    }
    if (SHARED && KEYS::BITS) {
      constexpr int N = DK / CHUNKS;                                            // dims
      const threadgroup half *decoded[TPL];
      TQ_UNROLL for (int i = 0; i < TPL; i++) decoded[i] = tile + min(32 * i + lane, end - 1 - t0) * (N + 8);
      _Pragma("clang loop unroll(disable)") for (int c = 0; c < DK; c += N) {
        threadgroup_barrier(mem_flags::mem_threadgroup);                        // what the tile holds is not needed now
        tq_decode<N, TILE, NS>(keys, t0, end, c / 32, 0.0f, tile, sg * 32 + lane);
        if (c == 0 && sg == 0) {                                                // the scales: behind a row's dims
          TQ_UNROLL for (int i = 0; i < TPL; i++) {
            threadgroup half *behind = tile + (32 * i + lane) * (N + 8) + N;
            behind[0] = half(keys.scale(token[i]));
            if (VALUES::BITS) behind[1] = half(values.scale(token[i]));
          }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (has_rows) tq_all_dots<H, TPL, ROW, N, TileRows<N>>(decoded, q + c, s);
      }
    } else {
      if (has_rows) tq_all_dots<H, TPL, ROW, DK, KEYS>(row, q, s);
    }
    bool whole = t0 + TILE <= safe_end;                                         // every row sees all of the tile
    if (has_rows) {
      // ---- logits
      if (KM && min(t0 + TILE, end) > turn + segment) {                           // a segment is no shorter than a tile
        turn += segment;
        before = since;
        tq_mean_bias<H, ROW, DK, KEYS>(q, means + (long)(turn / segment) * DK, since, lane);
        TQ_UNROLL for (int h = 0; h < H; h++) before.set(h, before.get(h) - since.get(h), lane);
      }
      float value_scale[TPL];
      TQ_UNROLL for (int i = 0; i < TPL; i++) {
        const threadgroup half *behind = tile + (32 * i + lane) * (DK / CHUNKS + 8) + DK / CHUNKS;
        float key_scale = SHARED && KEYS::BITS ? float(behind[0]) : keys.scale(token[i]);
        value_scale[i] = SHARED && KEYS::BITS && VALUES::BITS ? float(behind[1]) : values.scale(token[i]);
        TQ_UNROLL for (int h = 0; h < H; h++) {
          if (KEYS::BITS == 8) s[i * H + h] -= bias[h];
          if (KEYS::BITS) s[i * H + h] *= key_scale;
          if (KM) s[i * H + h] += since.get(h);
        }
      }
      if (KM && t0 < turn) {                                                      // the tile is in two segments
        TQ_UNROLL for (int h = 0; h < H; h++) {
          float more = before.get(h);
          TQ_UNROLL for (int i = 0; i < TPL; i++) s[i * H + h] += token[i] < turn ? more : 0.0f;
        }
      }
      if (!whole) {
        TQ_UNROLL for (int i = 0; i < TPL; i++) {
          int column = token[i] + (token[i] < split ? 0 : shift);
          bool live = t0 + 32 * i + lane < end;
          float not_finite = VALUES::BITS ? value_scale[i] * 0.0f : 0.0f;       // or 0
          value_scale[i] = not_finite == 0 ? value_scale[i] : 0.0f;             // where it is masked, 0 * NaN is NaN:
          TQ_UNROLL for (int h = 0; h < H; h++) {                               // the rows that see it get it by logit
            float logit = mask.add(s[i * H + h], h, column);
            logit = live ? logit : TQ_DEAD;
            s[i * H + h] = logit <= TQ_LOWEST ? logit : logit + not_finite;
          }
        }
      }

      // ---- softmax
      TQ_UNROLL for (int h = 0; h < H; h++) {
        float top = s[h];
        TQ_UNROLL for (int i = 1; i < TPL; i++) top = fmax(top, s[i * H + h]);
        top = simd_max(top);
        float m = out.m.get(h);
        if (top > m) {                                                            // the same for the whole simdgroup
          float f = fast::exp2(m - (top + TQ_SLACK));
          m = top + TQ_SLACK;
          out.m.set(h, m, lane);
          out.sum[h] *= f;
          TQ_UNROLL for (int d = 0; d < E; d++) out.acc[h][d] *= f;
        }
        TQ_UNROLL for (int i = 0; i < TPL; i++) {
          float p = fast::exp2(s[i * H + h] - m);
          out.sum[h] += p;
          mine[32 * i * HP + h] = VALUES::BITS ? p * value_scale[i] : p;
        }
      }
      TQ_UNROLL for (int i = 0; i < TPL; i++) {
        TQ_UNROLL for (int h = H; h < HP; h++) mine[32 * i * HP + h] = 0;
      }
    }

    // ---- values
    int n = min(TILE, end - t0);
    if (SHARED && VALUES::BITS) {
      constexpr int N = TILE / CHUNKS;                                          // tokens
      _Pragma("clang loop unroll(disable)") for (int t = 0; t < (CHUNKS == 1 ? 1 : n); t += N) {
        threadgroup_barrier(mem_flags::mem_threadgroup);                        // what the tile holds is not needed now
        tq_decode<DV, N, NS>(values, t0 + t, end, 0, VALUES::BITS == 8 ? 1152.0f : 0.0f, tile, sg * 32 + lane);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (has_rows && (LV * TV == 32 || tg < TV)) {
          Weights w = weights + (t + tg) * HP;
          const threadgroup half *v = tile + tg * (DV + 8);
          int left = (CHUNKS == 1 ? n : min(N, n - t)) - tg;
          tq_sum_values<U, TV, HP, TileRows<DV>>(v, w, left, u, out);
          tq_sum_values<1, TV, HP, TileRows<DV>>(v, w, left, u, out);
        }
      }
    } else {
      simdgroup_barrier(mem_flags::mem_threadgroup);
    }
    if (!(SHARED && VALUES::BITS) && has_rows && (LV * TV == 32 || tg < TV)) {
      Weights w = weights + tg * HP;
      int left = n - tg;
      if (VALUES::BITS) {
        typename VALUES::Pointer v = values.at(t0 + tg);
        tq_sum_values<U, TV, HP, VALUES>(v, w, left, u, out);
        tq_sum_values<1, TV, HP, VALUES>(v, w, left, u, out);
      } else {
        _Pragma("clang loop unroll(disable)") for (int t = t0 + tg; left > 0; t += TV, left -= TV) {   // two buffers
          typename VALUES::Pointer v = values.at(t);
          if (whole) {
            int one = 1;
            tq_sum_values<1, TV, HP, VALUES>(v, w, one, u, out);
          } else {
            tq_sum_seen<HP, VALUES>(v, w, u, out);
            w += TV * HP;
          }
        }
      }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);                              // the next tile overwrites the weights
  }
}

// ---- the query -------------------------------------------------------------------------------------------------
// n rows of the query to rows of ROW floats, times `factor`; rotated if ROTATE. With 8-bit keys bias[h] = 1152 times
// the sum of the row.
template <int BITS, int D, int NS, int ROW, bool ROTATE, class Q, class STRIDES, class TO>
METAL_FUNC void tq_load_query(Q queries, STRIDES strides, int first_head, int L, int first_row, int n, int last_row,
                              float factor, const device float *diag, TO to, threadgroup float *bias, int sg,
                              int lane) {
  typedef Row<4, D> R;
  constexpr int E = R::E, LANES = R::LANES, VECTORS = R::VECTORS, P = tq_power_of_two_from(D / 2 + 1);
  int t = uint(lane) % LANES;
  for (int h0 = sg * VECTORS; h0 < n; h0 += NS * VECTORS) {
    int h = h0 + uint(lane) / LANES, r = min(first_row + h, last_row), g = r / L, l = r - g * L;
    Q from = queries + (first_head + g) * strides[1] + l * strides[2];
    float y[E];
    TQ_UNROLL for (int i = 0; i < E; i++) {
      int d = t * E + i;
      y[i] = 0;
      if (R::has(t, i)) {
        y[i] = factor * float(from[d * strides[3]]);
        if (ROTATE) y[i] *= diag[d];
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
    float unit = 1.0f, sum = 0;
    if (ROTATE) unit = Levels<BITS == 0 ? 4 : BITS>::UNIT;
    TQ_UNROLL for (int i = 0; i < E; i++) {
      if (ROTATE) y[i] *= unit;
      if (ROTATE && BITS == 8) sum += y[i];
      if (h < n && R::has(t, i)) to[h * ROW + t * E + i] = y[i];
    }
    if (ROTATE && BITS == 8) {
      TQ_UNROLL for (int k = 1; k < LANES; k *= 2) sum += simd_shuffle_xor(sum, ushort(k));
      if (h < n && t == 0) bias[h] = 1152.0f * sum;
    }
  }
}

// ==== body
constexpr int HP = H <= 2 ? H : (H + 3) / 4 * 4, LV = DV / E, TV = 32 / LV;
constexpr int TOGETHER = tq_max(1, tq_min(H, 4096 / (NS * DV)));                // rows that are merged at a time (ONE)
constexpr int ALL_ROWS = SHARED ? NS * H : H, QUERIES = FAR ? 0 : (ONE && KB ? 2 : 1) * ALL_ROWS * DK;
constexpr int WEIGHTS = 32 * TPL * HP, ACC_ROW = FAR ? tq_max(DK, DV) : DV;
constexpr int TILE_WORDS = SHARED ? tq_max(32 * TPL * (DK / CHUNKS + 8), 32 * TPL / CHUNKS * (DV + 8)) / 2 : 0;
constexpr int MEMORY = tq_max(QUERIES + NS * WEIGHTS + TILE_WORDS, ONE ? NS * TOGETHER * DV : 0);
threadgroup float4 memory4[MEMORY / 4];
threadgroup float bias[ALL_ROWS], block_ml[ONE ? 2 * NS * H : 1];
threadgroup float *memory = (threadgroup float *)memory4;
int lane = thread_index_in_simdgroup, sg = thread_position_in_threadgroup.y, block = thread_position_in_grid.y;
if (SHARED) block /= NS;
int n_sink = dims[0], n_packed = dims[1], n_recent = dims[2], exact_blocks = dims[3], blocks = dims[4], RG = dims[5];
int flags = dims[6], L = dims[7], Hq = dims[8], Hkv = dims[9], acc_rows = dims[12], N = n_sink + n_packed + n_recent;
int G = Hq / Hkv, R = G * L, z = thread_position_in_grid.z, head = z / RG, group_row = (z - head * RG) * ALL_ROWS;
int b = head / Hkv, kvh = head - b * Hkv;
int first_row = group_row + (SHARED ? sg * H : 0), rows = min(H, R - first_row);
int group_rows = min((R - group_row + H - 1) / H * H, ALL_ROWS);                // of the simdgroups that have rows
bool exact = block < exact_blocks;
const device float *diag = (const device float *)(dims + 16);

// ---- the query: as it is for exact keys, rotated for packed ones
typedef Queries<FAR, DK, ACC_ROW> Q;
device float *results = (device float *)acc + (((long)head * blocks + block) * acc_rows + group_row) * ACC_ROW;
typename Q::Pointer q = Q::choose(memory, results), q_rotated = q + (ONE && KB ? H * DK : 0);
const device float *v_diag = diag + (tq_power_of_two_from(DK / 2 + 1) == DK ? 1 : 2) * DK;
float factor = as_type<float>(dims[10]);
if (ONE || exact || KB == 0)
  tq_load_query<0, DK, NS, Q::FLOATS, false>(queries + b * queries_strides[0], queries_strides, kvh * G, L,
                                             group_row, group_rows, R - 1, factor, diag, q, bias, sg, lane);
if (KB && (ONE || !exact))
  tq_load_query<KB, DK, NS, Q::FLOATS, KB != 0>(queries + b * queries_strides[0], queries_strides, kvh * G, L,
                                                group_row, group_rows, R - 1, factor, diag, q_rotated, bias, sg, lane);
if (FAR) threadgroup_barrier(mem_flags::mem_device);
threadgroup_barrier(mem_flags::mem_threadgroup);

// ---- this simdgroup's run of tokens
Partial<H, E> out;
TQ_UNROLL for (int h = 0; h < H; h++) {
  out.m.set(h, TQ_LOWEST, lane);
  out.sum[h] = 0;
  TQ_UNROLL for (int d = 0; d < E; d++) out.acc[h][d] = 0;
}
int n = exact ? n_sink + n_recent : n_packed, split = exact ? n_sink : 0, shift = exact ? n_packed : n_sink;
int of = exact ? exact_blocks : blocks - exact_blocks, index = exact ? block : block - exact_blocks;
int tiles = (n + 32 * TPL - 1) / (32 * TPL), per = (tiles + of - 1) / of * 32 * TPL;
int begin = index * per, end = min(begin + per, n);
// tokens that every row sees
int safe_end = flags & 2 ? 0 : flags & 1 ? min(tq_before(N - L + 1, split, shift), end) : end;
Mask<decltype(mask)> masks = {mask + (flags & 2 ? b * mask_strides[0] : 0), mask_strides[1], mask_strides[2],
                              mask_strides[3], bool(flags & 1), bool(flags & 2), L, N - L, kvh * G,
                              first_row, R - 1};
threadgroup float *weights = memory + QUERIES + sg * WEIGHTS;
q += (first_row - group_row) * Q::FLOATS;
q_rotated += (first_row - group_row) * Q::FLOATS;
threadgroup half *tile = (threadgroup half *)(memory + QUERIES + NS * WEIGHTS);
const threadgroup float *row_bias = bias + (first_row - group_row);
const device half *key_means = k_means + b * k_means_strides[0] + kvh * k_means_strides[1];
if (exact) {
  ExactRows<EXACT_K, DK> keys = {k_sink + b * k_sink_strides[0] + kvh * k_sink_strides[1],
                                 k_recent + b * k_recent_strides[0] + kvh * k_recent_strides[1], n_sink};
  ExactRows<EXACT_V, DV> values = {v_sink + b * v_sink_strides[0] + kvh * v_sink_strides[1],
                                   v_recent + b * v_recent_strides[0] + kvh * v_recent_strides[1], n_sink};
  tq_run<H, HP, TPL, E, NS, SHARED, CHUNKS, Q::FLOATS, DK, DV, false>(keys, values, begin, end, safe_end, split,
                                                                      shift, q, weights, tile, row_bias, key_means, 0,
                                                                      masks, out, rows > 0, sg, lane);
} else {
  auto keys = tq_rows<KB, DK>(k_codes + b * k_codes_strides[0] + kvh * k_codes_strides[1],
                              k_scale + b * k_scale_strides[0] + kvh * k_scale_strides[1]);
  auto values = tq_rows<VB, DV>(v_codes + b * v_codes_strides[0] + kvh * v_codes_strides[1],
                                v_scale + b * v_scale_strides[0] + kvh * v_scale_strides[1]);
  tq_run<H, HP, TPL, E, NS, SHARED, CHUNKS, Q::FLOATS, DK, DV, KM>(keys, values, begin, end, safe_end, split,
                                                                   shift, q_rotated, weights, tile, row_bias,
                                                                   key_means, dims[11], masks, out, rows > 0, sg, lane);
}

// ---- results of the simdgroup: its sums over tokens in flight
int u = uint(lane) % LV, tg = uint(lane) / LV;
TQ_UNROLL for (int h = 0; h < H; h++) {
  out.sum[h] = simd_sum(out.sum[h]);
  TQ_UNROLL for (int d = 0; d < E; d++) {
    float a = out.acc[h][d];
    if (LV * TV == 32) {
      TQ_UNROLL for (int k = LV; k < 32; k *= 2) a += simd_shuffle_xor(a, ushort(k));
    } else {
      TQ_UNROLL for (int k = 1; k < TV; k++) a += simd_shuffle(out.acc[h][d], ushort(min(lane + k * LV, 31)));
    }
    out.acc[h][d] = a;
  }
}
if (!ONE) {
  if (FAR) simdgroup_barrier(mem_flags::mem_device);                            // the queries are not needed now
  results += (first_row - group_row) * ACC_ROW + u * E;
  device float *ml = (device float *)acc + (long)dims[13] * Hkv * blocks * acc_rows * ACC_ROW
                     + (((long)head * R + first_row) * blocks + block) * 2;
  TQ_UNROLL for (int h = 0; h < H; h++) {
    float m = out.m.get(h);
    if (h < rows) {
      if (tg == 0) {
        TQ_UNROLL for (int d = 0; d < E; d++) results[h * ACC_ROW + d] = out.acc[h][d];
      }
      if (lane == 0) {
        ml[h * blocks * 2] = m;
        ml[h * blocks * 2 + 1] = out.sum[h];
      }
    }
  }
} else {
  // ---- merge the simdgroups of the threadgroup, TOGETHER rows at a time
  if (lane == 0) {
    TQ_UNROLL for (int h = 0; h < H; h++) {
      block_ml[(sg * H + h) * 2] = out.m.get(h);
      block_ml[(sg * H + h) * 2 + 1] = out.sum[h];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);                              // the queries are not needed now
  typedef Row<4, DV> F;
  _Pragma("clang loop unroll(disable)") for (int h0 = 0; h0 < H; h0 += TOGETHER) {   // one copy of what follows
    TQ_UNROLL for (int h = 0; h < H; h++) {
      if (tg == 0 && h >= h0 && h < h0 + TOGETHER) {
        TQ_UNROLL for (int d = 0; d < E; d++) memory[((h - h0) * NS + sg) * DV + u * E + d] = out.acc[h][d];
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    _Pragma("clang loop unroll(disable)") for (int k = sg * F::VECTORS; k < TOGETHER; k += NS * F::VECTORS) {
      int t = uint(lane) % F::LANES, i = k + uint(lane) / F::LANES, h = min(h0 + i, H - 1), r = first_row + h;
      bool live = i < TOGETHER && h0 + i < H && h < rows;
      int g = r / L, query_head = kvh * G + g;
      float top = TQ_LOWEST, sum = 0, packed_sum = 0, rotated_y[F::E], exact_y[F::E];
      _Pragma("clang loop unroll(disable)") for (int j = 0; j < NS; j++) top = max(top, block_ml[(j * H + h) * 2]);
      if ((flags & 8) && live) {
        float sink = float(sinks[query_head]) * TQ_LOG2E;
        top = max(top, sink);
        sum = fast::exp2(sink - top);
      }
      TQ_UNROLL for (int d = 0; d < F::E; d++) rotated_y[d] = exact_y[d] = 0;
      _Pragma("clang loop unroll(disable)") for (int j = 0; j < NS; j++) {
        float f = fast::exp2(block_ml[(j * H + h) * 2] - top), part = f * block_ml[(j * H + h) * 2 + 1];
        bool rotated = VB != 0 && j >= exact_blocks;
        sum += part;
        if (j >= exact_blocks) packed_sum += part;
        TQ_UNROLL for (int d = 0; d < F::E; d++) {
          if (live && F::has(t, d)) {
            float a = f * memory[((h - h0) * NS + j) * DV + t * F::E + d];
            if (rotated) rotated_y[d] += a;
            else exact_y[d] += a;
          }
        }
      }
      tq_finish<VB, DV, VM>(rotated_y, exact_y, sum, packed_sum, v_diag,
                            v_means + b * v_means_strides[0] + kvh * v_means_strides[1],
                            acc + (((long)b * Hq + query_head) * L + (r - g * L)) * DV, live, lane, t);
    }
    if (h0 + TOGETHER < H) threadgroup_barrier(mem_flags::mem_threadgroup);     // the next rows overwrite these
  }
}
