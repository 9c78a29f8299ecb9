// Rows times a layer's weights.
#include <algorithm>

#include "worker.h"

namespace octavo {

void Worker::project(const Matrix& w, float* y, int64_t stride) {
  share_blocks(blocks_of(w), w.block_bytes, [&](int first, int last) { k_.linear(w, x_, first, last, y, stride); });
}

void Worker::project_qkv(const OctavoLayer& spec) {
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

void Worker::project_ffn(const OctavoLayer& spec) {
  float* h = r_.hidden.data();
  if (!spec.gate.blocks) return project(spec.up, h, r_.fed);
  share_blocks(blocks_of(spec.up), spec.up.block_bytes, [&](int first, int last) {
    k_.gated(spec.gate, spec.up, x_, first, last, spec.activation, h, r_.fed);
  });
}

}  // namespace octavo
