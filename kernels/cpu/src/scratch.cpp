#include "scratch.h"

#include <stdlib.h>

namespace cantata {
namespace {

struct Scratch {
  void* memory = nullptr;
  long size = 0;
  ~Scratch() { free(memory); }
};

thread_local Scratch scratch;

}  // namespace

void* thread_scratch(long bytes) {
  if (scratch.size < bytes) {
    free(scratch.memory);
    scratch.size = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    scratch.memory = aligned_alloc(64, scratch.size);
    if (scratch.memory == nullptr) abort();  // as an uncaught bad_alloc would
  }
  return scratch.memory;
}

}  // namespace cantata
