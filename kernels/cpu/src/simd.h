// Vectors of the instruction set at hand (isa.h).
#pragma once

#include <stdint.h>

#include "isa.h"

namespace cantata {
namespace {

#if CANTATA_ISA == 2
constexpr int kLanes = 16;
#elif CANTATA_ISA == 1
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

constexpr bool kManyRegisters = CANTATA_ISA >= 2;  // 32 vectors rather than 16

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HalfVec __attribute__((vector_size(kLanes * 2)));

inline Vec load(const float* from) {
  Vec value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

inline void store(float* to, Vec value) { __builtin_memcpy(to, &value, sizeof value); }

inline Vec broadcast(float value) { return value - Vec{}; }  // minus keeps the sign of zero

inline Vec load_weights(const float* from) { return load(from); }

// bf16 is the upper half of an fp32.
inline Vec load_weights(const uint16_t* from) {
  HalfVec halves;
  __builtin_memcpy(&halves, from, sizeof halves);
  return (Vec)(__builtin_convertvector(halves, IntVec) << 16);
}

inline float widen(float value) { return value; }

inline float widen(uint16_t value) {
  const uint32_t bits = (uint32_t)value << 16;
  float wide;
  __builtin_memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// The lanes from first to last: the order of a sum is part of the result.
inline float sum(Vec value) {
  float total = value[0];
  for (int lane = 1; lane < kLanes; ++lane) total += value[lane];
  return total;
}

// 2^(code - 127) for kLanes scale codes; code 0 is the subnormal 2^-127.
inline Vec scales(const uint8_t* codes) {
#if CANTATA_ISA == 2  // GCC widens vectors of bytes one by one
  const IntVec bytes = (IntVec)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)codes));
#elif CANTATA_ISA == 1
  const IntVec bytes = (IntVec)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)codes));
#elif CANTATA_ISA == 3
  uint32_t four;
  __builtin_memcpy(&four, codes, sizeof four);
  const IntVec bytes = (IntVec)vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four))));
#else
  IntVec bytes;
  for (int lane = 0; lane < kLanes; ++lane) bytes[lane] = codes[lane];
#endif
  const IntVec bits = bytes << 23;
  const IntVec least = IntVec{} + 0x00400000;
  return (Vec)(bits > least ? bits : least);
}

// e^x by the Cephes polynomial, relative error below 2e-7; every lane by the same operations.
inline Vec exponential(Vec x) {
  const Vec lowest = broadcast(-87.0f), highest = broadcast(88.0f);
  x = x < lowest ? lowest : x;
  x = x > highest ? highest : x;
  const Vec half = broadcast(0.5f);
  const Vec scaled = x * 1.44269504088896341f;
  const IntVec exponent = __builtin_convertvector(scaled < 0.0f ? scaled - half : scaled + half, IntVec);
  const Vec whole = __builtin_convertvector(exponent, Vec);
  x = x - whole * 0.693359375f;
  x = x - whole * -2.12194440e-4f;
  Vec value = broadcast(1.9875691500e-4f);
  value = value * x + 1.3981999507e-3f;
  value = value * x + 8.3334519073e-3f;
  value = value * x + 4.1665795894e-2f;
  value = value * x + 1.6666665459e-1f;
  value = value * x + 5.0000001201e-1f;
  value = value * (x * x) + x + 1.0f;
  return value * (Vec)((exponent + 127) << 23);
}

}  // namespace
}  // namespace cantata
