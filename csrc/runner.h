// The state of a runner: model, KV pages, slots, workspaces. step/ runs the model, sampling.cpp the sampling law.
#pragma once
#include <memory>
#include <unordered_map>
#include <vector>

#include "buffer.h"
#include "kernels.h"
#include "pool.h"

namespace octavo {

// Which encodings of its input a stage's matrices need: bit e of Activations::fixed[e], bit kEncodings for plain.
using EncodingSet = unsigned;
inline constexpr EncodingSet kPlain = 1u << kEncodings;

inline EncodingSet encodings_of(const Matrix& w) {
  if (!w.blocks) return 0;
  const int encoding = encoding_of(w);
  return encoding < 0 ? kPlain : 1u << encoding;
}

inline int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// Memory for one input of up to `rows` rows and `columns` columns; `view` cuts the part a stage needs.
class EncodedRows {
 public:
  void reset(int rows, int columns, EncodingSet encodings);
  Activations view(int rows, int columns, EncodingSet encodings, int first_row = 0);
  size_t bytes() const;

 private:
  struct Fixed {
    Buffer<uint8_t> values;
    Buffer<float> scales;
    Buffer<int32_t> negated_sums;
    Buffer<float> totals;
  };
  Fixed fixed_[kEncodings];
  Buffer<float> plain_;
};

struct LayerState {
  OctavoLayer spec;
  std::vector<OctavoExpert> experts;
  // What each stage's matrices take; of experts ffn_in is the router's, expert_in their own.
  EncodingSet mixer_in, mixer_out, ffn_in, ffn_out, expert_in;
  int linear;  // the first of its addends in an adapter
  Buffer<uint16_t> kv;  // [pages, KH, K [D, 32] then V [32, D]]
  int64_t page_values;
  int64_t head_values;
};

// Which experts each row goes through. An entry is a row at one of its experts; entries are sorted by expert.
struct ExpertPlan {
  std::vector<int32_t> chosen;   // [T, experts a token], the most likely first
  std::vector<float> weights;    // [T, experts a token]
  std::vector<int32_t> entries;  // [T, experts a token]
  std::vector<int32_t> rows;     // [entries]: the row of each
  std::vector<int32_t> first;    // [experts + 1]: each expert's first entry
  std::vector<int32_t> used;     // experts that have entries, ascending
};

// What one thread needs to itself.
struct Scratch {
  Buffer<float> x;       // [hidden]: the residual row, where all threads compute the same single row
  Buffer<float> row;     // [widest]
  Buffer<float> queries; // [(H + KH) D] of a single row; the queries of an attention tile
  Buffer<float> angles;  // [ropes, 2, pairs] of a single row
  Buffer<float> scores;  // [tile rows, kBlockTokens]
  Buffer<float> block_out, out;   // [tile rows, D]
  Buffer<float> block_state, state;  // [2, tile rows]: peak, mass
  Buffer<int32_t> first;   // [2, tile rows]: the keys each row of a tile sees
  Buffer<int16_t> values;  // a padded row for Kernels::encode
  EncodedRows input;
  EncodedRows expert_input;  // a single row's entries
  Buffer<float> mixed;       // [hidden]: a single row's output of its experts
  Buffer<float> lowered;     // see OctavoRunner::lowered
  ExpertPlan plan;
};

struct Slot {
  bool open = false;
  OctavoSampling sampling{};
  std::vector<int32_t> bias_ids;
  std::vector<float> bias_values;
  std::vector<bool> in_prompt;                     // [V], empty where the law does not read it
  std::unordered_map<int32_t, int32_t> generated;  // times each token was generated
  int32_t last_token = 0;
  int32_t tokens = 0;      // in the sequence, prompt included
  const OctavoAdapter* adapter = nullptr;
  int32_t logits_row = -1; // of `logits`: the first one kept; -1: none
};

bool has_penalties(const OctavoSampling& sampling);
void start_slot(Slot& slot, const OctavoSampling& sampling, int32_t vocab_size, const int32_t* token_ids,
                int32_t tokens, int32_t prompt_tokens);
void count_token(Slot& slot, int32_t token_id);

struct SamplingScratch {
  std::vector<float> shaped, tempered;
  std::vector<std::pair<float, int32_t>> best;
  std::vector<int32_t> ids;
  std::vector<float> values;
};

// docs/sampling.md: the token for the slot's next position from its logits [V], -1 on a numerical error.
int32_t sample_token(const Kernels& k, const Slot& slot, const float* logits, int32_t vocab_size,
                     const uint32_t* mask, SamplingScratch& scratch);
// All that `sample` asks for, from the rows of logits [drafts + 1, V] that its chunk kept; the slot goes on with them.
void sample_slot(const Kernels& k, Slot& slot, const float* logits, int32_t vocab_size, OctavoSample& sample,
                 SamplingScratch& scratch);
// Log-softmax of a row at `token_id`, and the most probable tokens.
void token_logprob(const Kernels& k, const float* logits, int32_t vocab_size, int32_t token_id, int32_t row,
                   const OctavoLogprobs& out, SamplingScratch& scratch);
// W's row `row` as fp32 [K], bit-equal to the format's unpack.
void dequantize_row(const Matrix& w, int lanes, int row, float* out);

const Kernels* kernels_of(int isa);  // null: not on this machine

}  // namespace octavo

struct OctavoRunner {
  const octavo::Kernels* k;
  OctavoModel model;
  std::vector<octavo::LayerState> layers;
  std::vector<OctavoRope> ropes;
  std::vector<std::vector<float>> frequencies;  // of each rope
  octavo::EncodingSet head_in;
  int widest;  // floats of the widest row of activations
  int projected;  // floats of a row of q, k and v
  int mixed;      // floats of a row of attention output
  int fed;        // floats of a row inside the MLP
  int max_heads;
  int most_experts;  // a token goes through
  int pairs;  // most angles of a rope
  int query_tile;  // rows of queries an attention tile takes at most

  octavo::Buffer<float> y_ffn;  // of layers whose attention and MLP stand side by side
  octavo::Buffer<float> router_logits, expert_out;
  octavo::EncodedRows expert_input;
  octavo::Buffer<float> lowered;  // [T, 3, R]: x a^T of the stage's linears, where a row's slot has an adapter
  octavo::Buffer<float> up;       // gate and up apart, where they have addends
  octavo::Buffer<float> x, y, qkv, attended, hidden, angles, logits, target_logits;
  octavo::Buffer<float> partial_out, partial_state;  // blocks of single queries: see step/attention.cpp
  octavo::EncodedRows input;
  std::vector<octavo::Scratch> scratch;

  std::vector<octavo::Slot> slots;
  std::vector<octavo::SamplingScratch> sampling;  // one a thread
  int logits_rows = 0;

  std::unique_ptr<octavo::Pool> pool;
  octavo::Barrier barrier;
  octavo::Governor governors[16];  // by the logarithm of a step's rows
};

namespace octavo {
inline constexpr int kLowered = 3;      // most linears of one stage that have addends of their own
inline constexpr int kTargetRows = 16;  // rows of logits at once where every prompt row's are wanted
void open_runner(OctavoRunner& runner, const OctavoModel& model);
void forward(OctavoRunner& runner, const OctavoChunk* chunks, int count);
void sample(OctavoRunner& runner, OctavoSample* samples, int count);
}  // namespace octavo
