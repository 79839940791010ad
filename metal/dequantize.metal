// dequantize.metal: packed rows back to vectors, with the exact tokens around them; keys and values in one launch.
// Compiled behind shared.metal, which describes the packed row. The text above the line "// ==== body" is the end of
// the header of mx.fast.metal_kernel, the rest is its source.
//
// MATHEMATICS, per packed row: y = scale * levels of the codes (+ the rotated mean of its segment);
//   x = inverse rotation of y (+ the mean). Rotation and levels are those of quantize.metal; the inverse runs the
//   rounds backwards, transform first, diagonal second. Exact tokens are copied.
//
// MAPPING. A lane owns DIMS_PER_LANE = 16 consecutive dims (32 if D > 512), whole words of every packing. LANES lanes
//   (a power of two) share a row, a simdgroup works on 32 / LANES rows. Butterflies over less than DIMS_PER_LANE dims
//   happen in registers, the rest by shuffles. No threadgroup memory, no barrier. A lane writes 4 dims at a time, so
//   that neighbouring lanes fill whole sectors of memory.
//
// INPUTS  (side 0 = keys, side 1 = values; with one side the arguments of side 1 are never read)
//   codes0/1      uint32 [B, H, CAPACITY, WORDS], rows contiguous, other strides free: the cache's whole buffer
//   scale0/1      float16 [B, H, CAPACITY, 1], any strides
//   mean0/1       MEAN = 1: float [B, H, 1, D], row-contiguous. MEAN = 2: float16 [B, H, CAPACITY, D], rotated, rows
//                 contiguous: row i belongs to the packed tokens i * segment .. (i + 1) * segment - 1. Else not read.
//   sink0/1, recent0/1   T [B, H, CAPACITY, D], rows contiguous. Read only if EXACT.
//   diag0/1       float [n, ROUNDS, D], row-contiguous: the diagonals of the inverse rotation, of all heads or of
//                 B * H / n of them (balanced keys). Read only if ROTATE0/1.
//   span          int32 [8]: first packed token, number of packed tokens, n_sink, n_recent, segment of the keys, of the
//                 values, heads that share diagonals, of side 0, of side 1
// OUTPUT
//   x0, x1        T [B, H, L, D], L = n_sink + packed tokens + n_recent, in that order
// TEMPLATE  T float type of the output; B0, B1 bits in {2, 3, 4, 5, 6, 8}; D0, D1 head_dim, multiple of 4, 32 to 576;
//   ROTATE0/1: un-rotate here (the windows must start and end where a lane's dims do: D a multiple of 16 up to 512, of
//   32 above), else x stays rotated; MEAN0/1 in {0, 1, 2} (needs ROTATE); EXACT: there may be exact tokens.
// LAUNCH  grid (32, S0 + S1, 1) with S = ceil(B * H * L / VECTORS) simdgroups per side, VECTORS = 32 / LANES;
//   threadgroup (32, n, 1), any n. Lengths are data: nothing is compiled again when L changes.
//
// REGISTERS (estimate, 32 bits each): DIMS_PER_LANE values, up to 4 words, 8 pairs of levels, a few indices: 38;
//   54 for D > 512.

// The levels of a packed row, times gamma: those of the DIMS_PER_LANE dims of lane t. there: whether there is a row.
// Every lane of the simdgroup takes part. CODES: a pointer.
template <int BITS, int D, class CODES>
METAL_FUNC void tq_read_row(CODES row, bool there, int t, float gamma, thread float *y) {
  typedef Row<BITS, D> R;
  constexpr int UNITS = R::DIMS_PER_LANE / 16, PER_UNIT = R::PER_UNIT, ROW_UNITS = R::UNITS;
  uint plane_b = 0;  // bytes of two units (not at 6 bits)
  if (R::PLANES && BITS != 6) {
    if (there && (UNITS == 2 || t % 2 == 0) && t * UNITS < ROW_UNITS) plane_b = row[R::PLANE_A + t * UNITS / 2];
    if (UNITS == 1) {
      uint neighbour = simd_shuffle_xor(plane_b, ushort(1));
      if (t % 2 == 1) plane_b = neighbour >> 8;
    }
  }
  TQ_UNROLL for (int u = 0; u < UNITS; u++) {
    uint w[PER_UNIT];
    TQ_UNROLL for (int k = 0; k < PER_UNIT; k++) {
      int word = (t * UNITS + u) * PER_UNIT + k;
      w[k] = there && word < R::PLANE_A ? row[word] : 0;
    }
    uint b = (plane_b >> (8 * u)) & 0x00ff00ffu;
    if (BITS == 6) b = there && t * UNITS + u < ROW_UNITS ? row[R::PLANE_A + t * UNITS + u] : 0;
    half2 level[8];
    tq_unit_levels<BITS>(w, b, level);
    TQ_UNROLL for (int i = 0; i < 16; i++) {
      y[16 * u + i] = R::has(t, 16 * u + i) ? gamma * float(level[i / 2][i % 2]) : 0.0f;
    }
  }
}

// Restores the 32 / LANES rows of a simdgroup. CODES, SCALE, MEANS, ROWS: pointers (constant if the array is
// tiny, else device).
template <int BITS, int D, bool ROTATE, int MEAN, bool EXACT, class CODES, class SCALE, class MEANS, class ROWS,
          class SHAPE, class STRIDES, class SPAN, class T>
METAL_FUNC void tq_dequantize(CODES codes, SHAPE codes_shape, STRIDES codes_strides, SCALE scale, STRIDES scale_strides,
                              MEANS mean, STRIDES mean_strides, ROWS sink, STRIDES sink_strides, ROWS recent,
                              STRIDES recent_strides, const device float *diag, SPAN span, int segment,
                              int heads_per_diag, device T *x, int simdgroup, int lane) {
  typedef Row<BITS, D> R;
  constexpr int DIMS_PER_LANE = R::DIMS_PER_LANE, LANES = R::LANES, P = tq_power_of_two_from(D / 2 + 1);
  int first = span[0], n_packed = span[1], n_sink = EXACT ? span[2] : 0, n_recent = EXACT ? span[3] : 0;
  int L = n_sink + n_packed + n_recent, n_heads = codes_shape[1], n_vectors = codes_shape[0] * n_heads * L;
  int t = uint(lane) % LANES, vector = simdgroup * (32 / LANES) + uint(lane) / LANES;  // unsigned: no division
  bool live = vector < n_vectors;
  vector = min(vector, n_vectors - 1);  // lanes past the end shuffle along
  int head = vector / L, l = vector - head * L, b = head / n_heads, h = head - b * n_heads;
  if (ROTATE) diag += head / heads_per_diag * ((P == D ? 1 : 2) * D);
  bool packed = live && l >= n_sink && l < n_sink + n_packed;
  int token = packed ? first + l - n_sink : 0;
  CODES row = codes + b * codes_strides[0] + h * codes_strides[1] + token * codes_strides[2];
  float gamma =
      packed ? float(scale[b * scale_strides[0] + h * scale_strides[1] + token * scale_strides[2]]) * Levels<BITS>::UNIT
             : 0.0f;

  // ---- levels of the codes, times the scale
  float y[DIMS_PER_LANE];
  tq_read_row<BITS, D>(row, packed, t, gamma, y);
  if (MEAN == 2 && packed) {
    MEANS from = mean + b * mean_strides[0] + h * mean_strides[1] + token / segment * mean_strides[2];
    TQ_UNROLL for (int i = 0; i < DIMS_PER_LANE; i++) {
      if (R::has(t, i)) y[i] += float(from[t * DIMS_PER_LANE + i]);
    }
  }

  // ---- un-rotate, add the mean, write
  if (ROTATE) {
    if (P != D) {
      tq_hadamard<D, DIMS_PER_LANE, LANES, D - P, P>(y, lane, t);
      TQ_UNROLL for (int i = 0; i < DIMS_PER_LANE; i++) {
        if (R::has(t, i)) y[i] *= diag[D + t * DIMS_PER_LANE + i];
      }
    }
    tq_hadamard<D, DIMS_PER_LANE, LANES, 0, P>(y, lane, t);
  }
  ROWS exact = sink;
  if (EXACT && live && l < n_sink)
    exact += b * sink_strides[0] + h * sink_strides[1] + l * sink_strides[2];
  else if (EXACT && live && !packed)
    exact = recent + b * recent_strides[0] + h * recent_strides[1] + (l - n_sink - n_packed) * recent_strides[2];
  TQ_UNROLL for (int i = 0; i < DIMS_PER_LANE; i += 4) {
    int d = t * DIMS_PER_LANE + i;
    if (live && R::has(t, i)) {
      TQ_UNROLL for (int k = 0; k < 4; k++) {
        if (ROTATE)
          y[i + k] = MEAN == 1 ? fma(diag[d + k], y[i + k], float(mean[head * D + d + k])) : diag[d + k] * y[i + k];
        if (EXACT && !packed) y[i + k] = float(exact[d + k]);
      }
      *(device vec<T, 4> *)(x + (long)vector * D + d) = vec<T, 4>(T(y[i]), T(y[i + 1]), T(y[i + 2]), T(y[i + 3]));
    }
  }
}
// ==== body
constexpr int V0 = Row<B0, D0>::VECTORS;
int lane = thread_index_in_simdgroup, simdgroup = thread_position_in_grid.y;
int L = span[1] + (EXACT ? span[2] + span[3] : 0);
int S0 = uint(codes0_shape[0] * codes0_shape[1] * L + V0 - 1) / V0;
if (simdgroup < S0)
  tq_dequantize<B0, D0, ROTATE0, MEAN0, EXACT>(codes0, codes0_shape, codes0_strides, scale0, scale0_strides, mean0,
                                               mean0_strides, sink0, sink0_strides, recent0, recent0_strides, diag0,
                                               span, span[4], span[6], x0, simdgroup, lane);
else
  tq_dequantize<B1, D1, ROTATE1, MEAN1, EXACT>(codes1, codes1_shape, codes1_strides, scale1, scale1_strides, mean1,
                                               mean1_strides, sink1, sink1_strides, recent1, recent1_strides, diag1,
                                               span, span[5], span[7], x1, simdgroup - S0, lane);
