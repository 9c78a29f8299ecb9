// Zeroed, 64-byte aligned memory with slack at its end, so that a vector load past the last element stays inside.
// Large buffers are touched only when used, and ask for huge pages where the system has them.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace octavo {

template <class T> class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t count) { reset(count); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Buffer() { std::free(memory_); }

  // Throws std::bad_alloc; the old contents are gone.
  void reset(size_t count) {
    std::free(memory_);
    bytes_ = 0;
    data_ = nullptr;
    memory_ = std::calloc(1, count * sizeof(T) + 2 * kAlignment);
    if (!memory_) throw std::bad_alloc();
    bytes_ = count * sizeof(T);
    const uintptr_t start = (reinterpret_cast<uintptr_t>(memory_) + kAlignment - 1) / kAlignment * kAlignment;
    data_ = reinterpret_cast<T*>(start);
#if defined(__linux__)
    constexpr uintptr_t kHugePage = 2 << 20;
    const uintptr_t first = (start + kHugePage - 1) / kHugePage * kHugePage;
    const uintptr_t last = (start + bytes_) / kHugePage * kHugePage;
    if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  }
  void grow(size_t count) {
    if (count * sizeof(T) > bytes_) reset(count + count / 2);
  }

  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](size_t i) { return data_[i]; }
  size_t bytes() const { return bytes_; }

 private:
  static constexpr uintptr_t kAlignment = 64;
  void swap(Buffer& other) {
    std::swap(memory_, other.memory_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }
  void* memory_ = nullptr;
  T* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace octavo
