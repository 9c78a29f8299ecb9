// Builds a runner: copies the model's description, finds the widest rows and allocates everything a step needs.
#include "runner.h"

#include <algorithm>
#include <cmath>

#include "half.h"

namespace octavo {

void EncodedRows::reset(int rows, int columns, EncodingSet encodings) {
  for (int e = 0; e < kEncodings; e++) {
    if (!(encodings >> e & 1)) continue;
    const size_t padded = static_cast<size_t>(round_up(columns, kEncodingBlocks[e]));
    const size_t blocks = padded / static_cast<size_t>(kEncodingBlocks[e]);
    fixed_[e].values.reset(static_cast<size_t>(rows) * padded * static_cast<size_t>(kEncodingBytes[e]));
    fixed_[e].scales.reset(static_cast<size_t>(rows) * blocks);
    fixed_[e].negated_sums.reset(static_cast<size_t>(rows) * blocks);
    fixed_[e].totals.reset(static_cast<size_t>(rows) * blocks);
  }
  if (encodings & kPlain) plain_.reset(static_cast<size_t>(rows) * static_cast<size_t>(columns));
}

Activations EncodedRows::view(int rows, int columns, EncodingSet encodings, int first_row) {
  Activations a;
  a.rows = rows;
  a.columns = columns;
  for (int e = 0; e < kEncodings; e++) {
    if (!(encodings >> e & 1)) continue;
    const int padded = round_up(columns, kEncodingBlocks[e]);
    const int64_t values = int64_t{first_row} * padded, blocks = values / kEncodingBlocks[e];
    a.fixed[e] = {.block = kEncodingBlocks[e], .value_bytes = kEncodingBytes[e], .padded_columns = padded,
                  .values = fixed_[e].values.data() + values * kEncodingBytes[e], .scales = fixed_[e].scales.data() + blocks,
                  .negated_sums = fixed_[e].negated_sums.data() + blocks, .totals = fixed_[e].totals.data() + blocks};
  }
  if (encodings & kPlain) a.plain = plain_.data() + int64_t{first_row} * columns;
  return a;
}

size_t EncodedRows::bytes() const {
  size_t total = plain_.bytes();
  for (const Fixed& f : fixed_)
    total += f.values.bytes() + f.scales.bytes() + f.negated_sums.bytes() + f.totals.bytes();
  return total;
}

void open_runner(OctavoRunner& r, const OctavoModel& model) {
  r.k = kernels_of(model.isa);
  r.model = model;
  r.head_in = encodings_of(model.head);
  r.pairs = 0;
  for (int i = 0; i < model.rope_count; i++) {
    const OctavoRope& rope = model.ropes[i];
    r.frequencies.emplace_back(rope.inverse_frequencies, rope.inverse_frequencies + rope.pairs);
    r.ropes.push_back({r.frequencies.back().data(), rope.pairs, rope.attention_factor});
    r.pairs = std::max(r.pairs, rope.pairs);
  }

  r.projected = r.mixed = r.fed = r.max_heads = r.most_experts = 0;
  int widest_head = 0, widest_expert = 0, most_experts = 0;
  bool parallel = false;
  EncodingSet encodings = r.head_in, expert_encodings = 0;
  r.layers.resize(static_cast<size_t>(model.layer_count));
  for (int i = 0; i < model.layer_count; i++) {
    LayerState& layer = r.layers[static_cast<size_t>(i)];
    const OctavoLayer& spec = layer.spec = model.layers[i];
    layer.mixer_in = encodings_of(spec.q) | encodings_of(spec.k) | encodings_of(spec.v);
    layer.mixer_out = encodings_of(spec.o);
    layer.ffn_in = encodings_of(spec.gate) | encodings_of(spec.up) | encodings_of(spec.router);
    layer.ffn_out = encodings_of(spec.down);
    layer.expert_in = 0;
    layer.linear = i * OCTAVO_LINEARS;
    layer.experts.assign(spec.experts, spec.experts + spec.expert_count);
    for (const OctavoExpert& expert : layer.experts) {
      layer.expert_in |= encodings_of(expert.gate) | encodings_of(expert.up);
      layer.ffn_out |= encodings_of(expert.down);
      widest_expert = std::max(widest_expert, expert.up.rows);
    }
    if (spec.expert_count) expert_encodings |= layer.expert_in | layer.ffn_out;
    r.most_experts = std::max(r.most_experts, spec.experts_per_token);
    most_experts = std::max(most_experts, spec.expert_count);
    parallel = parallel || spec.parallel;
    encodings |= layer.mixer_in | layer.mixer_out | layer.ffn_in | layer.ffn_out | layer.expert_in;
    layer.head_values = int64_t{2} * kPageTokens * spec.head_dim;
    layer.page_values = layer.head_values * spec.kv_heads;
    layer.kv.reset(static_cast<size_t>(model.kv_pages[spec.kv_group] * layer.page_values));
    r.projected = std::max(r.projected, (spec.heads + 2 * spec.kv_heads) * spec.head_dim);
    r.mixed = std::max(r.mixed, spec.heads * spec.head_dim);
    r.fed = std::max(r.fed, spec.up.rows);
    r.max_heads = std::max(r.max_heads, spec.heads);
    widest_head = std::max(widest_head, spec.head_dim);
  }
  r.query_tile = 48;
  r.widest = std::max({model.hidden_size, r.projected, r.fed, widest_expert});

  const size_t rows = static_cast<size_t>(model.row_capacity), vocab = static_cast<size_t>(model.vocab_size);
  const size_t hidden = static_cast<size_t>(model.hidden_size), widest = static_cast<size_t>(r.widest);
  const size_t angles = r.ropes.size() * 2 * static_cast<size_t>(r.pairs);
  if (parallel) r.y_ffn.reset(rows * hidden);
  const size_t entries = rows * static_cast<size_t>(r.most_experts);
  const int expert_columns = std::max(model.hidden_size, widest_expert);
  if (entries) {
    r.router_logits.reset(rows * static_cast<size_t>(most_experts));
    r.expert_out.reset(entries * hidden);
    r.expert_input.reset(static_cast<int>(entries), expert_columns, expert_encodings);
  }
  r.x.reset(rows * hidden);
  r.y.reset(rows * hidden);
  r.qkv.reset(rows * static_cast<size_t>(r.projected));
  r.attended.reset(rows * static_cast<size_t>(r.mixed));
  r.hidden.reset(std::max(rows * static_cast<size_t>(r.fed), entries * static_cast<size_t>(widest_expert)));
  r.angles.reset(rows * angles);
  r.input.reset(std::max(model.row_capacity, kTargetRows), r.widest, encodings);
  r.logits.reset(static_cast<size_t>(model.max_slots) * vocab);

  r.scratch.resize(static_cast<size_t>(model.threads));
  const size_t tile = static_cast<size_t>(r.query_tile), head = static_cast<size_t>(widest_head);
  for (Scratch& s : r.scratch) {
    s.x.reset(hidden);
    s.row.reset(widest);
    s.queries.reset(std::max(widest, tile * head));
    s.angles.reset(angles);
    s.scores.reset(tile * kBlockTokens);
    s.block_out.reset(tile * head);
    s.out.reset(tile * head);
    s.block_state.reset(2 * tile);
    s.state.reset(2 * tile);
    s.first.reset(2 * tile);
    s.values.reset(widest + 64);
    s.input.reset(1, r.widest, encodings);
    if (!entries) continue;
    s.expert_input.reset(r.most_experts, expert_columns, expert_encodings);
    s.mixed.reset(hidden);
  }
  r.slots.resize(static_cast<size_t>(model.max_slots));
  r.sampling.resize(static_cast<size_t>(model.threads));
  r.pool = std::make_unique<Pool>(model.threads);
}

void dequantize_row(const Matrix& w, int lanes, int row, float* out) {
  const int lane = row % lanes;
  const uint8_t* block = w.blocks + static_cast<int64_t>(row / lanes) * w.block_bytes;
  const auto half = [](const void* p, int64_t i) { return static_cast<const uint16_t*>(p)[i]; };
  const auto single = [](const void* p, int64_t i) { return static_cast<const float*>(p)[i]; };
  if (w.codec <= OCTAVO_PLAIN_BF16) {
    for (int k = 0; k < w.columns; k++) {
      const int64_t at = int64_t{k} * lanes + lane;
      out[k] = w.codec == OCTAVO_PLAIN_F32   ? single(block, at)
               : w.codec == OCTAVO_PLAIN_F16 ? f16_to_f32(half(block, at))
                                             : bf16_to_f32(half(block, at));
    }
    return;
  }
  const BlockParts parts = parts_of(w, lanes);
  const uint8_t* codes = block + parts.codes;
  const bool minimum = w.codec == OCTAVO_U8_MIN || w.codec == OCTAVO_U4_MIN;
  const bool nibbles = w.codec == OCTAVO_U4 || w.codec == OCTAVO_U4_MIN || w.codec == OCTAVO_T4;
  const bool words = w.numbers == OCTAVO_NUMBERS_F9Z7;
  const int offset = !nibbles ? 128 : w.codec == OCTAVO_U4 ? 8 : 0;
  // a group's scale or minimum, exact
  const auto joint = [&](int k, bool zero) {
    const int word = half(block, int64_t{k / w.group} * lanes + lane);
    const float scale = std::ldexp(1.0f + (word & 15) / 16.0f, (word >> 4 & 31) - 22);
    return zero ? scale * (word >> 9) * -0.125f : scale;
  };
  const auto number = [&](int k, const uint8_t* groups, const uint8_t* shared) {
    const int64_t at = int64_t{k / w.group} * lanes + lane;
    if (w.numbers == OCTAVO_NUMBERS_F16) return f16_to_f32(half(groups, at));
    if (w.numbers == OCTAVO_NUMBERS_F32) return single(groups, at);
    const int whole = w.numbers == OCTAVO_NUMBERS_I8 ? static_cast<int8_t>(groups[at]) : groups[at];
    return static_cast<float>(whole) * f16_to_f32(half(shared, int64_t{k / 256} * lanes + lane));
  };
  for (int k = 0; k < w.columns; k++) {
    int code;
    if (nibbles) {  // column 2 p + l of 8 in nibble p of the 16-bit lane l
      const int p = k % 8 / 2, l = k % 2;
      const uint8_t byte = codes[(int64_t{k / 8} * lanes + lane) * 4 + l * 2 + p / 2];
      code = p % 2 ? byte >> 4 : byte & 15;
    } else {
      constexpr int order[4] = {0, 2, 1, 3};
      code = codes[(int64_t{k / 4} * lanes + lane) * 4 + order[k % 4]];
    }
    const float scale = words ? joint(k, false) : number(k, block, block + parts.shared);
    const float value = (w.table ? w.table->values[code] : static_cast<float>(code - offset)) * scale;
    if (!minimum) out[k] = value;
    else out[k] = value + (words ? joint(k, true) : number(k, block + parts.minimums, block + parts.shared_minimums));
  }
}

}  // namespace octavo
