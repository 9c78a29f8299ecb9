#include "pool.h"

#include <system_error>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace octavo {
namespace {

constexpr int kBarrierSpins = 4000;
constexpr int kIdleSpins = 20000;  // about 0.3 ms: the host's time between two tokens

inline void pause() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

void Barrier::wait(int threads) {
  if (threads == 1) return;
  const int generation = generation_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    generation_.store(generation + 1, std::memory_order_release);
    return;
  }
  for (int i = 0; generation_.load(std::memory_order_acquire) == generation; i++) {
    if (i < kBarrierSpins) pause();
    else std::this_thread::yield();
  }
}

Pool::Pool(int threads) {
  workers_.reserve(static_cast<size_t>(threads - 1));
  try {
    for (int t = 1; t < threads; t++) workers_.emplace_back(&Pool::serve, this, t);
  } catch (const std::system_error&) {  // no more threads to be had: those that started serve
  }
}

Pool::~Pool() {
  stop_ = true;
  round_.fetch_add(1, std::memory_order_release);
  round_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void Pool::run(int threads, Work work, void* argument) {
  if (threads <= 1) return work(argument, 0);
  work_ = work;
  argument_ = argument;
  active_ = threads;
  busy_.store(this->threads() - 1, std::memory_order_relaxed);
  round_.fetch_add(1, std::memory_order_release);
  round_.notify_all();
  work(argument, 0);
  for (int i = 0; busy_.load(std::memory_order_acquire) != 0; i++) {
    if (i < kBarrierSpins) pause();
    else std::this_thread::yield();
  }
}

void Pool::serve(int thread) {
  uint32_t seen = 0;
  for (;;) {
    for (int i = 0; i < kIdleSpins && round_.load(std::memory_order_acquire) == seen; i++) pause();
    round_.wait(seen, std::memory_order_acquire);
    seen++;
    if (stop_) return;
    if (thread < active_) work_(argument_, thread);
    busy_.fetch_sub(1, std::memory_order_release);
  }
}

int Governor::choose(int most) {
  constexpr int kLookAgainAlone = 8, kLookAgainTogether = 32;
  one_ = false;
  probing_ = false;
  if (most == 1) return 1;
  const bool slow = together_ > 1.25 * best_;
  probing_ = single_ ? since_probe_ >= kLookAgainTogether : slow && since_probe_ >= kLookAgainAlone;
  one_ = single_ != probing_;
  return one_ ? 1 : most;
}

void Governor::report(double seconds) {
  if (one_) {
    alone_ = seconds;
  } else {
    together_ = together_ == 0 || single_ ? seconds : 0.75 * together_ + 0.25 * seconds;
    best_ = best_ == 0 || seconds < best_ ? seconds : best_ * 1.002;
  }
  since_probe_ = probing_ ? 0 : since_probe_ + 1;
  if (alone_ > 0 && together_ > 0) single_ = alone_ < 0.95 * together_;
}

}  // namespace octavo
