// requantize.metal: packed rows to fewer bits, from what they hold: in rotated space, about the same means.
// Compiled behind shared.metal, which describes the packed row, and the headers of dequantize.metal, which reads it,
// and of quantize.metal, which chooses codes and scale. The text above the line "// ==== body" is the end of the header
// of mx.fast.metal_kernel, the rest is its source.
//
// MATHEMATICS, per packed row with the scale g and the levels c of its codes:
//   code = nearest level of c * sqrt(D) / ||c||, c' = the levels of these codes;
//   scale = g * <c, c> / <c, c'>, or another RULE: as quantize.metal does with y = g * c. Codes follow from codes
//   alone, so a scale of NaN (a vector that was not finite, or too large) stays one; beyond float16 it becomes NaN.
//
// MAPPING. A lane owns DIMS_PER_LANE = 16 consecutive dims (32 if D > 512), whole words of every packing. LANES lanes
//   (a power of two) share a row, a simdgroup works on 32 / LANES rows. Sums over a row go by shuffles. No threadgroup
//   memory, no barrier.
//
// INPUTS
//   codes         uint32 [B, H, CAPACITY, words of FROM bits], rows contiguous, other strides free: the whole buffer
//   scale         float16 [B, H, CAPACITY, 1], any strides
// OUTPUTS
//   new_codes     uint32 [B, H, CAPACITY, words of TO bits]
//   new_scale     float16 [B, H, CAPACITY, 1]
// TEMPLATE  FROM, TO bits in {2, 3, 4, 5, 6, 8}, FROM > TO; D head_dim, multiple of 4, 32 to 576; RULE: of the scale,
//   as of quantize.metal.
// LAUNCH  grid (32, ceil(B * H * CAPACITY / VECTORS), 1), VECTORS = 32 / LANES; threadgroup (32, n, 1), any n. Lengths
//   are data: nothing is compiled again when CAPACITY changes.
//
// REGISTERS (estimate, 32 bits each): as quantize.metal, 49; 81 for D > 512.

// ==== body
static_assert(FROM > TO, "fewer bits");
typedef Row<TO, D> R;
int n_heads = codes_shape[1], n_tokens = codes_shape[2], n_rows = codes_shape[0] * n_heads * n_tokens;
int lane = thread_index_in_simdgroup, t = uint(lane) % R::LANES;  // unsigned: no division
int row = int(thread_position_in_grid.y) * R::VECTORS + uint(lane) / R::LANES;
bool live = row < n_rows;
row = min(row, n_rows - 1);  // lanes past the end shuffle along
int head = row / n_tokens, token = row - head * n_tokens, b = head / n_heads, h = head - b * n_heads;
float g =
    live ? float(scale[b * scale_strides[0] + h * scale_strides[1] + token * scale_strides[2]]) * Levels<FROM>::UNIT
         : 0.0f;
float y[R::DIMS_PER_LANE];
tq_read_row<FROM, D>(codes + b * codes_strides[0] + h * codes_strides[1] + token * codes_strides[2], live, t, 1.0f, y);
tq_encode<TO, D, RULE>(y, g, new_codes + (long)row * R::WORDS, new_scale + row, live, t);
