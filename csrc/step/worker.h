// One thread's way through a pass: embedding, layers, head, as a sequence of stages that all threads go through
// together (worker.cpp).
//
// A stage either prepares rows of activations (rows.cpp: residual, norm, encoding; rows are shared out), multiplies
// them with weights (linears.cpp, head.cpp; blocks of weight rows are shared out) or attends (attention.cpp; heads,
// queries and blocks of keys are shared out); a barrier stands between stages. A pass over a single row (decode of
// one sequence) prepares it on every thread in private memory instead, which saves half of the barriers.
#pragma once
#include <algorithm>

#include "pass.h"

namespace octavo {

// A sublayer's output [rows, hidden] that is not yet part of the residual.
struct Pending {
  const float* y;
  const Norm* post;
  float multiplier;
};

// Linears of one stage that read the same rows, as an adapter numbers them.
struct Linears {
  int first = 0;
  int count = 0;
};

// A linear, and its place among those of its stage.
struct Addend {
  int linear;
  int place;
};

class Worker {
 public:
  Worker(Pass& pass, int thread);
  void run();

 private:
  void feed(const LayerState& layer);
  float* fed_rows(const LayerState& layer);
  void barrier();
  // Rows were prepared: a single one by everyone, and there is nothing to wait for.
  void rows_ready() {
    if (!alone_) barrier();
  }
  int claim() { return p_.claims[stage_ % 4].fetch_add(1, std::memory_order_relaxed); }

  const Segment& segment_of(int row) const {
    return p_.segments[static_cast<size_t>(p_.segment_of[static_cast<size_t>(row)])];
  }
  float* residual(int row) { return alone_ ? s_.x.data() : r_.x.data() + int64_t{row} * r_.model.hidden_size; }
  float* angles(int row);  // [ropes, 2, pairs]: cosines, then sines
  Activations input(int rows, int columns, EncodingSet encodings) {
    return (alone_ ? s_.input : r_.input).view(rows, columns, encodings);
  }

  int blocks_of(const Matrix& w) const { return (w.rows + k_.lanes - 1) / k_.lanes; }
  // Calls f(first block, last block) for this thread's parts of `blocks` blocks: one contiguous stream each for a
  // single row, else claimed panels small enough to stay in the cache for all tiles of rows. The last quarter goes in
  // small panels, and so does all of it where few rows make every panel short: threads then end together.
  template <class F> void share_blocks(int blocks, int64_t block_bytes, F f) {
    if (alone_) {
      const Range range = share((blocks + 1) / 2, thread_, p_.threads);  // pairs: see Kernels::gated
      f(2 * range.begin, std::min(2 * range.end, blocks));
      return;
    }
    constexpr int64_t kPanelBytes = 128 << 10;
    constexpr int kFewRows = 32;
    const int cached = static_cast<int>(kPanelBytes / block_bytes);
    const auto even = [&](int panel) { return std::max(2, std::min(panel, cached) / 2 * 2); };
    const int large = even(blocks / (4 * p_.threads)), small = even(blocks / (32 * p_.threads));
    const int large_panels = p_.rows <= kFewRows ? 0 : blocks * 3 / 4 / large;
    for (;;) {
      const int panel = claim(), after = panel - large_panels;
      const int first = after < 0 ? panel * large : large_panels * large + after * small;
      if (first >= blocks) return;
      f(first, std::min(first + (after < 0 ? large : small), blocks));
    }
  }

  // rows.cpp
  void embed();
  void turn(int position, float* out);
  void add_pending(float* x, int row);
  void encode(int i, const Segment& segment, const float* x, const Norm* norm, Linears linears);
  void join(const Norm& pre, EncodingSet encodings, Linears linears);
  void finish_ffn(const LayerState& layer);

  // linears.cpp
  void multiply(const Matrix& w, Addend addend, int first, int last, float* y, int64_t stride);
  void project(const Matrix& w, int linear, float* y, int64_t stride);
  void project_qkv(const LayerState& layer);
  void feed_dense(const LayerState& layer, float* y);

  // experts.cpp
  void plan_experts(const OctavoLayer& spec);
  template <class F> void share_experts(const Matrix& w, F f);
  template <class F> void each_entry(F f);
  Activations expert_input(int expert, int columns, EncodingSet encodings);
  void feed_experts(const LayerState& layer, const Norm& pre, float* y);

  // addends.cpp
  const OctavoAdapter* adapter_of(int i) const;
  float* lowered(int i, int place);
  void lower(int i, const OctavoAdapter& adapter, const float* x, Linears linears);
  void raise(const Matrix& w, Addend which, int first, int last, float* y, int64_t stride);
  void gate_with_addends(const LayerState& layer, int first, int last);

  // head.cpp
  void score(const std::vector<WantedRow>& wanted, float* logits);
  void score_sampled();
  void score_targets();
  void read_targets(const std::vector<WantedRow>& rows);

  // attention.cpp
  void finish_qk(const OctavoLayer& spec, float* q, float* k, const float* row_angles);
  uint16_t* page_of(LayerState& layer, const Segment& segment, int page, int kv_head) const;
  void find_pages(LayerState& layer, const Segment& segment, int block, int last_position, int kv_head,
                  const uint16_t** pages) const;
  void store(LayerState& layer, const Segment& segment, int position, int kv_head, const float* k, const float* v);
  void attend(LayerState& layer);
  void attend_alone(LayerState& layer);
  void attend_single(LayerState& layer, const Segment& segment, int block, int kv_head, const float* q);
  void attend_tiles(LayerState& layer, const Segment& segment, const AttendUnit& unit, int kv_head);
  void attend_tile(LayerState& layer, const Segment& segment, int first_row, int tokens, int kv_head, int head,
                   int heads);
  // A block of keys against one head of a single row: sum of exp(score - peak) v, and of exp(score - peak).
  struct Partial {
    float *out, *peak, *mass;
  };
  Partial partial(const OctavoLayer& spec, const Segment& segment, int block, int head) const;
  void merge(const OctavoLayer& spec, float* out, float* peak, float* mass, const Partial& next) const;
  int blocks_joined(const OctavoLayer& spec, int blocks, int kv_head) const;
  void finish_attention(const LayerState& layer);
  void join_blocks(const OctavoLayer& spec, const Segment& segment, int head, float* out);

  Pass& p_;
  OctavoRunner& r_;
  const Kernels& k_;
  Scratch& s_;
  int thread_;
  bool alone_;
  Range mine_;  // the rows this thread prepares
  int stage_ = 0;
  Activations x_;  // the current stage's input
  const std::vector<WantedRow>* wanted_ = nullptr;  // whose rows x_ holds; null: the pass's
  Pending pending_[2];
  int pending_count_ = 0;
};

}  // namespace octavo
