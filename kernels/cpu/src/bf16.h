// Weights in row groups times rows of bf16 activations, summed in fp32, by the processor's bf16 instructions: vdpbf16ps, or AMX tiles.
// Decoding to bf16 is exact. Each form sums in an order of its own, which does not depend on the number of tokens and threads: an
// instruction set uses one of the two for everything.
#pragma once

#include <stdint.h>

#include <type_traits>

#include "isa_bf16.h"

#include "simd.h"
#include "weights.h"

namespace cantata {
namespace {

// 8 columns of a row group → 4 vectors of pairs, the even column in the lower half of a row's lane.
inline void decode_pairs(const Mxfp4Weights&, const uint8_t* from, __m512i pairs[4]) {
  const __m512i packed = _mm512_loadu_si512(from);
  pairs[0] = e2m1_pairs(packed);
  pairs[1] = e2m1_pairs(_mm512_srli_epi32(packed, 4));
  pairs[2] = e2m1_pairs(_mm512_srli_epi32(packed, 8));
  pairs[3] = e2m1_pairs(_mm512_srli_epi32(packed, 12));
}

inline void decode_pairs(const Bf16Weights&, const uint8_t* from, __m512i pairs[4]) {
  for (int pair = 0; pair < 4; ++pair) pairs[pair] = _mm512_loadu_si512(from + 64 * pair);
}

// The bf16 of 0 … 127, by byte.
struct MagnitudeBytes {
  alignas(64) uint8_t upper[128], lower[128];

  constexpr MagnitudeBytes() : upper(), lower() {
    for (int value = 1; value < 128; ++value) {
      int exponent = 6;
      while (value >> exponent == 0) --exponent;
      const int bits = (127 + exponent) << 7 | (value << (7 - exponent) & 127);
      upper[value] = (uint8_t)(bits >> 8);
      lower[value] = (uint8_t)(bits & 255);
    }
  }
};

constexpr MagnitudeBytes kMagnitudes;

inline void decode_pairs(const Int8Weights&, const uint8_t* from, __m512i pairs[4]) {
  const __m512i upper[2] = {_mm512_load_si512(kMagnitudes.upper), _mm512_load_si512(kMagnitudes.upper + 64)};
  const __m512i lower[2] = {_mm512_load_si512(kMagnitudes.lower), _mm512_load_si512(kMagnitudes.lower + 64)};
  const __m512i sign = _mm512_set1_epi8((char)0x80);
  for (int quad = 0; quad < 2; ++quad) {
    const __m512i packed = _mm512_loadu_si512(from + 64 * quad), magnitude = _mm512_abs_epi8(packed);
    const __m512i low = _mm512_permutex2var_epi8(lower[0], magnitude, lower[1]);
    const __m512i high = _mm512_permutex2var_epi8(upper[0], magnitude, upper[1]);
    const __m512i with_sign = _mm512_ternarylogic_epi64(high, packed, sign, 0xF8);  // high | (packed & sign)
    pairs[2 * quad] = _mm512_unpacklo_epi8(low, with_sign);
    pairs[2 * quad + 1] = _mm512_unpackhi_epi8(low, with_sign);
  }
}

#if CANTATA_BF16 == 1

// For each 32 columns two sums are made, of every other pair, then scaled and added to the total.

inline __m512bh broadcast_pair(const uint16_t* from) {
  int32_t both;
  __builtin_memcpy(&both, from, sizeof both);
  return (__m512bh)_mm512_set1_epi32(both);
}

template <typename Weights>
inline __m512 add_scaled(__m512 total, __m512 even, __m512 odd, const uint8_t* codes) {
  const __m512 sum = _mm512_add_ps(even, odd);
  if constexpr (Weights::kScaled) {
    return _mm512_fmadd_ps(sum, (__m512)scales(codes), total);
  } else {
    return _mm512_add_ps(total, sum);
  }
}

template <typename Weights, int kTokens, int kGroups>
void few_pairs(const Weights& weights, long group, const uint16_t* x, Outputs* y) {
  const uint8_t *blocks[kGroups], *codes[kGroups];
  for (int g = 0; g < kGroups; ++g) blocks[g] = weights.group(group + g), codes[g] = weights.scale_codes(group + g);
  constexpr long kStepBytes = 4 * Weights::kChunkBytes;
  const long group_bytes = weights.width / 32 * kStepBytes;
  __m512 total[kGroups][kTokens] = {};
  for (long k = 0; k < weights.width; k += 32) {
    const long ahead = prefetch_distance(k / 32 * kStepBytes, group_bytes, kGroups);
    __m512 part[kGroups][kTokens][2] = {};
#pragma GCC unroll 4
    for (int chunk = 0; chunk < 4; ++chunk) {
#pragma GCC unroll 2
      for (int g = 0; g < kGroups; ++g) {
        __m512i pairs[4];
        prefetch<Weights::kChunkBytes>(blocks[g] + chunk * Weights::kChunkBytes + ahead);
        decode_pairs(weights, blocks[g] + chunk * Weights::kChunkBytes, pairs);
#pragma GCC unroll 4
        for (int pair = 0; pair < 4; ++pair) {
#pragma GCC unroll 8
          for (int t = 0; t < kTokens; ++t) {
            part[g][t][pair % 2] = _mm512_dpbf16_ps(part[g][t][pair % 2], (__m512bh)pairs[pair],
                                                    broadcast_pair(x + t * weights.width + k + 8 * chunk + 2 * pair));
          }
        }
      }
    }
    for (int g = 0; g < kGroups; ++g) {
      for (int t = 0; t < kTokens; ++t) total[g][t] = add_scaled<Weights>(total[g][t], part[g][t][0], part[g][t][1], codes[g]);
      blocks[g] += 4 * Weights::kChunkBytes;
      codes[g] += kRows;
    }
  }
  for (int g = 0; g < kGroups; ++g) {
    for (int t = 0; t < kTokens; ++t) _mm512_storeu_ps(y[t] + kRows * g, total[g][t]);
  }
}

constexpr long kPairSlice = 512;  // columns decoded at a time for many tokens: 16 KiB
constexpr int kPairTile = 8;      // tokens

template <typename Weights, int kTokens>
void pairs_tile(const __m512i* panel, const uint8_t* codes, const uint16_t* x, long stride, long width, float* y) {
  __m512 total[kTokens];
  for (int t = 0; t < kTokens; ++t) total[t] = _mm512_loadu_ps(y + t * 2 * kRows);
  for (long k = 0; k < width; k += 32, panel += 16, codes += kRows) {
    __m512 part[kTokens][2] = {};
#pragma GCC unroll 16
    for (int pair = 0; pair < 16; ++pair) {
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) {
        part[t][pair % 2] = _mm512_dpbf16_ps(part[t][pair % 2], (__m512bh)panel[pair], broadcast_pair(x + t * stride + k + 2 * pair));
      }
    }
    for (int t = 0; t < kTokens; ++t) total[t] = add_scaled<Weights>(total[t], part[t][0], part[t][1], codes);
  }
  for (int t = 0; t < kTokens; ++t) _mm512_storeu_ps(y + t * 2 * kRows, total[t]);
}

template <typename Weights, int kTokens>
void pairs_rest(long left, const __m512i* panel, const uint8_t* codes, const uint16_t* x, long stride, long width, float* y) {
  if constexpr (kTokens > 0) {
    if (left == kTokens) {
      pairs_tile<Weights, kTokens>(panel, codes, x, stride, width, y);
    } else {
      pairs_rest<Weights, kTokens - 1>(left, panel, codes, x, stride, width, y);
    }
  }
}

template <typename Weights>
void many_pairs(const Weights& weights, long group, const uint16_t* x, long num_tokens, float* y) {
  __m512i panel[kPairSlice / 2];
  for (long t = 0; t < num_tokens; ++t) __builtin_memset(y + t * 2 * kRows, 0, sizeof(RowGroup));
  for (long first = 0; first < weights.width; first += kPairSlice) {
    const long width = weights.width - first < kPairSlice ? weights.width - first : kPairSlice;
    const uint8_t* blocks = weights.group(group) + first / 8 * Weights::kChunkBytes;
    for (long chunk = 0; chunk < width / 8; ++chunk, blocks += Weights::kChunkBytes) {
      prefetch<Weights::kChunkBytes>(blocks + kPrefetchBytes);
      decode_pairs(weights, blocks, panel + 4 * chunk);
    }
    const uint8_t* codes = weights.scale_codes(group) + first / 32 * kRows;
    long t = 0;
    for (; t + kPairTile <= num_tokens; t += kPairTile) {
      pairs_tile<Weights, kPairTile>(panel, codes, x + t * weights.width + first, weights.width, width, y + t * 2 * kRows);
    }
    pairs_rest<Weights, kPairTile - 1>(num_tokens - t, panel, codes, x + t * weights.width + first, weights.width, width, y + t * 2 * kRows);
  }
}

template <typename Weights, int kTokens>
void few_rest(const Weights& weights, long group, const uint16_t* x, long num_tokens, Outputs* y) {
  if constexpr (kTokens > 0) {
    if (num_tokens == kTokens) {
      few_pairs<Weights, kTokens, 1>(weights, group, x, y);
    } else {
      few_rest<Weights, kTokens - 1>(weights, group, x, num_tokens, y);
    }
  }
}

struct Bf16 {
  typedef uint16_t Activation;

  // As Fp32::multiply.
  template <typename Weights>
  static void multiply(const Weights& weights, long group, int num_groups, const uint16_t* x, long num_tokens, Outputs* y) {
    if (num_tokens == 1 && num_groups == 2) return few_pairs<Weights, 1, 2>(weights, group, x, y);
    if (num_tokens == 2 && num_groups == 2) return few_pairs<Weights, 2, 2>(weights, group, x, y);
    for (int g = 0; g < num_groups; ++g) {
      float* to = &y[0][kRows * g];
      if (num_tokens <= kPairTile) {
        few_rest<Weights, kPairTile>(weights, group + g, x, num_tokens, (Outputs*)to);
      } else {
        many_pairs(weights, group + g, x, num_tokens, to);
      }
    }
  }
};

#else

// A tile of weights is 32 columns of a row group as 16 rows of pairs, scaled: the sums of the even and of the odd columns are made apart, in
// order, and their sum is added to the total (Intel SDM, TDPBF16PS).

constexpr long kTileBytes = 1024;

// What is not a normal number as bf16, slowly: infinite, or so small that the multiplication takes it for zero.
inline __m512i scaled_slowly(__m512i pairs, Vec factors) {
  Vec columns[2];
  widen_pairs((IntVec)pairs, columns);
  const __m512i even = (__m512i)(columns[0] * factors), odd = (__m512i)(columns[1] * factors);
  return _mm512_or_si512(_mm512_srli_epi32(even, 16), _mm512_and_si512(odd, _mm512_set1_epi32((int)0xFFFF0000)));
}

// kE2m1 times 2^125, but 0x8000 for both zeros; by byte, four times: a lookup takes the lowest 6 bits of a byte, of which two are another
// code's.
struct RaisedE2m1 {
  alignas(64) uint8_t upper[64], lower[64];

  constexpr RaisedE2m1() : upper(), lower() {
    for (int byte = 0; byte < 64; ++byte) {
      const int code = byte % 16, raised = code % 8 == 0 ? 0x8000 : kE2m1[code] + (125 << 7);
      upper[byte] = (uint8_t)(raised >> 8);
      lower[byte] = (uint8_t)(raised & 255);
    }
  }
};

constexpr RaisedE2m1 kRaised;

// As decode_pairs, of raised values. The only port for saturating subtractions also takes part in lookups by 16 bits (vpermw), but not in
// those by bytes: with these a tile takes 38 cycles instead of 50.
inline void raised_pairs(const uint8_t* from, __m512i pairs[4]) {
  const __m512i upper = _mm512_load_si512(kRaised.upper), lower = _mm512_load_si512(kRaised.lower);
  constexpr __mmask64 kUpper = 0xAAAAAAAAAAAAAAAA;
  __m512i turned[4] = {_mm512_loadu_si512(from)};  // halves, to the left by 4 times the index
  turned[1] = _mm512_shldi_epi16(turned[0], turned[0], 4);
  turned[2] = _mm512_shldi_epi16(turned[0], turned[0], 8);
  turned[3] = _mm512_shldi_epi16(turned[0], turned[0], 12);
#pragma GCC unroll 4
  for (int pair = 0; pair < 4; ++pair) {
    const __m512i low = _mm512_permutexvar_epi8(turned[(4 - pair) % 4], lower);
    pairs[pair] = _mm512_mask_permutexvar_epi8(low, kUpper, turned[(6 - pair) % 4], upper);
  }
}

struct ScaleTables {
  alignas(64) uint8_t largest[64], span[64];  // a scale code, and how much lower others may be
  alignas(64) uint8_t rows[64];               // a byte's row where it is the upper one of a bf16, else none

  constexpr ScaleTables() : largest(), span(), rows() {
    for (int byte = 0; byte < 64; ++byte) {
      largest[byte] = 252;
      span[byte] = 250;
      rows[byte] = byte % 2 == 0 ? 0x80 : (uint8_t)(byte / 4);
    }
  }
};

constexpr ScaleTables kScales;

__attribute__((noinline, cold)) void tile_slowly(const Mxfp4Weights& weights, const uint8_t* from, const uint8_t* codes, uint8_t* to) {
  const Vec factors = scales(codes);
  for (int chunk = 0; chunk < 4; ++chunk) {
    __m512i pairs[4];
    decode_pairs(weights, from + 64 * chunk, pairs);
    for (int pair = 0; pair < 4; ++pair) _mm512_store_si512(to + 64 * (4 * chunk + pair), scaled_slowly(pairs[pair], factors));
  }
}

inline void weight_tile(const Mxfp4Weights& weights, const uint8_t* from, const uint8_t* codes, uint8_t* to) {
  // What a scale lacks to 2^125 is taken from the exponents, which raised values have 125 higher; their zeros are the least number, so that
  // the saturating subtraction leaves them what they are, -0.
  const __m512i by_row = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)codes));
  const __m512i missing = _mm512_sub_epi8(_mm512_load_si512(kScales.largest), by_row);
  if (__builtin_expect(_mm512_cmpgt_epu8_mask(missing, _mm512_load_si512(kScales.span)) != 0, 0)) {
    return tile_slowly(weights, from, codes, to);
  }
  const __m512i exponents = _mm512_srli_epi16(_mm512_shuffle_epi8(missing, _mm512_load_si512(kScales.rows)), 1);
#pragma GCC unroll 4
  for (int chunk = 0; chunk < 4; ++chunk) {
    __m512i pairs[4];
    raised_pairs(from + 64 * chunk, pairs);
#pragma GCC unroll 4
    for (int pair = 0; pair < 4; ++pair) _mm512_store_si512(to + 64 * (4 * chunk + pair), _mm512_subs_epi16(pairs[pair], exponents));
  }
}

inline void weight_tile(const Int8Weights& weights, const uint8_t* from, const uint8_t*, uint8_t* to) {
#pragma GCC unroll 4
  for (int chunk = 0; chunk < 4; ++chunk) {
    __m512i pairs[4];
    decode_pairs(weights, from + chunk * Int8Weights::kChunkBytes, pairs);
    for (int pair = 0; pair < 4; ++pair) _mm512_store_si512(to + 64 * (4 * chunk + pair), pairs[pair]);
  }
}

// The shape of the tiles for 1 to 32 rows. It stays until another is needed: to set or to release it costs as much as 30 tiles.
class TileShape {
 public:
  TileShape() = default;
  TileShape(const TileShape&) = delete;

  ~TileShape() {
    if (num_rows_ > 0) _tile_release();
  }

  inline void set(long num_rows) {
    if (num_rows == num_rows_) return;
    num_rows_ = num_rows;
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {};
    } config;
    const uint8_t first = num_rows < 16 ? num_rows : 16, second = num_rows > 16 ? num_rows - 16 : num_rows;
    const uint8_t rows[8] = {first, first, second, second, first, second, 16, 16};
    __builtin_memcpy(config.rows, rows, sizeof rows);
    asm volatile("" ::"r"(&config) : "memory");  // the intrinsic says that it reads 8 of the bytes
    _tile_loadconfig(&config);
  }

 private:
  long num_rows_ = 0;  // 0: none is set
};

// The intrinsics do not say that they read and write memory.
inline void memory_fence() { asm volatile("" ::: "memory"); }

// Up to 16 tokens and 4 row groups, or up to 32 tokens and 2. Tiles 0 to 3: sums; 4: activations of the first 16 tokens; 5: of the second 16;
// 6 and 7: weights, in turn.
template <int kTokenTiles, int kGroups>
struct Tiles {
  static_assert(kTokenTiles * kGroups <= 4);

  static inline void zero() {
    _tile_zero(0);
    if constexpr (kGroups > 1) _tile_zero(1);
    if constexpr (kTokenTiles > 1 || kGroups > 2) _tile_zero(2);
    if constexpr (kTokenTiles * kGroups > 2) _tile_zero(3);
  }

  static inline void store(Outputs* y) {
    _tile_stored(0, y[0], sizeof(Outputs));
    if constexpr (kGroups > 1) _tile_stored(1, y[0] + kRows, sizeof(Outputs));
    if constexpr (kTokenTiles > 1) {
      _tile_stored(2, y[16], sizeof(Outputs));
      if constexpr (kGroups > 1) _tile_stored(3, y[16] + kRows, sizeof(Outputs));
    } else {
      if constexpr (kGroups > 2) _tile_stored(2, y[0] + 2 * kRows, sizeof(Outputs));
      if constexpr (kGroups > 3) _tile_stored(3, y[0] + 3 * kRows, sizeof(Outputs));
    }
    memory_fence();
  }

  // 32 columns of x and of the weights; rows of x are `stride` bytes apart, tiles of the row groups `group_stride`.
  static inline void multiply(const uint16_t* x, long stride, const uint8_t* weights, long group_stride) {
    memory_fence();
    _tile_loadd(4, x, stride);
    _tile_loadd(6, weights, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kTokenTiles > 1) {
      _tile_loadd(5, x + 8 * stride, stride);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (kGroups > 1) {
      _tile_loadd(7, weights + group_stride, 64);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (kTokenTiles > 1) _tile_dpbf16ps(3, 5, 7);
    }
    if constexpr (kGroups > 2) {
      _tile_loadd(6, weights + 2 * group_stride, 64);
      _tile_dpbf16ps(2, 4, 6);
    }
    if constexpr (kGroups > 3) {
      _tile_loadd(7, weights + 3 * group_stride, 64);
      _tile_dpbf16ps(3, 4, 7);
    }
  }
};

// Steps of 32 columns that weights are decoded before they are multiplied: what was just stored cannot be loaded as a tile until it is in
// the cache, and decoding goes on meanwhile.
constexpr long kStepsAhead = 2;

// The sums stay in tiles while all weights pass once.
template <typename Weights, int kTokenTiles, int kGroups>
void multiply_tiles(const Weights& weights, long group, const uint16_t* x, Outputs* y) {
  constexpr bool kDecodes = !std::is_same_v<Weights, Bf16Weights>;
  constexpr long kStepBytes = 4 * Weights::kChunkBytes, kRingSteps = 2 * kStepsAhead, kStepsOfLine = 64 / kRows;
  typedef Tiles<kTokenTiles, kGroups> Sums;
  alignas(64) uint8_t decoded[kDecodes ? kRingSteps : 1][kGroups][kTileBytes];
  const long num_steps = weights.width / 32, stride = weights.width * 2;
  const long group_bytes = num_steps * kStepBytes, codes_bytes = num_steps * kRows;
  const uint8_t *blocks = weights.group(group), *codes = weights.scale_codes(group);

  const auto prepare = [&](long step) __attribute__((always_inline)) {
    const uint8_t* from = blocks + step * kStepBytes;
    const long ahead = prefetch_distance(step * kStepBytes, group_bytes, kGroups);
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) {
      const uint8_t* tile = from + g * group_bytes;
      const uint8_t* tile_codes = codes + g * codes_bytes + step * kRows;
      prefetch<kStepBytes>(tile + ahead);
      if (Weights::kScaled && step % kStepsOfLine == 0) prefetch<64>(tile_codes + ahead / kStepBytes * kRows);
      if constexpr (kDecodes) weight_tile(weights, tile, tile_codes, decoded[step % kRingSteps][g]);
    }
  };

  Sums::zero();
  if constexpr (kDecodes) {
    for (long step = 0; step < kStepsAhead && step < num_steps; ++step) prepare(step);
  }
  for (long step = 0; step < num_steps; ++step, x += 32) {
    if constexpr (kDecodes) {
      Sums::multiply(x, stride, decoded[step % kRingSteps][0], kTileBytes);
      if (step + kStepsAhead < num_steps) prepare(step + kStepsAhead);
    } else {
      Sums::multiply(x, stride, blocks + step * kStepBytes, group_bytes);
      prepare(step);
    }
  }
  Sums::store(y);
}

class Bf16 {
 public:
  typedef uint16_t Activation;

  // As Fp32::multiply.
  template <typename Weights>
  void multiply(const Weights& weights, long group, int num_groups, const uint16_t* x, long num_tokens, Outputs* y) {
    for (long t = 0; t < num_tokens; t += 32) {
      const long count = num_tokens - t < 32 ? num_tokens - t : 32;
      shape_.set(count);
      if (count > 16) {
        side_by_side<Weights, 2, 2>(weights, group, num_groups, x + t * weights.width, y + t);
      } else {
        // Decoding MXFP4 gains from more to do at once; what is read faster loses by reading at four places.
        side_by_side<Weights, 1, Weights::kScaled ? 4 : 2>(weights, group, num_groups, x + t * weights.width, y + t);
      }
    }
  }

 private:
  // kGroups at a time, then the rest.
  template <typename Weights, int kTokenTiles, int kGroups>
  void side_by_side(const Weights& weights, long group, int num_groups, const uint16_t* x, Outputs* y) {
    const auto results = [&](int g) { return (Outputs*)&y[0][g * kRows]; };
    int g = 0;
    for (; g + kGroups <= num_groups; g += kGroups) multiply_tiles<Weights, kTokenTiles, kGroups>(weights, group + g, x, results(g));
    if constexpr (kGroups > 1) {
      if (g < num_groups) side_by_side<Weights, kTokenTiles, kGroups / 2>(weights, group + g, num_groups - g, x, results(g));
    }
  }

  TileShape shape_;
};

#endif

}  // namespace
}  // namespace cantata
