// Low-rank addends of adapters: y += (x a^T) b in fp32, for the rows whose slot has an adapter. x a^T is taken where
// a row is prepared, the rest by whoever has just computed the same part of y: no stage is added.
#include "worker.h"

namespace octavo {

const OctavoAdapter* Worker::adapter_of(int i) const {
  if (wanted_) return p_.segments[static_cast<size_t>((*wanted_)[static_cast<size_t>(i)].segment)].adapter;
  return segment_of(i).adapter;
}

float* Worker::lowered(int i, int place) {
  return (alone_ ? s_.lowered : r_.lowered).data() + (int64_t{i} * kLowered + place) * p_.rank;
}

void Worker::lower(int i, const OctavoAdapter& adapter, const float* x, Linears linears) {
  for (int place = 0; place < linears.count; place++) {
    const OctavoAddend& addend = adapter.addends[linears.first + place];
    float* out = lowered(i, place);
    for (int r = 0; r < addend.rank; r++) out[r] = k_.dot(addend.a + int64_t{r} * addend.columns, x, addend.columns);
  }
}

void Worker::raise(const Matrix& w, Addend which, int first, int last, float* y, int64_t stride) {
  const int begin = first * k_.lanes, end = std::min(last * k_.lanes, w.rows);
  for (int i = 0; i < x_.rows; i++) {
    const OctavoAdapter* adapter = adapter_of(i);
    if (!adapter) continue;
    const OctavoAddend& addend = adapter->addends[which.linear];
    const float* factors = lowered(i, which.place);
    for (int r = 0; r < addend.rank; r++)
      k_.add_scaled(y + i * stride + begin, addend.b + int64_t{r} * addend.rows + begin, factors[r], end - begin);
  }
}

// What Kernels::gated computes, to the bit, with addends to gate and up.
void Worker::gate_with_addends(const LayerState& layer, int first, int last) {
  const OctavoLayer& spec = layer.spec;
  float *gate = r_.hidden.data(), *up = r_.up.data();
  multiply(spec.gate, {layer.linear + OCTAVO_GATE, 0}, first, last, gate, r_.fed);
  multiply(spec.up, {layer.linear + OCTAVO_UP, 1}, first, last, up, r_.fed);
  const int begin = first * k_.lanes, end = std::min(last * k_.lanes, spec.up.rows);
  for (int i = 0; i < x_.rows && begin < end; i++) {
    const int64_t place = int64_t{i} * r_.fed + begin;
    k_.gate(gate + place, up + place, end - begin, spec.activation);
  }
}

}  // namespace octavo
