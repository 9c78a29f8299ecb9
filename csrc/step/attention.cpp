// Attention: a single row goes over blocks of keys in parallel, joined in order afterwards; several rows of a segment
// go in tiles over all they see. Both add up the same numbers in the same order.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "worker.h"

namespace octavo {

// Norms and rotation of a row's queries and keys, in place.
void Worker::finish_qk(const OctavoLayer& spec, float* q, float* k, const float* row_angles) {
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

uint16_t* Worker::page_of(LayerState& layer, const Segment& segment, int page, int kv_head) const {
  const int32_t index = segment.chunk->page_tables[layer.spec.kv_group][page];
  if (index < 0) return nullptr;  // behind the window: never looked at
  return layer.kv.data() + index * layer.page_values + kv_head * layer.head_values;
}

void Worker::store(LayerState& layer, const Segment& segment, int position, int kv_head, const float* k,
                   const float* v) {
  const int dim = layer.spec.head_dim;
  k_.store_kv(page_of(layer, segment, position / kPageTokens, kv_head), k + kv_head * dim, v + kv_head * dim,
              position % kPageTokens, dim);
}

// Every thread finishes the single row's queries for itself; whoever takes the last block of a head stores its key.
// What a thread has of a head from its first block on, it joins at once: fewer partials for all to read.
void Worker::attend_alone(LayerState& layer) {
  const OctavoLayer& spec = layer.spec;
  const int q_size = spec.heads * spec.head_dim, k_size = spec.kv_heads * spec.head_dim;
  const std::vector<AttendUnit>& units = p_.units[static_cast<size_t>(spec.kv_group)];
  const int blocks = static_cast<int>(units.size()), group = spec.heads / spec.kv_heads;
  const Segment& segment = p_.segments[0];
  float* q = s_.queries.data();
  std::memcpy(q, r_.qkv.data(), static_cast<size_t>(q_size + k_size) * sizeof(float));
  finish_qk(spec, q, q + q_size, angles(0));
  const Range range = share(blocks * spec.kv_heads, thread_, p_.threads);
  for (int i = range.begin; i < range.end; i++) {
    const int kv_head = i / blocks;
    if (i % blocks == blocks - 1)
      store(layer, segment, segment.start, kv_head, q + q_size, r_.qkv.data() + q_size + k_size);
    const int block = units[static_cast<size_t>(i % blocks)].block;
    attend_single(layer, segment, block, kv_head, q);
    if (i % blocks && i - i % blocks >= range.begin)
      for (int h = kv_head * group; h < (kv_head + 1) * group; h++) {
        const Partial joined = partial(spec, segment, units[0].block, h);
        merge(spec, joined.out, joined.peak, joined.mass, partial(spec, segment, block, h));
      }
  }
}

// How many blocks of a KV head of a single row `attend_alone` has joined into the first.
int Worker::blocks_joined(const OctavoLayer& spec, int blocks, int kv_head) const {
  for (int thread = 0; thread < p_.threads; thread++) {
    const Range range = share(blocks * spec.kv_heads, thread, p_.threads);
    if (range.end > kv_head * blocks) return std::min(blocks, range.end - kv_head * blocks);
  }
  return 1;
}

Worker::Partial Worker::partial(const OctavoLayer& spec, const Segment& segment, int block, int head) const {
  const int64_t place = int64_t{segment.partial_block} + block;
  float* state = r_.partial_state.data() + place * 2 * r_.max_heads + head;
  return {r_.partial_out.data() + place * r_.mixed + head * spec.head_dim, state, state + r_.max_heads};
}

void Worker::merge(const OctavoLayer& spec, float* out, float* peak, float* mass, const Partial& next) const {
  k_.merge(out, peak, mass, next.out, *next.peak, *next.mass, spec.head_dim);
}

void Worker::attend(LayerState& layer) {
  if (alone_) return attend_alone(layer);
  const OctavoLayer& spec = layer.spec;
  const int q_size = spec.heads * spec.head_dim, k_size = spec.kv_heads * spec.head_dim;
  const std::vector<AttendUnit>& units = p_.units[static_cast<size_t>(spec.kv_group)];
  const int count = static_cast<int>(units.size()) * spec.kv_heads;
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

void Worker::find_pages(LayerState& layer, const Segment& segment, int block, int last_position, int kv_head,
                        const uint16_t** pages) const {
  for (int i = 0; i < 2 * kBlockPages; i++) {
    const int page = block * kBlockPages + i;
    pages[i] = page <= last_position / kPageTokens ? page_of(layer, segment, page, kv_head) : nullptr;
  }
}

// A single row's queries of one KV head against one block, into the partials.
void Worker::attend_single(LayerState& layer, const Segment& segment, int block, int kv_head, const float* q) {
  const OctavoLayer& spec = layer.spec;
  const int group = spec.heads / spec.kv_heads, dim = spec.head_dim, position = segment.start;
  const uint16_t* pages[2 * kBlockPages];
  find_pages(layer, segment, block, position, kv_head, pages);
  const int base = block * kBlockTokens;
  const int32_t from = std::max(first_visible(position, spec.window) - base, 0);
  const int32_t to = std::min(position + 1 - base, kBlockTokens);
  const int head = kv_head * group;
  for (int done = 0; done < group; done += r_.query_tile) {
    const int rows = std::min(group - done, r_.query_tile);
    int32_t* first = s_.first.data();
    for (int i = 0; i < rows; i++) first[i] = from, first[r_.query_tile + i] = to;
    const Partial target = partial(spec, segment, block, head + done);
    k_.attend({.queries = q + (head + done) * dim, .query_stride = dim, .rows = rows, .first = first,
               .last = first + r_.query_tile, .pages = pages, .head_dim = dim, .scale = spec.score_scale,
               .softcap = spec.score_softcap, .scores = s_.scores.data(),
               .out = target.out, .out_stride = dim, .peak = target.peak, .mass = target.mass});
  }
}

// Several rows of a segment against all the keys they see, block after block.
void Worker::attend_tiles(LayerState& layer, const Segment& segment, const AttendUnit& unit, int kv_head) {
  const OctavoLayer& spec = layer.spec;
  const int group = spec.heads / spec.kv_heads;
  const int tokens = std::max(1, r_.query_tile / group), heads = std::min(group, r_.query_tile);
  for (int row = unit.first_row; row < unit.first_row + unit.rows; row += tokens)
    for (int head = 0; head < group; head += heads)
      attend_tile(layer, segment, row, std::min(tokens, unit.first_row + unit.rows - row), kv_head,
                  kv_head * group + head, std::min(heads, group - head));
}

void Worker::attend_tile(LayerState& layer, const Segment& segment, int first_row, int tokens, int kv_head, int head,
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
void Worker::finish_attention(const LayerState& layer) {
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
    encode(row, segment, x, nullptr, {layer.linear + OCTAVO_O, 1});
  }
  rows_ready();
}

void Worker::join_blocks(const OctavoLayer& spec, const Segment& segment, int head, float* out) {
  float peak = -INFINITY, mass = 0.0f;
  const int first = first_visible(segment.start, spec.window) / kBlockTokens, last = segment.start / kBlockTokens;
  merge(spec, out, &peak, &mass, partial(spec, segment, first, head));
  const int joined = alone_ ? blocks_joined(spec, last + 1 - first, head / (spec.heads / spec.kv_heads)) : 1;
  for (int block = first + joined; block <= last; block++)
    merge(spec, out, &peak, &mass, partial(spec, segment, block, head));
  k_.scale(out, 1.0f / mass, spec.head_dim);
}

}  // namespace octavo
