// The sampling law of docs/sampling.md: what a slot remembers, and how a row of logits becomes a token.
#include <algorithm>
#include <cmath>

#include "runner.h"

namespace octavo {
namespace {

constexpr float kGreedyBelow = 1e-5f;

// Best first: larger logits, equal ones by lowest id.
bool better(const std::pair<float, int32_t>& a, const std::pair<float, int32_t>& b) {
  return a.first > b.first || (a.first == b.first && a.second < b.second);
}

// The `count` best entries of x that are not -inf, best first. Ids come in ascending order, so a value equal to
// the worst one kept never displaces it.
void best_first(const Kernels& k, const float* x, int n, int count, std::vector<std::pair<float, int32_t>>& out) {
  constexpr int kHeap = 1024;  // above it, sorting everything is cheaper than a heap
  out.clear();
  if (count > kHeap) {
    for (int i = k.next_above(x, 0, n, -INFINITY); i < n; i = k.next_above(x, i + 1, n, -INFINITY))
      out.emplace_back(x[i], i);
    const auto kept = std::min(static_cast<size_t>(count), out.size());
    std::partial_sort(out.begin(), out.begin() + static_cast<std::ptrdiff_t>(kept), out.end(), better);
    out.resize(kept);
    return;
  }
  float limit = -INFINITY;
  for (int i = k.next_above(x, 0, n, limit); i < n; i = k.next_above(x, i + 1, n, limit)) {
    if (out.size() == static_cast<size_t>(count)) {
      std::pop_heap(out.begin(), out.end(), better);
      out.pop_back();
    }
    out.emplace_back(x[i], i);
    std::push_heap(out.begin(), out.end(), better);
    if (out.size() == static_cast<size_t>(count)) limit = out.front().first;
  }
  std::sort(out.begin(), out.end(), better);
}

void penalize(const Slot& slot, float* x, int32_t vocab_size) {
  const OctavoSampling& s = slot.sampling;
  const auto repeat = [&](int32_t id) { x[id] = x[id] > 0 ? x[id] / s.repetition_penalty : x[id] * s.repetition_penalty; };
  if (s.repetition_penalty != 1.0f) {
    for (int32_t id = 0; id < vocab_size; id++)
      if (slot.in_prompt[static_cast<size_t>(id)]) repeat(id);
    for (const auto& [id, times] : slot.generated)
      if (!slot.in_prompt[static_cast<size_t>(id)]) repeat(id);
  }
  for (const auto& [id, times] : slot.generated)
    x[id] = (x[id] - s.frequency_penalty * static_cast<float>(times)) - s.presence_penalty;
}

void apply_mask(const uint32_t* mask, float* x, int32_t vocab_size) {
  for (int32_t i = 0; i < vocab_size; i++)
    if (!(mask[i / 32] >> (i % 32) & 1)) x[i] = -INFINITY;
}

// Top-k, then top-p: ids and tempered values of what is left, ascending by id.
void keep(const Kernels& k, const OctavoSampling& s, const float* x, const float* y, int32_t vocab_size,
          SamplingScratch& scratch) {
  const bool by_count = s.top_k > 0 && s.top_k < vocab_size, by_mass = s.top_p < 1.0f;
  int count = by_count ? s.top_k : by_mass ? std::min(64, vocab_size) : vocab_size;
  double enough = 0;
  for (;;) {
    best_first(k, x, vocab_size, count, scratch.best);
    if (!by_mass) break;
    double total = 0;
    if (by_count) {
      for (const auto& [value, id] : scratch.best) total += std::exp(static_cast<double>(y[id]));
    } else {
      total = k.mass(y, vocab_size, 0.0f);
    }
    enough = total * static_cast<double>(s.top_p);
    double sum = 0;
    size_t kept = 0;
    while (kept < scratch.best.size() && sum < enough) sum += std::exp(static_cast<double>(y[scratch.best[kept++].second]));
    if (sum >= enough || by_count || count == vocab_size) {
      scratch.best.resize(std::max<size_t>(kept, 1));
      break;
    }
    count = std::min(count * 16, vocab_size);
  }
  scratch.ids.clear();
  for (const auto& [value, id] : scratch.best) scratch.ids.push_back(id);
  std::sort(scratch.ids.begin(), scratch.ids.end());
}

}  // namespace

bool has_penalties(const OctavoSampling& s) {
  return s.repetition_penalty != 1.0f || s.frequency_penalty != 0.0f || s.presence_penalty != 0.0f;
}

void start_slot(Slot& slot, const OctavoSampling& sampling, int32_t vocab_size, const int32_t* token_ids,
                int32_t tokens, int32_t prompt_tokens) {
  slot = Slot{};
  slot.open = true;
  slot.sampling = sampling;
  slot.bias_ids.assign(sampling.bias_ids, sampling.bias_ids + sampling.bias_count);
  slot.bias_values.assign(sampling.bias_values, sampling.bias_values + sampling.bias_count);
  slot.tokens = tokens;
  slot.last_token = tokens > 0 ? token_ids[tokens - 1] : 0;
  if (!has_penalties(sampling)) return;
  slot.in_prompt.assign(static_cast<size_t>(vocab_size), false);
  for (int i = 0; i < prompt_tokens; i++) slot.in_prompt[static_cast<size_t>(token_ids[i])] = true;
  for (int i = prompt_tokens; i < tokens; i++) slot.generated[token_ids[i]]++;
}

void count_token(Slot& slot, int32_t token_id) {
  slot.last_token = token_id;
  slot.tokens++;
  if (!slot.in_prompt.empty()) slot.generated[token_id]++;
}

int32_t sample_token(const Kernels& k, const Slot& slot, const float* logits, int32_t vocab_size,
                     const uint32_t* mask, SamplingScratch& scratch) {
  const OctavoSampling& s = slot.sampling;
  const auto vocab = static_cast<size_t>(vocab_size);
  int32_t best = 0;
  float peak = k.argmax(logits, vocab_size, &best);
  if (std::isnan(peak)) return -1;
  if (has_penalties(s) || !slot.bias_ids.empty() || mask) {
    scratch.shaped.assign(logits, logits + vocab);
    float* x = scratch.shaped.data();
    if (has_penalties(s)) penalize(slot, x, vocab_size);
    for (size_t i = 0; i < slot.bias_ids.size(); i++) x[slot.bias_ids[i]] += slot.bias_values[i];
    if (mask) apply_mask(mask, x, vocab_size);
    peak = k.argmax(x, vocab_size, &best);
    if (std::isnan(peak)) return -1;
    logits = x;
  }
  if (s.temperature < kGreedyBelow) return best;

  scratch.tempered.resize(vocab);
  float* y = scratch.tempered.data();
  k.temper(y, logits, vocab_size, peak, s.temperature);
  const Noise noise = {static_cast<uint32_t>(s.seed), static_cast<uint32_t>(s.seed >> 32), s.choice,
                       static_cast<uint32_t>(slot.tokens)};
  const float least = s.min_p > 0 ? static_cast<float>(std::log(s.min_p)) : -INFINITY;
  if ((s.top_k > 0 && s.top_k < vocab_size) || s.top_p < 1) {
    keep(k, s, logits, y, vocab_size, scratch);
    std::erase_if(scratch.ids, [&](int32_t id) { return y[id] < least; });
    scratch.values.clear();
    for (int32_t id : scratch.ids) scratch.values.push_back(y[id]);
    return k.draw_among(scratch.ids.data(), scratch.values.data(), static_cast<int>(scratch.ids.size()), noise);
  }
  if (s.min_p > 0)
    for (size_t i = 0; i < vocab; i++)
      if (y[i] < least) y[i] = -INFINITY;
  return k.draw(y, vocab_size, noise);
}

void token_logprob(const Kernels& k, const float* logits, int32_t vocab_size, int32_t token_id, int32_t row,
                   const OctavoLogprobs& out, SamplingScratch& scratch) {
  if (!out.logprobs) return;
  int32_t best = 0;
  const float peak = k.argmax(logits, vocab_size, &best);
  const double log_total = std::isnan(peak) ? NAN : static_cast<double>(peak) + std::log(k.mass(logits, vocab_size, peak));
  const auto at = [&](int32_t id) { return static_cast<float>(static_cast<double>(logits[id]) - log_total); };
  out.logprobs[row] = at(token_id);
  if (out.top == 0) return;
  best_first(k, logits, vocab_size, out.top, scratch.best);
  for (int32_t i = 0; i < out.top; i++) {  // fewer than `top` where logits are -inf: id -1
    const bool there = static_cast<size_t>(i) < scratch.best.size();
    const int32_t id = there ? scratch.best[static_cast<size_t>(i)].second : -1;
    out.top_ids[int64_t{row} * out.top + i] = id;
    out.top_logprobs[int64_t{row} * out.top + i] = there ? at(id) : -INFINITY;
  }
}

void sample_slot(const Kernels& k, Slot& slot, const float* logits, int32_t vocab_size, OctavoSample& sample,
                 SamplingScratch& scratch) {
  sample.tokens = 0;
  for (bool expected = true; expected && sample.tokens <= sample.drafts; logits += vocab_size) {
    const int32_t row = sample.tokens++;
    int32_t token = sample_token(k, slot, sample.logits ? sample.logits : logits, vocab_size, sample.mask, scratch);
    int32_t best;  // the model's own row must be finite too
    if (sample.logits && std::isnan(k.argmax(logits, vocab_size, &best))) token = -1;
    sample.token_ids[row] = token;
    if (token < 0) return;
    token_logprob(k, logits, vocab_size, token, row, sample.logprobs, scratch);
    count_token(slot, token);
    expected = row < sample.drafts && token == sample.draft_ids[row];
  }
}

void sample(OctavoRunner& r, OctavoSample* samples, int count) {
  struct Job {
    OctavoRunner& r;
    OctavoSample* samples;
    int count, threads;
  } job = {r, samples, count, std::min(count, r.pool->threads())};
  const auto work = [](void* argument, int thread) {
    const Job& job = *static_cast<Job*>(argument);
    const int32_t vocab = job.r.model.vocab_size;
    SamplingScratch& scratch = job.r.sampling[static_cast<size_t>(thread)];
    for (int i = thread; i < job.count; i += job.threads) {
      OctavoSample& sample = job.samples[i];
      Slot& slot = job.r.slots[static_cast<size_t>(sample.slot)];
      sample_slot(*job.r.k, slot, job.r.logits.data() + int64_t{slot.logits_row} * vocab, vocab, sample, scratch);
    }
  };
  r.pool->run(job.threads, work, &job);
}

}  // namespace octavo
