// What a step is made of: plain structs that describe weights and activations, and the table of kernels that each
// ISA fills in. A pass (step/) is written against this table and never knows which ISA runs.
// Shape letters: T rows of activations (tokens), N output rows, K input columns, D head dim.
//
// Exactness: the arithmetic of one output value depends on its own row of activations and its own weights alone,
// in one fixed order. No kernel may let T, the tile a row falls into, or a split of N change it.
#pragma once
#include <cstddef>
#include <cstdint>

#include "octavo_cpu.h"

namespace octavo {

using Matrix = OctavoMatrix;
using Norm = OctavoNorm;

inline constexpr int kPageTokens = OCTAVO_PAGE_TOKENS;
inline constexpr int kBlockPages = 4;
inline constexpr int kBlockTokens = kPageTokens * kBlockPages;  // keys whose softmax is computed together

// T rows as int16 or int8 with a scale per `block` columns. Rows are stored in tiles of m consecutive rows (see
// `tile_rows_for`), each tile as [K / 2] [m] pairs of int16 or [K / 4] [m] quads of int8 (k0, k2, k1, k3), so that a
// kernel reads it front to back.
struct FixedPoint {
  int block = 0;
  int value_bytes = 0;
  int padded_columns = 0;
  uint8_t* values = nullptr;        // [T * padded_columns]; null: this encoding is not needed
  float* scales = nullptr;          // [T * padded_columns / block], tiled like the values
  int32_t* negated_sums = nullptr;  // -sum of a block's values, the same shape
  float* totals = nullptr;          // scale * sum
};

inline constexpr int kEncodings = 5;
inline constexpr int kEncodingBlocks[kEncodings] = {16, 32, 64, 32, 64};
inline constexpr int kEncodingBytes[kEncodings] = {2, 2, 2, 1, 1};

// One input of a linear in every encoding its matrices need.
struct Activations {
  int rows = 0;
  int columns = 0;
  FixedPoint fixed[kEncodings];
  float* plain = nullptr;  // [T * K] tiled as [K] [m]; null: not needed
};

// Rows of the tile that starts where `left` rows remain: full tiles, then the largest of these that fits.
inline int tile_rows_for(int left, int most) {
  constexpr int sizes[] = {12, 8, 4, 2, 1};
  for (int size : sizes)
    if (size <= most && size <= left) return size;
  return 1;
}

// Where the parts of a block of rows begin, in bytes: scales, minimums, what 256 columns share of each, codes.
struct BlockParts {
  int64_t minimums, shared, shared_minimums, codes;
};
inline BlockParts parts_of(const Matrix& w, int lanes) {
  constexpr int bytes[] = {2, 4, 1, 1, 2};
  const bool joint = w.numbers == OCTAVO_NUMBERS_F9Z7;  // then minimums are read from the scales' words
  const bool minimum = (w.codec == OCTAVO_U8_MIN || w.codec == OCTAVO_U4_MIN) && !joint;
  const bool two_level = w.numbers == OCTAVO_NUMBERS_U8 || w.numbers == OCTAVO_NUMBERS_I8;
  const int64_t table = static_cast<int64_t>((w.columns + w.group - 1) / w.group) * lanes * bytes[w.numbers];
  const int64_t factors = two_level ? static_cast<int64_t>((w.columns + 255) / 256) * lanes * 2 : 0;
  BlockParts parts;
  parts.minimums = joint ? 0 : table;
  parts.shared = minimum ? 2 * table : table;
  parts.shared_minimums = parts.shared + factors;
  parts.codes = (parts.shared + (minimum ? 2 * factors : factors) + 63) / 64 * 64;
  return parts;
}

// The encoding a matrix multiplies with: an index into `Activations::fixed`, or -1 for plain values.
inline int encoding_of(const Matrix& w) {
  if (w.codec <= OCTAVO_PLAIN_BF16) return -1;
  if (w.int8_activations) return w.group % 64 == 0 ? 4 : 3;
  // sums of 64 columns of a table's steps would not fit 32 bits
  if (w.group % 64 == 0 && w.codec != OCTAVO_T4) return 2;
  return w.group % 32 == 0 ? 1 : 0;
}

// One block of keys against the queries of one KV head.
struct AttendBlock {
  const float* queries;  // [rows, D], rotated
  int query_stride;
  int rows;
  const int32_t* first;  // row r sees keys first[r] <= i < last[r] of the block
  const int32_t* last;
  // [2 kBlockPages]: this head's part of the block's pages, K [D, 32] then V [32, D] in binary16, and of the next
  // block's, to be fetched ahead; null where there is none
  const uint16_t* const* pages;
  int head_dim;
  float scale;
  float softcap;  // 0: none
  float* scores;  // scratch [rows, kBlockTokens]
  float* out;     // [rows, D]: sum of exp(score - peak) v
  int out_stride;
  float* peak;  // [rows]: the highest score
  float* mass;  // [rows]: sum of exp(score - peak)
};

// What keys one token's noise: docs/sampling.md.
struct Noise {
  uint32_t seed_low, seed_high, choice, position;
};

struct Kernels {
  const char* name;
  int lanes;      // weight rows stored interleaved
  int tile_rows;  // most rows of a tile of activations

  // out = normalize(x) * gain (+ bias); out may be x
  void (*norm)(float* out, const float* x, int n, const Norm& norm);
  // x += multiplier * y
  void (*add_scaled)(float* x, const float* y, float multiplier, int n);
  void (*scale)(float* x, float multiplier, int n);
  // x [N] of row `row` into all encodings of `a`; `scratch` holds a padded row of int16
  void (*encode)(const Activations& a, int row, const float* x, int16_t* scratch);
  // y[t, i] = sum_k w[i, k] x[t, k] (+ bias) for the matrix rows of blocks first .. last - 1
  void (*linear)(const Matrix& w, const Activations& x, int first_block, int last_block, float* y, int64_t y_stride);
  // y = activation(gate x) * (up x)
  void (*gated)(const Matrix& gate, const Matrix& up, const Activations& x, int first_block, int last_block,
                int activation, float* y, int64_t y_stride);
  void (*activate)(float* x, int n, int activation);
  // y = activation(y) * up: what `gated` does to a row, where something joins gate and up before
  void (*gate)(float* y, const float* up, int n, int activation);
  float (*dot)(const float* a, const float* b, int n);
  // pairs (i, i + half) of a head by the angles whose cosines and sines are given
  void (*rotate)(float* head, const float* cosines, const float* sines, int half);
  // one token's key and value of one head into slot `slot` of its page
  void (*store_kv)(uint16_t* page, const float* key, const float* value, int slot, int head_dim);
  void (*attend)(const AttendBlock& block);
  // joins a further block's (out, peak, mass) to a row's
  void (*merge)(float* out, float* peak, float* mass, const float* block_out, float block_peak, float block_mass,
                int head_dim);
  // x = softcap * tanh(multiplier * x / softcap), softcap 0: none
  void (*cap)(float* x, int n, float multiplier, float softcap);

  // scans of logits: see kernels/vocabulary.inc
  float (*argmax)(const float* x, int n, int32_t* index);
  double (*mass)(const float* x, int n, float peak);
  void (*temper)(float* y, const float* x, int n, float peak, float temperature);
  int (*next_above)(const float* x, int start, int n, float limit);
  int32_t (*draw)(const float* y, int n, const Noise& noise);
  int32_t (*draw_among)(const int32_t* ids, const float* y, int count, const Noise& noise);
};

extern const Kernels kPortableKernels;
#if defined(__x86_64__) || defined(_M_X64)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace octavo
