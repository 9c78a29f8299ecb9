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
    join(spec.pre_mixer, layer.mixer_in);
    project_qkv(spec);
    barrier();
    attend(layer);
    barrier();
    finish_attention(layer);
    project(spec.o, r_.y.data(), r_.model.hidden_size);
    barrier();
    pending_[pending_count_++] = {r_.y.data(), &spec.post_mixer, spec.residual_multiplier};
    join(spec.pre_ffn, layer.ffn_in);
    project_ffn(spec);
    barrier();
    finish_ffn(layer);
    project(spec.down, r_.y.data(), r_.model.hidden_size);
    barrier();
    pending_[pending_count_++] = {r_.y.data(), &spec.post_ffn, spec.residual_multiplier};
  }
  score_sampled();
  score_targets();
}

void Worker::barrier() {
  if (thread_ == 0) p_.claims[(stage_ + 2) % 4].store(0, std::memory_order_relaxed);
  r_.barrier.wait(p_.threads);
  stage_++;
}

}  // namespace octavo
