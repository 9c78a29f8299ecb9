// The exported functions of octavo_cpu.h. No exception leaves them.
#include <cstring>
#include <new>

#include "runner.h"

namespace octavo {

const Kernels* kernels_of(int isa) {
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_cpu_init();
  if (isa == OCTAVO_AVX512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"))
    return &kAvx512Kernels;
  if (isa == OCTAVO_AVX2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    return &kAvx2Kernels;
#endif
  return isa == OCTAVO_PORTABLE ? &kPortableKernels : nullptr;
}

namespace {

template <class F> int32_t guarded(F f) {
  try {
    f();
    return OCTAVO_OK;
  } catch (const std::bad_alloc&) {
    return OCTAVO_OUT_OF_MEMORY;
  }
}

}  // namespace
}  // namespace octavo

using namespace octavo;

extern "C" {

void octavo_abi(int32_t* out) {
  const size_t sizes[] = {sizeof(OctavoTable), sizeof(OctavoMatrix), sizeof(OctavoNorm),     sizeof(OctavoExpert),   sizeof(OctavoLayer),
                          sizeof(OctavoRope),   sizeof(OctavoModel),    sizeof(OctavoAddend),   sizeof(OctavoAdapter),
                          sizeof(OctavoSampling), sizeof(OctavoLogprobs), sizeof(OctavoChunk),  sizeof(OctavoSample)};
  *out++ = OCTAVO_ABI;
  for (size_t size : sizes) *out++ = static_cast<int32_t>(size);
}

int32_t octavo_isa_supported(int32_t isa) { return kernels_of(isa) != nullptr; }

int32_t octavo_isa_lanes(int32_t isa) { return isa == OCTAVO_AVX512 ? 16 : 8; }

OctavoRunner* octavo_open(const OctavoModel* model) {
  OctavoRunner* runner = nullptr;
  const int32_t status = guarded([&] {
    auto made = std::make_unique<OctavoRunner>();
    open_runner(*made, *model);
    runner = made.release();
  });
  return status == OCTAVO_OK ? runner : nullptr;
}

void octavo_close(OctavoRunner* runner) { delete runner; }

void octavo_memory(const OctavoRunner* r, int64_t* kv_bytes, int64_t* activation_bytes) {
  size_t kv = 0, activations = r->x.bytes() + r->y.bytes() + r->qkv.bytes() + r->attended.bytes() +
                               r->hidden.bytes() + r->angles.bytes() + r->logits.bytes() +
                               r->target_logits.bytes() + r->partial_out.bytes() + r->partial_state.bytes() +
                               r->input.bytes() + r->y_ffn.bytes() + r->router_logits.bytes() +
                               r->expert_out.bytes() + r->expert_input.bytes() + r->lowered.bytes() + r->up.bytes();
  for (const LayerState& layer : r->layers) kv += layer.kv.bytes();
  for (const Scratch& s : r->scratch)
    activations += s.x.bytes() + s.row.bytes() + s.queries.bytes() + s.angles.bytes() + s.scores.bytes() +
                   s.block_out.bytes() + s.out.bytes() + s.block_state.bytes() + s.state.bytes() + s.first.bytes() +
                   s.values.bytes() + s.input.bytes() + s.expert_input.bytes() + s.mixed.bytes() + s.lowered.bytes();
  *kv_bytes = static_cast<int64_t>(kv);
  *activation_bytes = static_cast<int64_t>(activations);
}

int32_t octavo_open_slot(OctavoRunner* runner, int32_t slot, const OctavoSampling* sampling, const int32_t* token_ids,
                         int32_t tokens, int32_t prompt_tokens, const OctavoAdapter* adapter) {
  return guarded([&] {
    Slot& opened = runner->slots[static_cast<size_t>(slot)];
    start_slot(opened, *sampling, runner->model.vocab_size, token_ids, tokens, prompt_tokens);
    opened.adapter = adapter;
  });
}

void octavo_close_slot(OctavoRunner* runner, int32_t slot) { runner->slots[static_cast<size_t>(slot)] = Slot{}; }

int32_t octavo_forward(OctavoRunner* runner, const OctavoChunk* chunks, int32_t count) {
  return guarded([&] { forward(*runner, chunks, count); });
}

const float* octavo_logits(const OctavoRunner* runner, int32_t slot) {
  return runner->logits.data() +
         int64_t{runner->slots[static_cast<size_t>(slot)].logits_row} * runner->model.vocab_size;
}

int32_t octavo_sample(OctavoRunner* runner, OctavoSample* samples, int32_t count) {
  return guarded([&] { sample(*runner, samples, count); });
}

int32_t octavo_test_linear(int32_t isa, const OctavoMatrix* w, const float* x, int32_t rows, float* y) {
  return guarded([&] {
    const Kernels& k = *kernels_of(isa);
    EncodedRows encoded;
    encoded.reset(rows, w->columns, encodings_of(*w));
    const Activations a = encoded.view(rows, w->columns, encodings_of(*w));
    Buffer<int16_t> scratch(static_cast<size_t>(w->columns) + 64);
    for (int32_t t = 0; t < rows; t++) k.encode(a, t, x + int64_t{t} * w->columns, scratch.data());
    k.linear(*w, a, 0, (w->rows + k.lanes - 1) / k.lanes, y, w->rows);
  });
}

int32_t octavo_test_row(int32_t isa, const OctavoMatrix* w, int32_t row, float* out) {
  return guarded([&] { dequantize_row(*w, kernels_of(isa)->lanes, row, out); });
}

void octavo_test_norm(int32_t isa, const OctavoNorm* norm, const float* x, int32_t n, float* out) {
  kernels_of(isa)->norm(out, x, n, *norm);
}

void octavo_test_activate(int32_t isa, float* x, int32_t n, int32_t activation) {
  kernels_of(isa)->activate(x, n, activation);
}

int32_t octavo_test_sample(int32_t isa, const OctavoSampling* sampling, const float* logits, int32_t vocab,
                           const int32_t* token_ids, int32_t tokens, int32_t prompt_tokens, OctavoSample* sample) {
  return guarded([&] {
    const Kernels& k = *kernels_of(isa);
    Slot slot;
    SamplingScratch scratch;
    start_slot(slot, *sampling, vocab, token_ids, tokens, prompt_tokens);
    sample_slot(k, slot, logits, vocab, *sample, scratch);
  });
}

}  // extern "C"
