// How an operation divides its scratch memory (scratch.h).
#pragma once

#include <stdint.h>

namespace cantata {
namespace {

inline long round_up(long number, long multiple) { return (number + multiple - 1) / multiple * multiple; }

// Parts of one piece of memory, each aligned to 64 bytes: laid out once without memory, to learn the size, and then in it.
class Layout {
 public:
  explicit Layout(void* memory) : start_(reinterpret_cast<uintptr_t>(memory)), next_(start_) {}

  template <typename Item>
  Item* take(long count) {
    const uintptr_t taken = next_;
    next_ += round_up(count * (long)sizeof(Item), 64);
    return reinterpret_cast<Item*>(taken);
  }
  long size() const { return (long)(next_ - start_); }

 private:
  const uintptr_t start_;
  uintptr_t next_;
};

}  // namespace
}  // namespace cantata
