// Activations in fp32 or bf16: loads widen, stores round to nearest, ties to even, as torch does.
#pragma once

#include <stdint.h>

#include "simd.h"

namespace cantata {
namespace {

typedef uint32_t BitVec __attribute__((vector_size(kLanes * 4)));

inline Vec load_wide(const float* from) { return load(from); }
inline Vec load_wide(const uint16_t* from) { return load_weights(from); }

inline uint16_t to_bfloat16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  if (value != value) return (uint16_t)(bits >> 16 | 0x40);
  return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline void store_rounded(float* to, float value) { *to = value; }
inline void store_rounded(uint16_t* to, float value) { *to = to_bfloat16(value); }

inline void store_rounded(float* to, Vec value) { store(to, value); }
inline void store_rounded(uint16_t* to, Vec value) {
  const BitVec bits = (BitVec)value;
  const BitVec rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  const HalfVec halves = __builtin_convertvector(value != value ? (bits >> 16 | 0x40) : rounded, HalfVec);
  __builtin_memcpy(to, &halves, sizeof halves);
}

inline void store_values(float* to, const float* values, long count) { __builtin_memcpy(to, values, count * sizeof(float)); }
inline void store_values(uint16_t* to, const float* values, long count) {
  long i = 0;
  for (; i + kLanes <= count; i += kLanes) store_rounded(to + i, load(values + i));
  for (; i < count; ++i) to[i] = to_bfloat16(values[i]);
}

// `exponential`, but 0 where e^x is below 1.2e-38, and so for minus infinity.
inline Vec exponential_or_zero(Vec x) { return x < -87.0f ? Vec{} : exponential(x); }
inline float exponential_or_zero(float x) { return exponential_or_zero(broadcast(x))[0]; }

}  // namespace
}  // namespace cantata
