// Reads memory once as fast as it comes: what the kernels are measured against (benchmarks/cpu.py).
#pragma once

#include <stdint.h>

#include <atomic>

#include "ops.h"
#include "pool.h"
#include "simd.h"

namespace cantata {
namespace {

uint64_t read_through(const ReadArgs& args) {
  constexpr long kPiece = 1 << 16, kStep = 256, kVectorsOfStep = kStep / (long)sizeof(IntVec);
  std::atomic<uint64_t> total{0};
  auto body = [&](long begin, long end) {
    IntVec sums[4] = {};
    const long last = end * kPiece < args.num_bytes ? end * kPiece : args.num_bytes;
    for (long at = begin * kPiece; at + kStep <= last; at += kStep) {
      for (long ahead = 4096; ahead < 4096 + kStep; ahead += 64) __builtin_prefetch(args.memory + at + ahead);
#pragma GCC unroll 16
      for (long i = 0; i < kVectorsOfStep; ++i) {
        IntVec value;
        __builtin_memcpy(&value, args.memory + at + i * (long)sizeof value, sizeof value);
        sums[i % 4] ^= value;
      }
    }
    const IntVec all = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
    uint64_t folded = 0;
    for (int lane = 0; lane < kLanes; ++lane) folded ^= (uint32_t)all[lane];
    total.fetch_xor(folded);
  };
  const long pieces = (args.num_bytes + kPiece - 1) / kPiece;
  parallel_for(pieces, pieces / (16 * num_threads()), body);
  return total.load();
}

}  // namespace
}  // namespace cantata
