// How fast this machine reads memory: the ceiling of decoding, since a token reads every weight once.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <vector>

#include "buffer.h"
#include "octavo_cpu.h"
#include "pool.h"

namespace octavo {
namespace {

struct Job {
  const uint64_t* words;
  size_t count;
  int threads;
  std::atomic<uint64_t> total{0};  // keeps the compiler from dropping the reads
};

// Eight sums side by side and a prefetch as far ahead as the kernels' own.
void read_share(void* argument, int thread) {
  Job& job = *static_cast<Job*>(argument);
  constexpr size_t kLine = 8;
  const size_t lines = job.count / kLine, first = lines * static_cast<size_t>(thread) / static_cast<size_t>(job.threads);
  const size_t last = lines * static_cast<size_t>(thread + 1) / static_cast<size_t>(job.threads);
  uint64_t sums[kLine] = {};
  for (size_t i = first * kLine; i < last * kLine; i += kLine) {
    __builtin_prefetch(job.words + i + 256, 0, 3);
    for (size_t j = 0; j < kLine; j++) sums[j] += job.words[i + j];
  }
  for (uint64_t sum : sums) job.total += sum;
}

}  // namespace
}  // namespace octavo

using namespace octavo;

extern "C" int32_t octavo_read_bandwidth(int32_t threads, int64_t bytes, int32_t rounds, double* bytes_per_second) {
  try {
    Buffer<uint64_t> words(static_cast<size_t>(bytes) / sizeof(uint64_t));
    std::memset(words.data(), 1, words.bytes());  // or every page is the same zero page
    Pool pool(threads);
    for (int32_t round = 0; round < rounds; round++) {
      Job job{words.data(), words.bytes() / sizeof(uint64_t), pool.threads()};
      const auto begin = std::chrono::steady_clock::now();
      pool.run(pool.threads(), read_share, &job);
      const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - begin;
      bytes_per_second[round] = static_cast<double>(words.bytes()) / elapsed.count();
    }
    return OCTAVO_OK;
  } catch (const std::bad_alloc&) {
    return OCTAVO_OUT_OF_MEMORY;
  }
}
