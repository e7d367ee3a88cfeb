// Weights in groups of 16 rows (kernels/cpu/layout.py), and how 8 columns of a group become vectors of floats: kLanes rows at a time, the
// v-th of the group. A format says in how many parts a row's sum comes (kParts) and which activations belong to a decoded vector; `fold`
// turns the parts into one sum for each row.
#pragma once

#include <stdint.h>

#include "simd.h"

namespace cantata {
namespace {

constexpr int kRows = 16;                // of a row group
constexpr int kVectors = kRows / kLanes;  // a column of a row group

typedef float RowGroup[kRows];

// Row groups of a block, which is multiplied at once: where a group is one vector, a token's sums of two would wait for each other.
#if CANTATA_ISA == 2 && CANTATA_BF16 != 1
constexpr int kBlockGroups = 4;
#else
constexpr int kBlockGroups = 2;
#endif

// A token's results for the row groups of a block.
typedef float Outputs[kBlockGroups * kRows];

constexpr long kMaxTokens = 192;  // that an engine multiplies at a time: bounds what lies on the stack

// Column by column: a lane is a row.
struct ByColumn {
  static constexpr int kParts = 1;
  static inline Vec activation(const float* x, int column) { return broadcast(x[column]); }
  static inline Vec fold(const Vec* parts) { return parts[0]; }
};

// e2m1 values as bf16 by code, whole and in bytes.
constexpr uint16_t kE2m1[16] = {0x0000, 0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040, 0x4080, 0x40C0,
                                0x8000, 0xBF00, 0xBF80, 0xBFC0, 0xC000, 0xC040, 0xC080, 0xC0C0};
constexpr uint8_t kE2m1Upper[16] = {0x00, 0x3F, 0x3F, 0x3F, 0x40, 0x40, 0x40, 0x40, 0x80, 0xBF, 0xBF, 0xBF, 0xC0, 0xC0, 0xC0, 0xC0};
constexpr uint8_t kE2m1Lower[16] = {0x00, 0x00, 0x80, 0xC0, 0x00, 0x40, 0x80, 0xC0, 0x00, 0x00, 0x80, 0xC0, 0x00, 0x40, 0x80, 0xC0};

// bf16 pairs (even column in the lower half of a row's lane) → 2 columns.
inline void widen_pairs(IntVec pairs, Vec* columns) {
  columns[0] = (Vec)(pairs << 16);
  columns[1] = (Vec)(pairs & (int32_t)0xFFFF0000);
}

#if CANTATA_ISA == 2
alignas(64) constexpr float kE2m1Values[16] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

// A row's lane has 8 codes, even columns in the lower half. A lookup takes the lowest 5 bits of each half, of which the fifth is a bit of
// the next code: the table has every value twice.
inline __m512i e2m1_pairs(__m512i codes) {
  const __m256i values = _mm256_loadu_si256((const __m256i*)kE2m1);
  return _mm512_permutexvar_epi16(codes, _mm512_broadcast_i64x4(values));
}
#endif

#if CANTATA_ISA == 1
// Two byte lookups and an interleave give bf16 in the order of the bytes: in every 128-bit lane, 2 rows of 2 columns. So a row's sum has a
// part for the even and one for the odd columns, in neighbouring lanes; vectors 2q and 2q + 1 hold columns 2q and 2q + 1, of the lower and
// the upper two rows of each 128-bit lane.
struct Mxfp4Sums {
  static constexpr int kParts = 2;
  static inline Vec activation(const float* x, int vector) { return (Vec)_mm256_castpd_ps(_mm256_broadcast_sd((const double*)(x + vector / 2 * 2))); }
  static inline Vec fold(const Vec* parts) {
    return (Vec)_mm256_shuffle_ps((__m256)parts[0], (__m256)parts[1], 0x88) + (Vec)_mm256_shuffle_ps((__m256)parts[0], (__m256)parts[1], 0xDD);
  }
};
#else
typedef ByColumn Mxfp4Sums;
#endif

struct Mxfp4Weights : Mxfp4Sums {
  static constexpr bool kScaled = true;  // by a power of two for each row and 32 columns
  static constexpr long kChunkBytes = 64;  // 8 columns of 16 rows
  const uint8_t* blocks;
  const uint8_t* codes;
  long width;

  Mxfp4Weights(const uint8_t* blocks, const uint8_t* codes, long width) : blocks(blocks), codes(codes), width(width) {}
  const uint8_t* group(long index) const { return blocks + index * (width / 8) * kChunkBytes; }
  const uint8_t* scale_codes(long index) const { return codes + index * (width / 32) * kRows; }

#if CANTATA_ISA == 2
  // A lookup takes the lowest 4 bits of each lane.
  static inline void decode(const uint8_t* from, int, Vec columns[8]) {
    const __m512 values = _mm512_load_ps(kE2m1Values);
    const IntVec packed = (IntVec)_mm512_loadu_si512(from);
#pragma GCC unroll 8
    for (int column = 0; column < 8; ++column) {
      columns[column] = (Vec)_mm512_permutexvar_ps((__m512i)(packed >> (column % 2 * 16 + column / 2 * 4)), values);
    }
  }
#elif CANTATA_ISA == 1
  static inline void decode(const uint8_t* from, int v, Vec vectors[8]) {
    const __m256i upper = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)kE2m1Upper));
    const __m256i lower = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)kE2m1Lower));
    const __m256i nibble = _mm256_set1_epi8(15), odd = _mm256_set1_epi32((int)0xFFFF0000);
    const __m256i packed = _mm256_loadu_si256((const __m256i*)(from + 32 * v));
    const __m256i halves[2] = {_mm256_and_si256(packed, nibble), _mm256_and_si256(_mm256_srli_epi16(packed, 4), nibble)};
    for (int half = 0; half < 2; ++half) {
      const __m256i high = _mm256_shuffle_epi8(upper, halves[half]), low = _mm256_shuffle_epi8(lower, halves[half]);
      const __m256i rows[2] = {_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)};
      for (int part = 0; part < 2; ++part) {
        vectors[2 * half + part] = (Vec)_mm256_slli_epi32(rows[part], 16);
        vectors[2 * half + 4 + part] = (Vec)_mm256_and_si256(rows[part], odd);
      }
    }
  }
#elif CANTATA_ISA == 3
  // Bytes 0 and 2 of each of 4 rows come first, then 1 and 3, so that two byte lookups and an interleave give pairs of neighbouring columns.
  static inline void decode(const uint8_t* from, int v, Vec columns[8]) {
    constexpr uint8_t kOrder[16] = {0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15};
    const uint8x16_t upper = vld1q_u8(kE2m1Upper), lower = vld1q_u8(kE2m1Lower);
    const uint8x16_t packed = vqtbl1q_u8(vld1q_u8(from + 16 * v), vld1q_u8(kOrder));
    const uint8x16_t halves[2] = {vandq_u8(packed, vdupq_n_u8(15)), vshrq_n_u8(packed, 4)};
    for (int half = 0; half < 2; ++half) {
      const uint8x16_t high = vqtbl1q_u8(upper, halves[half]), low = vqtbl1q_u8(lower, halves[half]);
      widen_pairs((IntVec)vzip1q_u8(low, high), columns + 2 * half);
      widen_pairs((IntVec)vzip2q_u8(low, high), columns + 2 * half + 4);
    }
  }
#else
  static inline void decode(const uint8_t* from, int v, Vec columns[8]) {
    for (int row = 0; row < kLanes; ++row) {
      const uint8_t* bytes = from + 4 * (kLanes * v + row);
      for (int column = 0; column < 8; ++column) {
        const int byte = column % 2 * 2 + column / 4, code = bytes[byte] >> (column / 2 % 2 * 4) & 15;
        columns[column][row] = widen(kE2m1[code]);
      }
    }
  }
#endif
};

// Dense bf16 [rows / 16, width / 2, 16, 2]: pairs of neighbouring columns, row by row.
struct Bf16Weights : ByColumn {
  static constexpr bool kScaled = false;
  static constexpr long kChunkBytes = 256;
  const uint8_t* values;
  long width;

  Bf16Weights(const void* values, long width) : values(static_cast<const uint8_t*>(values)), width(width) {}
  const uint8_t* group(long index) const { return values + index * (width / 8) * kChunkBytes; }
  const uint8_t* scale_codes(long) const { return values; }  // never read

  static inline void decode(const uint8_t* from, int v, Vec columns[8]) {
    for (int pair = 0; pair < 4; ++pair) {
      IntVec both;
      __builtin_memcpy(&both, from + 64 * pair + 4 * kLanes * v, sizeof both);
      widen_pairs(both, columns + 2 * pair);
    }
  }
};

// Dense int8 [rows / 16, width / 4, 64]: 4 columns of a group; in the 16 bytes of rows 4u to 4u + 3, byte 8h + 2r + j is column 2h + j of row
// 4u + r. A row's scale is applied to its whole sum.
struct Int8Weights : ByColumn {
  static constexpr bool kScaled = false;
  static constexpr long kChunkBytes = 128;
  const uint8_t* values;
  long width;

  Int8Weights(const void* values, long width) : values(static_cast<const uint8_t*>(values)), width(width) {}
  const uint8_t* group(long index) const { return values + index * (width / 8) * kChunkBytes; }
  const uint8_t* scale_codes(long) const { return values; }  // never read

  static inline void decode(const uint8_t* from, int v, Vec columns[8]) {
    for (int quad = 0; quad < 2; ++quad) {
#if CANTATA_ISA == 2
      const __m512i packed = _mm512_loadu_si512(from + 64 * quad), zero = _mm512_setzero_si512();
      const __m512i pairs[2] = {_mm512_unpacklo_epi8(zero, packed), _mm512_unpackhi_epi8(zero, packed)};
      for (int half = 0; half < 2; ++half) {
        columns[4 * quad + 2 * half] = (Vec)_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(pairs[half], 16), 24));
        columns[4 * quad + 2 * half + 1] = (Vec)_mm512_cvtepi32_ps(_mm512_srai_epi32(pairs[half], 24));
      }
#elif CANTATA_ISA == 1
      const __m256i packed = _mm256_loadu_si256((const __m256i*)(from + 64 * quad + 32 * v)), zero = _mm256_setzero_si256();
      const __m256i pairs[2] = {_mm256_unpacklo_epi8(zero, packed), _mm256_unpackhi_epi8(zero, packed)};
      for (int half = 0; half < 2; ++half) {
        columns[4 * quad + 2 * half] = (Vec)_mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(pairs[half], 16), 24));
        columns[4 * quad + 2 * half + 1] = (Vec)_mm256_cvtepi32_ps(_mm256_srai_epi32(pairs[half], 24));
      }
#elif CANTATA_ISA == 3
      // A byte at the top of a lane, read as a fraction of 24 bits, is the whole number.
      const uint8x16_t packed = vld1q_u8(from + 64 * quad + 16 * v), zero = vdupq_n_u8(0);
      const IntVec pairs[2] = {(IntVec)vzip1q_u8(zero, packed), (IntVec)vzip2q_u8(zero, packed)};
      for (int half = 0; half < 2; ++half) {
        columns[4 * quad + 2 * half] = (Vec)vcvtq_n_f32_s32((int32x4_t)(pairs[half] << 16), 24);
        columns[4 * quad + 2 * half + 1] = (Vec)vcvtq_n_f32_s32((int32x4_t)(pairs[half] & (int32_t)0xFF000000), 24);
      }
#else
      static_assert(kLanes == 4, "a unit of 4 rows");
      const int8_t* unit = (const int8_t*)from + 64 * quad + 16 * v;
      for (int byte = 0; byte < 16; ++byte) columns[4 * quad + 2 * (byte / 8) + byte % 2][byte % 8 / 2] = unit[byte];
#endif
    }
  }
};

// Weights come from memory once and are not needed again soon; the processor's own prefetching stops at every page of 4 KiB. How far ahead was
// measured: at 4 KiB and more, reading is slower by up to a tenth.
#if CANTATA_BF16 == 2
constexpr long kPrefetchBytes = 1536;
#else
constexpr long kPrefetchBytes = 2048;
#endif

// How far ahead to fetch at byte `at` of a row group where num_groups are read side by side: behind a group lie those that are being read,
// then the one that is read next.
inline long prefetch_distance(long at, long group_bytes, int num_groups) {
  return at + kPrefetchBytes < group_bytes ? kPrefetchBytes : kPrefetchBytes + (num_groups - 1) * group_bytes;
}

template <long kBytes>
inline void prefetch(const uint8_t* from) {
#pragma GCC unroll 16
  for (long line = 0; line < kBytes; line += 64) __builtin_prefetch(from + line);
}

}  // namespace
}  // namespace cantata
