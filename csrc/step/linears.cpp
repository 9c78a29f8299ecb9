// Rows times a layer's weights.
#include "worker.h"

namespace octavo {

void Worker::multiply(const Matrix& w, Addend addend, int first, int last, float* y, int64_t stride) {
  k_.linear(w, x_, first, last, y, stride);
  if (p_.rank) raise(w, addend, first, last, y, stride);
}

void Worker::project(const Matrix& w, int linear, float* y, int64_t stride) {
  share_blocks(blocks_of(w), w.block_bytes,
               [&](int first, int last) { multiply(w, {linear, 0}, first, last, y, stride); });
}

void Worker::project_qkv(const LayerState& layer) {
  const OctavoLayer& spec = layer.spec;
  const Matrix* parts[] = {&spec.q, &spec.k, &spec.v};
  const int blocks = blocks_of(spec.q) + blocks_of(spec.k) + blocks_of(spec.v);
  share_blocks(blocks, spec.q.block_bytes, [&](int first, int last) {
    float* y = r_.qkv.data();
    int begin = 0;
    for (int i = 0; i < 3; i++) {
      const Matrix& w = *parts[i];
      const int end = begin + blocks_of(w), from = std::max(first, begin), to = std::min(last, end);
      if (from < to) multiply(w, {layer.linear + OCTAVO_Q + i, i}, from - begin, to - begin, y, r_.projected);
      begin = end;
      y += w.rows;
    }
  });
}

void Worker::feed_dense(const LayerState& layer, float* y) {
  const OctavoLayer& spec = layer.spec;
  float* h = r_.hidden.data();
  if (!spec.gate.blocks) {
    project(spec.up, layer.linear + OCTAVO_UP, h, r_.fed);
  } else {
    share_blocks(blocks_of(spec.up), spec.up.block_bytes, [&](int first, int last) {
      if (p_.rank) return gate_with_addends(layer, first, last);
      k_.gated(spec.gate, spec.up, x_, first, last, spec.activation, h, r_.fed);
    });
  }
  barrier();
  finish_ffn(layer);
  project(spec.down, layer.linear + OCTAVO_DOWN, y, r_.model.hidden_size);
  barrier();
}

}  // namespace octavo
