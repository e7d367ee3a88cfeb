#include "scratch.h"

#include <stdio.h>
#include <stdlib.h>

namespace cantata {
namespace {

class Scratch {
 public:
  void* at_least(long bytes) {
    if (size_ < bytes) {
      free(memory_);
      size_ = (bytes + bytes / 4 + 4095) / 4096 * 4096;
      memory_ = aligned_alloc(64, size_);
      if (memory_ == nullptr) {
        fprintf(stderr, "cantata: no memory for %ld bytes of scratch\n", size_);
        abort();  // as an uncaught bad_alloc would
      }
    }
    return memory_;
  }
  ~Scratch() { free(memory_); }

 private:
  void* memory_ = nullptr;
  long size_ = 0;
};

thread_local Scratch of_thread, of_operation;

}  // namespace

void* thread_scratch(long bytes) { return of_thread.at_least(bytes); }

void* operation_scratch(long bytes) { return of_operation.at_least(bytes); }

}  // namespace cantata
