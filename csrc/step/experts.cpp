// A mixture of experts: the router's choice, rows gathered by expert, and the weighted sum of what they give. Sums go
// in the order of a row's own choice, so neither the batch nor the number of threads changes a bit.
#include <cmath>
#include <cstring>

#include "worker.h"

namespace octavo {
namespace {

// The `count` largest weights of the softmax of x [n], ties to the lowest index. x becomes the weights.
void choose(float* x, int n, int count, bool normalized, int32_t* chosen, float* weights) {
  float peak = x[0], total = 0.0f;
  for (int e = 1; e < n; e++) peak = x[e] > peak ? x[e] : peak;
  for (int e = 0; e < n; e++) total += x[e] = std::exp(x[e] - peak);
  float taken = 0.0f;
  for (int j = 0; j < count; j++) {
    int best = -1;
    for (int e = 0; e < n; e++) {
      bool free = best < 0 || x[e] > x[best];
      for (int i = 0; free && i < j; i++) free = chosen[i] != e;
      if (free) best = e;
    }
    chosen[j] = best;
    weights[j] = x[best] / total;
    taken += weights[j];
  }
  for (int j = 0; normalized && j < count; j++) weights[j] /= taken;
}

}  // namespace

// Every thread makes the whole plan for itself: that is less than waiting for a shared one.
void Worker::plan_experts(const OctavoLayer& spec) {
  ExpertPlan& plan = s_.plan;
  const int experts = spec.expert_count, each = spec.experts_per_token;
  const auto entries = static_cast<size_t>(p_.rows) * static_cast<size_t>(each);
  plan.chosen.resize(entries);
  plan.weights.resize(entries);
  plan.entries.resize(entries);
  plan.rows.resize(entries);
  plan.first.assign(static_cast<size_t>(experts) + 1, 0);
  plan.used.clear();
  std::vector<float> scores(static_cast<size_t>(experts));
  for (int row = 0; row < p_.rows; row++) {
    std::memcpy(scores.data(), r_.router_logits.data() + int64_t{row} * experts, scores.size() * sizeof(float));
    choose(scores.data(), experts, each, spec.normalized, plan.chosen.data() + int64_t{row} * each,
           plan.weights.data() + int64_t{row} * each);
  }
  for (int32_t expert : plan.chosen) plan.first[static_cast<size_t>(expert) + 1]++;
  for (int e = 0; e < experts; e++) {
    if (plan.first[static_cast<size_t>(e) + 1]) plan.used.push_back(e);
    plan.first[static_cast<size_t>(e) + 1] += plan.first[static_cast<size_t>(e)];
  }
  std::vector<int32_t> next(plan.first.begin(), plan.first.end() - 1);
  for (size_t i = 0; i < entries; i++) {
    plan.entries[i] = next[static_cast<size_t>(plan.chosen[i])]++;
    plan.rows[static_cast<size_t>(plan.entries[i])] = static_cast<int32_t>(i) / each;
  }
}

// Calls f(expert, first block, last block) for this thread's parts of one matrix of every expert in use.
template <class F> void Worker::share_experts(const Matrix& w, F f) {
  const int blocks = blocks_of(w);
  share_blocks(static_cast<int>(s_.plan.used.size()) * blocks, w.block_bytes, [&](int first, int last) {
    while (first < last) {
      const int begin = first % blocks, count = std::min(last - first, blocks - begin);
      f(s_.plan.used[static_cast<size_t>(first / blocks)], begin, begin + count);
      first += count;
    }
  });
}

// Calls f(expert, entry) for the entries this thread prepares.
template <class F> void Worker::each_entry(F f) {
  const int entries = static_cast<int>(s_.plan.rows.size());
  const Range range = alone_ ? Range{0, entries} : share(entries, thread_, p_.threads);
  for (int32_t expert : s_.plan.used) {
    const int begin = std::max(range.begin, s_.plan.first[static_cast<size_t>(expert)]);
    const int end = std::min(range.end, s_.plan.first[static_cast<size_t>(expert) + 1]);
    for (int entry = begin; entry < end; entry++) f(expert, entry);
  }
}

Activations Worker::expert_input(int expert, int columns, EncodingSet encodings) {
  const int first = s_.plan.first[static_cast<size_t>(expert)];
  const int rows = s_.plan.first[static_cast<size_t>(expert) + 1] - first;
  return (alone_ ? s_.expert_input : r_.expert_input).view(rows, columns, encodings, first);
}

void Worker::feed_experts(const LayerState& layer, const Norm& pre, float* y) {
  const OctavoLayer& spec = layer.spec;
  const ExpertPlan& plan = s_.plan;
  const int n = r_.model.hidden_size, fed = layer.experts[0].up.rows;
  const auto state = [&](int expert) -> const OctavoExpert& { return layer.experts[static_cast<size_t>(expert)]; };
  const auto first_of = [&](int expert) { return int64_t{plan.first[static_cast<size_t>(expert)]}; };

  share_blocks(blocks_of(spec.router), spec.router.block_bytes, [&](int first, int last) {
    k_.linear(spec.router, x_, first, last, r_.router_logits.data(), spec.expert_count);
  });
  barrier();
  plan_experts(spec);
  each_entry([&](int expert, int entry) {
    const float* x = residual(plan.rows[static_cast<size_t>(entry)]);
    if (pre.kind != OCTAVO_NO_NORM) {
      k_.norm(s_.row.data(), x, n, pre);
      x = s_.row.data();
    }
    k_.encode(expert_input(expert, n, layer.expert_in), entry - static_cast<int>(first_of(expert)), x,
              s_.values.data());
  });
  rows_ready();
  share_experts(layer.experts[0].up, [&](int expert, int first, int last) {
    k_.gated(state(expert).gate, state(expert).up, expert_input(expert, n, layer.expert_in), first, last,
             spec.activation, r_.hidden.data() + first_of(expert) * fed, fed);
  });
  barrier();
  each_entry([&](int expert, int entry) {
    k_.encode(expert_input(expert, fed, layer.ffn_out), entry - static_cast<int>(first_of(expert)),
              r_.hidden.data() + int64_t{entry} * fed, s_.values.data());
  });
  rows_ready();
  share_experts(layer.experts[0].down, [&](int expert, int first, int last) {
    k_.linear(state(expert).down, expert_input(expert, fed, layer.ffn_out), first, last,
              r_.expert_out.data() + first_of(expert) * n, n);
  });
  barrier();
  for (int row = mine_.begin; row < mine_.end; row++) {
    float* sum = y + int64_t{row} * n;
    std::memset(sum, 0, static_cast<size_t>(n) * sizeof(float));
    for (int i = row * spec.experts_per_token; i < (row + 1) * spec.experts_per_token; i++)
      k_.add_scaled(sum, r_.expert_out.data() + int64_t{plan.entries[static_cast<size_t>(i)]} * n,
                    plan.weights[static_cast<size_t>(i)], n);
  }
  rows_ready();
}

}  // namespace octavo
