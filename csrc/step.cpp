// One forward pass: embedding, layers, head, as a sequence of stages that all threads go through together.
//
// A stage either prepares rows of activations (residual, norm, encoding: rows are shared out), multiplies them
// with weights (blocks of weight rows are shared out) or attends (heads, queries and blocks of keys are shared out);
// a barrier stands between stages. A pass over a single row (decode of one sequence) prepares it on every thread
// in private memory instead, which saves half of the barriers.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>

#include "runner.h"

namespace octavo {
namespace {

// Consecutive rows of the pass that belong to one chunk.
struct Segment {
  const OctavoChunk* chunk;
  int first_row;
  int rows;
  int start;          // position of the first row
  int partial_block;  // where its blocks lie in the runner's partials, if it is a single row
};

// A piece of attention: queries of a segment against one block of keys (of a single row) or all they see.
struct AttendUnit {
  int segment;
  int first_row;  // within the segment
  int rows;
  int block;  // -1: all
};

// A row whose logits are wanted, to sample from or for a target's logprob.
struct WantedRow {
  int row;
  int segment;
  int logits_row;  // of the runner's logits; -1: a target's
};

struct Pass {
  explicit Pass(OctavoRunner& runner) : r(runner) {}
  OctavoRunner& r;
  int rows = 0;
  int threads = 1;
  std::vector<Segment> segments;
  std::vector<int> segment_of;                 // [rows]
  std::vector<std::vector<AttendUnit>> units;  // [kv_groups]
  std::vector<WantedRow> sampled, targeted;
  // Blocks are claimed, not assigned, so that a slow core takes fewer; a counter is cleared two stages ahead.
  std::atomic<int> claims[4] = {};
};

struct Range {
  int begin, end;
};
Range share(int n, int thread, int threads) {
  return {static_cast<int>(static_cast<int64_t>(n) * thread / threads),
          static_cast<int>(static_cast<int64_t>(n) * (thread + 1) / threads)};
}

int first_visible(int position, int window) { return window > 0 && position >= window ? position - window + 1 : 0; }

// One thread's way through a pass.
class Worker {
 public:
  Worker(Pass& pass, int thread)
      : p_(pass), r_(pass.r), k_(*pass.r.k), s_(pass.r.scratch[static_cast<size_t>(thread)]), thread_(thread),
        alone_(pass.rows == 1), mine_(alone_ ? Range{0, 1} : share(pass.rows, thread, pass.threads)) {}

  void run() {
    embed();
    const float* pending = nullptr;  // output of the last sublayer, not yet part of the residual
    const Norm* post = nullptr;
    float multiplier = 1.0f;
    for (LayerState& layer : r_.layers) {
      const OctavoLayer& spec = layer.spec;
      join(pending, post, multiplier, spec.pre_mixer, layer.mixer_in);
      project_qkv(spec);
      barrier();
      attend(layer);
      barrier();
      finish_attention(layer);
      project(spec.o, r_.y.data(), r_.model.hidden_size);
      barrier();
      join(r_.y.data(), &spec.post_mixer, spec.residual_multiplier, spec.pre_ffn, layer.ffn_in);
      project_ffn(spec);
      barrier();
      finish_ffn(layer);
      project(spec.down, r_.y.data(), r_.model.hidden_size);
      barrier();
      pending = r_.y.data();
      post = &spec.post_ffn;
      multiplier = spec.residual_multiplier;
    }
    score(p_.sampled, pending, post, multiplier, r_.logits.data());
    for (size_t first = 0; first < p_.targeted.size(); first += kTargetRows) {
      const size_t last = std::min(first + kTargetRows, p_.targeted.size());
      const std::vector<WantedRow> rows(p_.targeted.begin() + static_cast<std::ptrdiff_t>(first),
                                        p_.targeted.begin() + static_cast<std::ptrdiff_t>(last));
      score(rows, pending, post, multiplier, r_.target_logits.data());
      read_targets(rows);
      barrier();
    }
  }

 private:
  void barrier() {
    if (thread_ == 0) p_.claims[(stage_ + 2) % 4].store(0, std::memory_order_relaxed);
    r_.barrier.wait(p_.threads);
    stage_++;
  }
  void rows_ready() {  // a single row was prepared by everyone: nothing to wait for
    if (!alone_) barrier();
  }
  int claim() { return p_.claims[stage_ % 4].fetch_add(1, std::memory_order_relaxed); }

  float* residual(int row) { return alone_ ? s_.x.data() : r_.x.data() + int64_t{row} * r_.model.hidden_size; }
  Activations input(int rows, int columns, EncodingSet encodings) {
    return (alone_ ? s_.input : r_.input).view(rows, columns, encodings);
  }
  const Segment& segment_of(int row) const {
    return p_.segments[static_cast<size_t>(p_.segment_of[static_cast<size_t>(row)])];
  }

  // ---- rows ------------------------------------------------------------------------------------------------------

  void embed() {
    const OctavoModel& m = r_.model;
    for (int row = mine_.begin; row < mine_.end; row++) {
      const Segment& segment = segment_of(row);
      const OctavoChunk& chunk = *segment.chunk;
      const int offset = segment.start + row - segment.first_row - chunk.start;
      const int token =
          chunk.token_ids ? chunk.token_ids[offset] : r_.slots[static_cast<size_t>(chunk.slot)].last_token;
      dequantize_row(m.embedding, k_.lanes, token, residual(row));
      if (m.embedding_multiplier != 1.0f) k_.scale(residual(row), m.embedding_multiplier, m.hidden_size);
      turn(segment.start + row - segment.first_row, angles(row));
    }
    rows_ready();
  }

  float* angles(int row) {
    return alone_ ? s_.angles.data()
                  : r_.angles.data() + int64_t{row} * 2 * r_.pairs * static_cast<int64_t>(r_.ropes.size());
  }

  // Cosines and sines of every rope at a position. The angle is rounded to fp32 as the models were trained with.
  void turn(int position, float* out) {
    for (size_t i = 0; i < r_.ropes.size(); i++, out += 2 * r_.pairs) {
      const OctavoRope& rope = r_.ropes[i];
      for (int j = 0; j < rope.pairs; j++) {
        const double angle = static_cast<float>(position) * rope.inverse_frequencies[j];
        out[j] = static_cast<float>(std::cos(angle)) * rope.attention_factor;
        out[r_.pairs + j] = static_cast<float>(std::sin(angle)) * rope.attention_factor;
      }
    }
  }

  void add_to(float* x, const float* y, const Norm& post, float multiplier) {
    const int n = r_.model.hidden_size;
    if (post.kind != OCTAVO_NO_NORM) {
      k_.norm(s_.row.data(), y, n, post);
      y = s_.row.data();
    }
    k_.add_scaled(x, y, multiplier, n);
  }

  void encode(const Activations& a, int row, const float* x, const Norm& norm) {
    if (norm.kind != OCTAVO_NO_NORM) {
      k_.norm(s_.row.data(), x, a.columns, norm);
      x = s_.row.data();
    }
    k_.encode(a, row, x, s_.values.data());
  }

  // The last sublayer's output joins the residual, which becomes the next one's input.
  void join(const float* y, const Norm* post, float multiplier, const Norm& pre, EncodingSet encodings) {
    const int n = r_.model.hidden_size;
    x_ = input(p_.rows, n, encodings);
    for (int row = mine_.begin; row < mine_.end; row++) {
      if (y) add_to(residual(row), y + int64_t{row} * n, *post, multiplier);
      encode(x_, row, residual(row), pre);
    }
    rows_ready();
  }

  void finish_ffn(const LayerState& layer) {
    const OctavoLayer& spec = layer.spec;
    const int n = spec.down.columns;
    x_ = input(p_.rows, n, layer.ffn_out);
    for (int row = mine_.begin; row < mine_.end; row++) {
      const float* h = r_.hidden.data() + int64_t{row} * r_.fed;
      if (!spec.gate.blocks) {
        std::memcpy(s_.row.data(), h, static_cast<size_t>(n) * sizeof(float));
        k_.activate(s_.row.data(), n, spec.activation);
        h = s_.row.data();
      }
      k_.encode(x_, row, h, s_.values.data());
    }
    rows_ready();
  }

  // ---- weights ---------------------------------------------------------------------------------------------------

  // Calls f(first block, last block) for this thread's parts of `blocks` blocks: one contiguous stream each for a
  // single row, else claimed panels small enough to stay in the cache for all tiles of rows.
  template <class F> void share_blocks(int blocks, int64_t block_bytes, F f) {
    if (alone_) {
      const Range range = share((blocks + 1) / 2, thread_, p_.threads);  // pairs: see Kernels::gated
      f(2 * range.begin, std::min(2 * range.end, blocks));
      return;
    }
    constexpr int64_t kPanelBytes = 128 << 10;
    int panel = static_cast<int>(kPanelBytes / block_bytes);
    panel = std::max(2, std::min(panel, blocks / (4 * p_.threads)) / 2 * 2);
    for (int first; (first = claim() * panel) < blocks;) f(first, std::min(first + panel, blocks));
  }

  int blocks_of(const Matrix& w) const { return (w.rows + k_.lanes - 1) / k_.lanes; }

  void project(const Matrix& w, float* y, int64_t stride) {
    share_blocks(blocks_of(w), w.block_bytes, [&](int first, int last) { k_.linear(w, x_, first, last, y, stride); });
  }

  void project_qkv(const OctavoLayer& spec) {
    const Matrix* parts[] = {&spec.q, &spec.k, &spec.v};
    const int blocks = blocks_of(spec.q) + blocks_of(spec.k) + blocks_of(spec.v);
    share_blocks(blocks, spec.q.block_bytes, [&](int first, int last) {
      float* y = r_.qkv.data();
      int begin = 0;
      for (const Matrix* w : parts) {
        const int end = begin + blocks_of(*w);
        const int from = std::max(first, begin), to = std::min(last, end);
        if (from < to) k_.linear(*w, x_, from - begin, to - begin, y, r_.projected);
        begin = end;
        y += w->rows;
      }
    });
  }

  void project_ffn(const OctavoLayer& spec) {
    float* h = r_.hidden.data();
    if (!spec.gate.blocks) return project(spec.up, h, r_.fed);
    share_blocks(blocks_of(spec.up), spec.up.block_bytes, [&](int first, int last) {
      k_.gated(spec.gate, spec.up, x_, first, last, spec.activation, h, r_.fed);
    });
  }

  // Logits [rows, V] of the wanted rows; ends with a barrier, if there is anything to do.
  void score(const std::vector<WantedRow>& wanted, const float* y, const Norm* post, float multiplier, float* logits) {
    if (wanted.empty()) return;
    const OctavoModel& m = r_.model;
    const int count = static_cast<int>(wanted.size()), n = m.hidden_size;
    x_ = input(count, n, r_.head_in);
    const Range range = alone_ ? Range{0, 1} : share(count, thread_, p_.threads);
    for (int i = range.begin; i < range.end; i++) {
      const int row = wanted[static_cast<size_t>(i)].row;
      float* x = s_.queries.data();
      std::memcpy(x, residual(row), static_cast<size_t>(n) * sizeof(float));
      if (y) add_to(x, y + int64_t{row} * n, *post, multiplier);
      encode(x_, i, x, m.final_norm);
    }
    rows_ready();
    if (wanted[0].logits_row > 0) logits += int64_t{wanted[0].logits_row} * m.vocab_size;
    share_blocks(blocks_of(m.head), m.head.block_bytes, [&](int first, int last) {
      k_.linear(m.head, x_, first, last, logits, m.vocab_size);
      if (m.logits_multiplier == 1.0f && m.final_softcap == 0.0f) return;
      const int begin = first * k_.lanes, end = std::min(last * k_.lanes, m.vocab_size);
      for (int i = 0; i < count && begin < end; i++)
        k_.cap(logits + int64_t{i} * m.vocab_size + begin, end - begin, m.logits_multiplier, m.final_softcap);
    });
    barrier();
  }

  void read_targets(const std::vector<WantedRow>& rows) {
    const Range range = share(static_cast<int>(rows.size()), thread_, p_.threads);
    for (int i = range.begin; i < range.end; i++) {
      const WantedRow& wanted = rows[static_cast<size_t>(i)];
      const Segment& segment = p_.segments[static_cast<size_t>(wanted.segment)];
      const int offset = segment.start + wanted.row - segment.first_row - segment.chunk->start;
      token_logprob(k_, r_.target_logits.data() + int64_t{i} * r_.model.vocab_size, r_.model.vocab_size,
                    segment.chunk->targets[offset], offset, segment.chunk->prompt,
                    r_.sampling[static_cast<size_t>(thread_)]);
    }
  }

  // ---- attention -------------------------------------------------------------------------------------------------

  // Norms and rotation of a row's queries and keys, in place.
  void finish_qk(const OctavoLayer& spec, float* q, float* k, const float* row_angles) {
    const int dim = spec.head_dim;
    if (spec.q_norm.kind != OCTAVO_NO_NORM && spec.qk_norm_full) {
      k_.norm(q, q, spec.heads * dim, spec.q_norm);
      k_.norm(k, k, spec.kv_heads * dim, spec.k_norm);
    } else if (spec.q_norm.kind != OCTAVO_NO_NORM) {
      for (int h = 0; h < spec.heads; h++) k_.norm(q + h * dim, q + h * dim, dim, spec.q_norm);
      for (int h = 0; h < spec.kv_heads; h++) k_.norm(k + h * dim, k + h * dim, dim, spec.k_norm);
    }
    if (spec.rope < 0) return;
    const float* cosines = row_angles + int64_t{2} * spec.rope * r_.pairs;
    const int half = r_.ropes[static_cast<size_t>(spec.rope)].pairs;
    for (int h = 0; h < spec.heads; h++) k_.rotate(q + h * dim, cosines, cosines + r_.pairs, half);
    for (int h = 0; h < spec.kv_heads; h++) k_.rotate(k + h * dim, cosines, cosines + r_.pairs, half);
  }

  uint16_t* page_of(LayerState& layer, const Segment& segment, int page, int kv_head) const {
    const int32_t index = segment.chunk->page_tables[layer.spec.kv_group][page];
    if (index < 0) return nullptr;  // behind the window: never looked at
    return layer.kv.data() + index * layer.page_values + kv_head * layer.head_values;
  }

  void store(LayerState& layer, const Segment& segment, int position, int kv_head, const float* k, const float* v) {
    const int dim = layer.spec.head_dim;
    k_.store_kv(page_of(layer, segment, position / kPageTokens, kv_head), k + kv_head * dim, v + kv_head * dim,
                position % kPageTokens, dim);
  }

  void attend(LayerState& layer) {
    const OctavoLayer& spec = layer.spec;
    const int q_size = spec.heads * spec.head_dim, k_size = spec.kv_heads * spec.head_dim;
    const std::vector<AttendUnit>& units = p_.units[static_cast<size_t>(spec.kv_group)];
    const int count = static_cast<int>(units.size()) * spec.kv_heads;
    if (alone_) {
      const Segment& segment = p_.segments[0];
      float* q = s_.queries.data();
      std::memcpy(q, r_.qkv.data(), static_cast<size_t>(q_size + k_size) * sizeof(float));
      finish_qk(spec, q, q + q_size, angles(0));
      const Range range = share(count, thread_, p_.threads);
      const int blocks = static_cast<int>(units.size());
      for (int i = range.begin; i < range.end; i++) {
        const int kv_head = i / blocks;
        if (i % blocks == blocks - 1)
          store(layer, segment, segment.start, kv_head, q + q_size, r_.qkv.data() + q_size + k_size);
        attend_single(layer, segment, units[static_cast<size_t>(i % blocks)].block, kv_head, q);
      }
      return;
    }
    for (int row = mine_.begin; row < mine_.end; row++) {
      float* q = r_.qkv.data() + int64_t{row} * r_.projected;
      finish_qk(spec, q, q + q_size, angles(row));
      const Segment& segment = segment_of(row);
      for (int h = 0; h < spec.kv_heads; h++)
        store(layer, segment, segment.start + row - segment.first_row, h, q + q_size, q + q_size + k_size);
    }
    barrier();
    for (int i; (i = claim()) < count;) {
      const AttendUnit& unit = units[static_cast<size_t>(count - 1 - i) / static_cast<size_t>(spec.kv_heads)];
      const Segment& segment = p_.segments[static_cast<size_t>(unit.segment)];
      const int kv_head = (count - 1 - i) % spec.kv_heads;
      if (unit.block >= 0)
        attend_single(layer, segment, unit.block, kv_head, r_.qkv.data() + int64_t{segment.first_row} * r_.projected);
      else
        attend_tiles(layer, segment, unit, kv_head);
    }
  }

  void find_pages(LayerState& layer, const Segment& segment, int block, int last_position, int kv_head,
                  const uint16_t** pages) const {
    for (int i = 0; i < 2 * kBlockPages; i++) {
      const int page = block * kBlockPages + i;
      pages[i] = page <= last_position / kPageTokens ? page_of(layer, segment, page, kv_head) : nullptr;
    }
  }

  // A single row's queries of one KV head against one block, into the partials.
  void attend_single(LayerState& layer, const Segment& segment, int block, int kv_head, const float* q) {
    const OctavoLayer& spec = layer.spec;
    const int group = spec.heads / spec.kv_heads, dim = spec.head_dim, position = segment.start;
    const uint16_t* pages[2 * kBlockPages];
    find_pages(layer, segment, block, position, kv_head, pages);
    const int base = block * kBlockTokens;
    const int32_t from = std::max(first_visible(position, spec.window) - base, 0);
    const int32_t to = std::min(position + 1 - base, kBlockTokens);
    const int head = kv_head * group;
    const int64_t place = int64_t{segment.partial_block} + block;
    for (int done = 0; done < group; done += r_.query_tile) {
      const int rows = std::min(group - done, r_.query_tile);
      int32_t* first = s_.first.data();
      for (int i = 0; i < rows; i++) first[i] = from, first[r_.query_tile + i] = to;
      float* state = r_.partial_state.data() + place * 2 * r_.max_heads + head + done;
      k_.attend({.queries = q + (head + done) * dim, .query_stride = dim, .rows = rows, .first = first,
                 .last = first + r_.query_tile, .pages = pages, .head_dim = dim, .scale = spec.score_scale,
                 .softcap = spec.score_softcap, .scores = s_.scores.data(),
                 .out = r_.partial_out.data() + place * r_.mixed + (head + done) * dim, .out_stride = dim,
                 .peak = state, .mass = state + r_.max_heads});
    }
  }

  // Several rows of a segment against all the keys they see, block after block.
  void attend_tiles(LayerState& layer, const Segment& segment, const AttendUnit& unit, int kv_head) {
    const OctavoLayer& spec = layer.spec;
    const int group = spec.heads / spec.kv_heads;
    const int tokens = std::max(1, r_.query_tile / group), heads = std::min(group, r_.query_tile);
    for (int row = unit.first_row; row < unit.first_row + unit.rows; row += tokens)
      for (int head = 0; head < group; head += heads)
        attend_tile(layer, segment, row, std::min(tokens, unit.first_row + unit.rows - row), kv_head,
                    kv_head * group + head, std::min(heads, group - head));
  }

  void attend_tile(LayerState& layer, const Segment& segment, int first_row, int tokens, int kv_head, int head,
                   int heads) {
    const OctavoLayer& spec = layer.spec;
    const int dim = spec.head_dim, rows = tokens * heads, tile = r_.query_tile;
    float *q = s_.queries.data(), *out = s_.out.data(), *block_out = s_.block_out.data();
    float *state = s_.state.data(), *block_state = s_.block_state.data();
    int32_t *first = s_.first.data(), *last = first + tile;
    for (int t = 0; t < tokens; t++)
      std::memcpy(q + int64_t{t} * heads * dim,
                  r_.qkv.data() + int64_t{segment.first_row + first_row + t} * r_.projected + head * dim,
                  static_cast<size_t>(heads * dim) * sizeof(float));
    std::memset(out, 0, static_cast<size_t>(rows * dim) * sizeof(float));
    for (int i = 0; i < rows; i++) state[i] = -INFINITY, state[tile + i] = 0.0f;

    const int first_position = segment.start + first_row, last_position = first_position + tokens - 1;
    for (int block = first_visible(first_position, spec.window) / kBlockTokens; block <= last_position / kBlockTokens;
         block++) {
      const uint16_t* pages[2 * kBlockPages];
      find_pages(layer, segment, block, last_position, kv_head, pages);
      for (int i = 0; i < rows; i++) {
        const int position = first_position + i / heads, base = block * kBlockTokens;
        first[i] = std::max(first_visible(position, spec.window) - base, 0);
        last[i] = std::min(position + 1 - base, kBlockTokens);
      }
      k_.attend({.queries = q, .query_stride = dim, .rows = rows, .first = first, .last = last, .pages = pages,
                 .head_dim = dim, .scale = spec.score_scale, .softcap = spec.score_softcap,
                 .scores = s_.scores.data(), .out = block_out, .out_stride = dim, .peak = block_state,
                 .mass = block_state + tile});
      for (int i = 0; i < rows; i++)
        k_.merge(out + int64_t{i} * dim, state + i, state + tile + i, block_out + int64_t{i} * dim, block_state[i],
                 block_state[tile + i], dim);
    }
    for (int i = 0; i < rows; i++) {
      float* target = r_.attended.data() + int64_t{segment.first_row + first_row + i / heads} * r_.mixed +
                      (head + i % heads) * dim;
      std::memcpy(target, out + int64_t{i} * dim, static_cast<size_t>(dim) * sizeof(float));
      k_.scale(target, 1.0f / state[tile + i], dim);
    }
  }

  // A single row's blocks joined in order; every row becomes the output projection's input.
  void finish_attention(const LayerState& layer) {
    const OctavoLayer& spec = layer.spec;
    const int dim = spec.head_dim;
    x_ = input(p_.rows, spec.heads * dim, layer.mixer_out);
    for (int row = mine_.begin; row < mine_.end; row++) {
      const Segment& segment = segment_of(row);
      const float* x = r_.attended.data() + int64_t{row} * r_.mixed;
      if (segment.rows == 1) {
        float* joined = s_.row.data();
        std::memset(joined, 0, static_cast<size_t>(spec.heads * dim) * sizeof(float));
        for (int h = 0; h < spec.heads; h++) join_blocks(spec, segment, h, joined + h * dim);
        x = joined;
      }
      k_.encode(x_, row, x, s_.values.data());
    }
    rows_ready();
  }

  void join_blocks(const OctavoLayer& spec, const Segment& segment, int head, float* out) {
    float peak = -INFINITY, mass = 0.0f;
    for (int block = first_visible(segment.start, spec.window) / kBlockTokens; block <= segment.start / kBlockTokens;
         block++) {
      const int64_t place = int64_t{segment.partial_block} + block;
      const float* state = r_.partial_state.data() + place * 2 * r_.max_heads + head;
      k_.merge(out, &peak, &mass, r_.partial_out.data() + place * r_.mixed + head * spec.head_dim, state[0],
               state[r_.max_heads], spec.head_dim);
    }
    k_.scale(out, 1.0f / mass, spec.head_dim);
  }

  Pass& p_;
  OctavoRunner& r_;
  const Kernels& k_;
  Scratch& s_;
  int thread_;
  bool alone_;
  Range mine_;
  int stage_ = 0;
  Activations x_;
};

// ---- from chunks to passes ----------------------------------------------------------------------------------------

void add_units(Pass& pass) {
  constexpr int kUnitTokens = 16;
  const OctavoRunner& r = pass.r;
  pass.units.assign(static_cast<size_t>(r.model.kv_groups), {});
  std::vector<bool> seen(static_cast<size_t>(r.model.kv_groups), false);
  for (const LayerState& layer : r.layers) {
    const auto group = static_cast<size_t>(layer.spec.kv_group);
    if (seen[group]) continue;
    seen[group] = true;
    for (size_t i = 0; i < pass.segments.size(); i++) {
      const Segment& segment = pass.segments[i];
      const int index = static_cast<int>(i);
      if (segment.rows > 1) {
        for (int row = 0; row < segment.rows; row += kUnitTokens)
          pass.units[group].push_back({index, row, std::min(kUnitTokens, segment.rows - row), -1});
        continue;
      }
      for (int block = first_visible(segment.start, layer.spec.window) / kBlockTokens;
           block <= segment.start / kBlockTokens; block++)
        pass.units[group].push_back({index, 0, 1, block});
    }
  }
}

void run_pass(Pass& pass) {
  OctavoRunner& r = pass.r;
  if (pass.rows == 0) return;
  int blocks = 0;
  for (Segment& segment : pass.segments) {
    if (segment.rows > 1) continue;
    segment.partial_block = blocks;
    blocks += segment.start / kBlockTokens + 1;
  }
  r.partial_out.grow(static_cast<size_t>(blocks) * static_cast<size_t>(r.mixed));
  r.partial_state.grow(static_cast<size_t>(blocks) * 2 * static_cast<size_t>(r.max_heads));
  const size_t targets = std::min<size_t>(pass.targeted.size(), kTargetRows);
  r.target_logits.grow(targets * static_cast<size_t>(r.model.vocab_size));
  add_units(pass);

  int size_class = 0;
  while (pass.rows >> (size_class + 1) && size_class < 15) size_class++;
  Governor& governor = r.governors[size_class];
  pass.threads = governor.choose(r.pool->threads());
  const auto begin = std::chrono::steady_clock::now();
  r.pool->run(pass.threads, [](void* p, int thread) { Worker(*static_cast<Pass*>(p), thread).run(); }, &pass);
  governor.report(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() / pass.rows);

  pass.rows = 0;
  pass.segments.clear();
  pass.segment_of.clear();
  pass.sampled.clear();
  pass.targeted.clear();
  for (std::atomic<int>& claim : pass.claims) claim.store(0);
}

void add_segment(Pass& pass, const OctavoChunk& chunk, int offset, int rows) {
  const int index = static_cast<int>(pass.segments.size());
  pass.segments.push_back({&chunk, pass.rows, rows, chunk.start + offset, 0});
  pass.segment_of.insert(pass.segment_of.end(), static_cast<size_t>(rows), index);
  if (chunk.targets)
    for (int i = 0; i < rows; i++)
      if (chunk.targets[offset + i] >= 0) pass.targeted.push_back({pass.rows + i, index, -1});
  const int first_kept = chunk.tokens - 1 - chunk.drafts;
  for (int i = std::max(0, first_kept - offset); chunk.sample && i < rows; i++) {
    Slot& slot = pass.r.slots[static_cast<size_t>(chunk.slot)];
    if (offset + i == first_kept) slot.logits_row = pass.r.logits_rows;
    pass.sampled.push_back({pass.rows + i, index, pass.r.logits_rows++});
  }
  pass.rows += rows;
}

}  // namespace

void forward(OctavoRunner& r, const OctavoChunk* chunks, int count) {
  r.logits_rows = 0;
  size_t kept = 0;
  for (int i = 0; i < count; i++) kept += chunks[i].sample ? static_cast<size_t>(chunks[i].drafts) + 1 : 0;
  r.logits.grow(kept * static_cast<size_t>(r.model.vocab_size));
  for (Slot& slot : r.slots) slot.logits_row = -1;
  Pass pass(r);
  for (int i = 0; i < count; i++) {
    for (int done = 0; done < chunks[i].tokens;) {
      const int rows = std::min(chunks[i].tokens - done, r.model.row_capacity - pass.rows);
      add_segment(pass, chunks[i], done, rows);
      done += rows;
      if (pass.rows == r.model.row_capacity) run_pass(pass);
    }
  }
  run_pass(pass);
}

}  // namespace octavo
