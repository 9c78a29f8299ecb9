// The order of a pass's stages.
#include "worker.h"

namespace octavo {

Worker::Worker(Pass& pass, int thread)
    : p_(pass), r_(pass.r), k_(*pass.r.k), s_(pass.r.scratch[static_cast<size_t>(thread)]), thread_(thread),
      alone_(pass.rows == 1), mine_(alone_ ? Range{0, 1} : share(pass.rows, thread, pass.threads)) {}

void Worker::run() {
  embed();
  for (LayerState& layer : r_.layers) {
    const OctavoLayer& spec = layer.spec;
    join(spec.pre_mixer, layer.mixer_in, {layer.linear + OCTAVO_Q, 3});
    project_qkv(layer);
    barrier();
    attend(layer);
    barrier();
    finish_attention(layer);
    project(spec.o, layer.linear + OCTAVO_O, r_.y.data(), r_.model.hidden_size);
    barrier();
    const Pending mixed = {r_.y.data(), &spec.post_mixer, spec.residual_multiplier};
    if (!spec.parallel) pending_[pending_count_++] = mixed;
    feed(layer);
    if (spec.parallel) pending_[pending_count_++] = mixed;
    pending_[pending_count_++] = {fed_rows(layer), &spec.post_ffn, spec.residual_multiplier};
  }
  score_sampled();
  score_targets();
}

// Where a layer's MLP puts its rows [rows, hidden].
float* Worker::fed_rows(const LayerState& layer) {
  if (alone_ && !layer.experts.empty()) return s_.mixed.data();
  return layer.spec.parallel ? r_.y_ffn.data() : r_.y.data();
}

void Worker::feed(const LayerState& layer) {
  const OctavoLayer& spec = layer.spec;
  const bool shares_norm = spec.parallel && spec.pre_ffn.kind == OCTAVO_NO_NORM;
  const Norm& pre = shares_norm ? spec.pre_mixer : spec.pre_ffn;
  if (layer.experts.empty()) {
    const Linears linears = spec.gate.blocks ? Linears{OCTAVO_GATE, 2} : Linears{OCTAVO_UP, 1};
    join(pre, layer.ffn_in, {layer.linear + linears.first, linears.count});
    feed_dense(layer, fed_rows(layer));
  } else {
    join(pre, layer.ffn_in, {});
    feed_experts(layer, pre, fed_rows(layer));
  }
}

void Worker::barrier() {
  if (thread_ == 0) p_.claims[(stage_ + 2) % 4].store(0, std::memory_order_relaxed);
  r_.barrier.wait(p_.threads);
  stage_++;
}

}  // namespace octavo
