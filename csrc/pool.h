// Threads that stay with a runner: they spin for a moment between steps, then sleep. The caller is thread 0.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace octavo {

// All threads of a step meet here many times. A waiter spins briefly, then yields its core on every look: where
// another process holds a core, spinning out a time slice would stop the very thread that is waited for.
class Barrier {
 public:
  void wait(int threads);

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> generation_{0};
};

class Pool {
 public:
  using Work = void (*)(void* argument, int thread);

  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // Calls work(argument, t) for t < threads, each on its own thread, and waits for all.
  void run(int threads, Work work, void* argument);
  int threads() const { return static_cast<int>(workers_.size()) + 1; }

 private:
  void serve(int thread);

  alignas(64) std::atomic<uint32_t> round_{0};
  alignas(64) std::atomic<int> busy_{0};
  Work work_ = nullptr;
  void* argument_ = nullptr;
  int active_ = 1;
  bool stop_ = false;
  std::vector<std::thread> workers_;
};

// How many threads the next step of a kind should use. Where another process takes a core, two threads are slower
// than one, since every barrier waits for a time slice. So: all threads while they are near their best; when they
// are not, compare with one thread; on one thread, try all of them again now and then. Results never depend on it.
class Governor {
 public:
  int choose(int most);
  void report(double seconds);

 private:
  double alone_ = 0, together_ = 0;  // seconds a step, 0: not known
  double best_ = 0;                  // of all threads, forgotten slowly as contexts grow
  int since_probe_ = 0;
  bool single_ = false, probing_ = false, one_ = false;
};

}  // namespace octavo
