// Rows of activations: embedding and angles, residual and norms, encoding for the matrices that come next.
#include <cmath>
#include <cstring>

#include "worker.h"

namespace octavo {

void Worker::embed() {
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

float* Worker::angles(int row) {
  return alone_ ? s_.angles.data()
                : r_.angles.data() + int64_t{row} * 2 * r_.pairs * static_cast<int64_t>(r_.ropes.size());
}

// Cosines and sines of every rope at a position. The angle is rounded to fp32 as the models were trained with.
void Worker::turn(int position, float* out) {
  for (size_t i = 0; i < r_.ropes.size(); i++, out += 2 * r_.pairs) {
    const OctavoRope& rope = r_.ropes[i];
    for (int j = 0; j < rope.pairs; j++) {
      const double angle = static_cast<float>(position) * rope.inverse_frequencies[j];
      out[j] = static_cast<float>(std::cos(angle)) * rope.attention_factor;
      out[r_.pairs + j] = static_cast<float>(std::sin(angle)) * rope.attention_factor;
    }
  }
}

// x += what the last sublayers gave for a row
void Worker::add_pending(float* x, int row) {
  const int n = r_.model.hidden_size;
  for (int i = 0; i < pending_count_; i++) {
    const float* y = pending_[i].y + int64_t{row} * n;
    if (pending_[i].post->kind != OCTAVO_NO_NORM) {
      k_.norm(s_.row.data(), y, n, *pending_[i].post);
      y = s_.row.data();
    }
    k_.add_scaled(x, y, pending_[i].multiplier, n);
  }
}

// Row `i` of a stage's input, and its products with the addends of the stage's linears.
void Worker::encode(int i, const Segment& segment, const float* x, const Norm* norm, Linears linears) {
  if (norm && norm->kind != OCTAVO_NO_NORM) {
    k_.norm(s_.row.data(), x, x_.columns, *norm);
    x = s_.row.data();
  }
  k_.encode(x_, i, x, s_.values.data());
  if (segment.adapter) lower(i, *segment.adapter, x, linears);
}

// The last sublayers' outputs join the residual, which becomes the next one's input.
void Worker::join(const Norm& pre, EncodingSet encodings, Linears linears) {
  x_ = input(p_.rows, r_.model.hidden_size, encodings);
  for (int row = mine_.begin; row < mine_.end; row++) {
    add_pending(residual(row), row);
    encode(row, segment_of(row), residual(row), &pre, linears);
  }
  pending_count_ = 0;
  rows_ready();
}

void Worker::finish_ffn(const LayerState& layer) {
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
    encode(row, segment_of(row), h, nullptr, {layer.linear + OCTAVO_DOWN, 1});
  }
  rows_ready();
}

}  // namespace octavo
