// Attention in bf16 by the processor's bf16 instructions, summed in fp32: for heads of a multiple of 32 dimensions. Scores are exact products
// of queries and keys, the scale is applied to their sums. Weights are added up in fp32 and rounded to bf16 for their product with the
// values, as flash attention does on GPUs.
#pragma once

#include <stdint.h>

#include "isa_bf16.h"

#include "activations.h"
#include "attention.h"
#include "bf16.h"
#include "ops.h"
#include "simd.h"
#include "workspace.h"

namespace cantata {
namespace {

constexpr long kRowBlock = 32;  // rows whose scores and weights are in the first-level cache together
constexpr long kStep = 32;      // elements of a row that one tile multiplies
constexpr long kStepPairs = kStep / 2 * 16;  // 32-bit pairs of a tile: [16 pairs of elements, 16 columns]

#if CANTATA_BF16 == 1

struct TileShape {
  void set(long) {}
};

// c[rows, 32] = a[rows, steps * kStep] times two columns of tiles, whose tiles for a step are `stride` pairs apart. Rows of c beyond the last
// up to a multiple of 8 are written too. Strides of a and c in elements.
inline void multiply(long rows, long steps, const uint16_t* a, long a_stride, const int32_t* first, const int32_t* second, long stride, float* c,
                     long c_stride) {
  constexpr int kRowsAtOnce = 8;
  for (long row = 0; row < rows; row += kRowsAtOnce) {
    __m512 total[kRowsAtOnce][2] = {};
    for (long step = 0; step < steps; ++step) {
#pragma GCC unroll 4
      for (int pair = 0; pair < kStep / 2; ++pair) {
        const __m512bh left = (__m512bh)_mm512_loadu_si512(first + step * stride + 16 * pair);
        const __m512bh right = (__m512bh)_mm512_loadu_si512(second + step * stride + 16 * pair);
#pragma GCC unroll 8
        for (int r = 0; r < kRowsAtOnce; ++r) {
          const __m512bh both = broadcast_pair(a + (row + r) * a_stride + kStep * step + 2 * pair);
          total[r][0] = _mm512_dpbf16_ps(total[r][0], left, both);
          total[r][1] = _mm512_dpbf16_ps(total[r][1], right, both);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRowsAtOnce; ++r) {
      _mm512_storeu_ps(c + (row + r) * c_stride, total[r][0]);
      _mm512_storeu_ps(c + (row + r) * c_stride + 16, total[r][1]);
    }
  }
}

#else

template <bool kTwoTilesOfRows>
inline void multiply_tiles(long steps, const uint16_t* a, long a_stride, const int32_t* first, const int32_t* second, long stride, float* c,
                           long c_stride) {
  memory_fence();
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kTwoTilesOfRows) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (long step = 0; step < steps; ++step) {
    _tile_loadd(4, a + kStep * step, a_stride * 2);
    _tile_loadd(6, first + step * stride, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, second + step * stride, 64);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kTwoTilesOfRows) {
      _tile_loadd(5, a + 16 * a_stride + kStep * step, a_stride * 2);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_stride * 4);
  _tile_stored(1, c + 16, c_stride * 4);
  if constexpr (kTwoTilesOfRows) {
    _tile_stored(2, c + 16 * c_stride, c_stride * 4);
    _tile_stored(3, c + 16 * c_stride + 16, c_stride * 4);
  }
  memory_fence();
}

// c[rows, 32] = a[rows, steps * kStep] times two columns of tiles, whose tiles for a step are `stride` pairs apart; configured for as many
// rows, at most 32. Strides of a and c in elements.
inline void multiply(long rows, long steps, const uint16_t* a, long a_stride, const int32_t* first, const int32_t* second, long stride, float* c,
                     long c_stride) {
  if (rows > 16) {
    multiply_tiles<true>(steps, a, a_stride, first, second, stride, c, c_stride);
  } else {
    multiply_tiles<false>(steps, a, a_stride, first, second, stride, c, c_stride);
  }
}

#endif

// Of the 16 keys from k on, those in the span.
inline __mmask16 lanes_within(Span span, long k) {
  const auto below = [k](long end) { return end <= k ? 0u : end >= k + 16 ? 0xFFFFu : (1u << (end - k)) - 1; };
  return (__mmask16)(below(span.last) & ~below(span.first));
}

// 2^x for the lanes of the mask, 0 for the others; relative error below 9e-5, a fortieth of what rounding to bf16 may change.
inline __m512 power_of_two(__mmask16 mask, __m512 x) {
  const __m512 fraction = _mm512_reduce_ps(x, 1);  // x - floor(x)
  __m512 value = _mm512_set1_ps(0.07706699f);
  value = _mm512_fmadd_ps(value, fraction, _mm512_set1_ps(0.22764505f));
  value = _mm512_fmadd_ps(value, fraction, _mm512_set1_ps(0.69511677f));
  value = _mm512_fmadd_ps(value, fraction, _mm512_set1_ps(1.0f));
  return _mm512_maskz_scalef_ps(mask, value, x);
}

// A row of scores → bf16 weights relative to the maximum of the row's span; zeros in the rest of `all`, multiples of 32. Scores are multiplied
// by `scale` first.
inline Reduced soften(const float* scores, Span span, Span all, float scale, uint16_t* weights) {
  __m512 highest = _mm512_set1_ps(kNothing);
  for (long k = span.first / 16 * 16; k < span.last; k += 16) {
    highest = _mm512_mask_max_ps(highest, lanes_within(span, k), _mm512_loadu_ps(scores + k), highest);  // of a NaN and a number the second
  }
  const float maximum = _mm512_reduce_max_ps(highest), to_power = scale * 1.44269504088896341f;
  // Without a number among them there is no maximum; NaN must come through, minus infinity as zero.
  const __m512 factor = _mm512_set1_ps(to_power), shift = _mm512_set1_ps(maximum == kNothing ? 0.0f : maximum * to_power);
  __m512 total[2] = {};
  for (long k = all.first; k < all.last; k += 32) {
    __m512 weight[2];
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m512 power = _mm512_fmsub_ps(_mm512_loadu_ps(scores + k + 16 * half), factor, shift);
      weight[half] = power_of_two(lanes_within(span, k + 16 * half), power);
      total[half] = _mm512_add_ps(total[half], weight[half]);
    }
    const __m512bh rounded = _mm512_cvtne2ps_pbh(weight[1], weight[0]);
    __builtin_memcpy(weights + k, &rounded, sizeof rounded);
  }
  return {maximum * scale, _mm512_reduce_add_ps(_mm512_add_ps(total[0], total[1]))};
}

// Of the elements of two vectors, those that make the pairs of the lower and of the upper half.
struct PairOrder {
  alignas(64) int16_t lower[32], upper[32];

  constexpr PairOrder() : lower(), upper() {
    for (int i = 0; i < 32; ++i) {
      lower[i] = (int16_t)(i / 2 + i % 2 * 32);
      upper[i] = (int16_t)(lower[i] + 16);
    }
  }
};

constexpr PairOrder kPairs;

class Bf16Reducer {
 public:
  typedef uint16_t Element;

  static bool can_reduce(const AttentionArgs& args) { return args.type == kBfloat16 && args.head_dim % kStep == 0; }
  static long width(long head_dim) { return head_dim; }

  struct Workspace {
    uint16_t* queries;  // [rows, head_dim]
    int32_t* keys;      // [kKeyTile / 16, head_dim / 2, 16 keys], pairs of dimensions
    int32_t* values;    // [kKeyTile / kStep, head_dim / 16, kStep / 2, 16 dimensions], pairs of keys
    float* scores;      // [kRowBlock, kKeyTile]
    uint16_t* weights;  // [kRowBlock, kKeyTile]
    uint16_t* nothing;  // [head_dim] zeros
    long* offsets;      // [kKeyTile]

    Workspace(Layout& layout, long rows, long head_dim)
        : queries(layout.take<uint16_t>(rows * head_dim)),
          keys(layout.take<int32_t>(kKeyTile * head_dim / 2)),
          values(layout.take<int32_t>(kKeyTile * head_dim / 2)),
          scores(layout.take<float>(kRowBlock * kKeyTile)),
          weights(layout.take<uint16_t>(kRowBlock * kKeyTile)),
          nothing(layout.take<uint16_t>(head_dim)),
          offsets(layout.take<long>(kKeyTile)) {}
  };

  static constexpr long kSteps = CANTATA_BF16 == 2 ? 48 : 80;  // of reduce, about, for a decode

  Bf16Reducer(const Sequences<uint16_t>& of, const QueryTile& tile, const Workspace& work)
      : of_(of), args_(of.args), tile_(tile), real_rows_(tile.num_queries * of.group), work_(work) {
    __builtin_memset(work.nothing, 0, args_.head_dim * 2);
    const long padded_rows = round_up(real_rows_, 16);
    __builtin_memset(work.queries + real_rows_ * args_.head_dim, 0, (padded_rows - real_rows_) * args_.head_dim * 2);
  }

  void load_queries(long head) {
    head_ = head;
    const long count = of_.group * args_.head_dim;
    for (long query = 0; query < tile_.num_queries; ++query) {
      __builtin_memcpy(work_.queries + query * count, of_.queries(tile_.row + query, head), count * 2);
    }
#if CANTATA_BF16 == 2
    if (few_rows()) pack_queries();
#endif
  }

  // One key tile for all rows; `ahead` takes its steps meanwhile.
  void reduce(long key_tile, Ahead& ahead, const Softmax& out) {
#if CANTATA_BF16 == 2
    if (few_rows()) return reduce_few(key_tile, ahead, out);
#endif
    const Span all = of_.visible(tile_, key_tile);
    OddKeys odd;
    find_keys(key_tile, all);
    pack_keys(all, ahead);
    pack_values(all, ahead, odd);
    for (long row = 0; row < real_rows_; row += kRowBlock) {
      const long end_row = row + kRowBlock < real_rows_ ? row + kRowBlock : real_rows_, rows = round_up(end_row - row, 8);
      shape_.set(rows);
      reduce_rows(key_tile, row, end_row, rows, odd, ahead, out);
    }
    for (long row = real_rows_; row < round_up(real_rows_, 16); ++row) out.maxima[row] = out.totals[row] = 0.0f;
  }

 private:
  // Heads of a key tile come one after the other.
  void find_keys(long key_tile, Span all) {
    if (key_tile != found_key_tile_) {
      of_.find(tile_, head_, key_tile, all, work_.offsets);
    } else {
      for (long key = all.first; key < all.last; ++key) work_.offsets[key] += (head_ - found_head_) * args_.head_dim;
    }
    found_key_tile_ = key_tile, found_head_ = head_;
  }

  const uint16_t* slot_or_nothing(const void* half, long key, Span all) const {
    return key < all.first || key >= all.last ? work_.nothing : static_cast<const uint16_t*>(half) + work_.offsets[key];
  }

  void pack_keys(Span all, Ahead& ahead) const {
    const long pairs = args_.head_dim / 2;
    for (long k = all.first / kStep * kStep; k < round_up(all.last, kStep); k += 16) {
      const uint16_t* keys[16];
      for (long lane = 0; lane < 16; ++lane) keys[lane] = slot_or_nothing(args_.keys, k + lane, all);
      int32_t* to = work_.keys + k * pairs;
      for (long pair = 0; pair < pairs; pair += 16) {
        ahead.step();
        IntVec rows[kLanes];
#pragma GCC unroll 16
        for (int lane = 0; lane < 16; ++lane) __builtin_memcpy(&rows[lane], keys[lane] + 2 * pair, sizeof rows[lane]);
        transpose(rows);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) __builtin_memcpy(to + (pair + i) * 16, &rows[i], sizeof rows[i]);
      }
    }
  }

  void pack_values(Span all, Ahead& ahead, OddKeys& odd) const {
    for (long k = all.first / kStep * kStep; k < round_up(all.last, kStep); k += kStep) {
      int32_t* to = work_.values + k * args_.head_dim / 2;
      if (!pack_group(k, all, ahead, to)) leave_out(k, to, odd);
    }
  }

  // The values of kStep keys; whether all are finite.
  bool pack_group(long k, Span all, Ahead& ahead, int32_t* to) const {
    const __m512i lower = _mm512_load_si512(kPairs.lower), upper = _mm512_load_si512(kPairs.upper);
    __m512i largest = _mm512_setzero_si512();  // of twice the numbers, which have no sign then
    for (long pair = 0; pair < kStep / 2; ++pair) {
      if (pair % 4 == 0) ahead.step();
      const uint16_t *even = slot_or_nothing(args_.values, k + 2 * pair, all), *odd = slot_or_nothing(args_.values, k + 2 * pair + 1, all);
      for (long d = 0; d < args_.head_dim; d += 32) {
        const __m512i first = _mm512_loadu_si512(even + d), second = _mm512_loadu_si512(odd + d);
        largest = _mm512_max_epu16(largest, _mm512_max_epu16(_mm512_add_epi16(first, first), _mm512_add_epi16(second, second)));
        _mm512_store_si512(to + d / 16 * kStepPairs + pair * 16, _mm512_permutex2var_epi16(first, lower, second));
        _mm512_store_si512(to + (d / 16 + 1) * kStepPairs + pair * 16, _mm512_permutex2var_epi16(first, upper, second));
      }
    }
    return _mm512_cmpge_epu16_mask(largest, _mm512_set1_epi16((short)0xFF00)) == 0;
  }

  void leave_out(long k, int32_t* packed, OddKeys& odd) const {
    uint16_t* values = reinterpret_cast<uint16_t*>(packed);
    for (long i = 0; i < kStep * args_.head_dim; ++i) {
      if ((values[i] & 0x7F80) != 0x7F80) continue;
      values[i] = 0;
      odd.add(k + i % (2 * kStepPairs) / 32 * 2 + i % 2);
    }
  }

#if CANTATA_BF16 == 2
  // Decodes: keys are multiplied where they lie in the cache, which makes the scores' tiles [16 keys, 16 rows], and values are packed just
  // before they are used, so that all but the cache stays in the first-level cache. The sums are those of `reduce_rows`, bit for bit.

  static constexpr long kFewRows = 16;

  bool few_rows() const { return real_rows_ <= kFewRows && args_.head_dim <= 2 * kStep; }

  // work_.queries → [head_dim / 2, kFewRows], pairs of dimensions.
  int32_t* packed_queries() const { return work_.keys; }

  // Of keys that are not in one block: two times [16, head_dim].
  uint16_t* copied_keys(long which) const {
    return reinterpret_cast<uint16_t*>(work_.keys + kFewRows * args_.head_dim / 2) + which * 16 * args_.head_dim;
  }

  void pack_queries() const {
    for (long pair = 0; pair < args_.head_dim / 2; pair += 16) {
      IntVec rows[kLanes];
      for (int row = 0; row < 16; ++row) __builtin_memcpy(&rows[row], work_.queries + row * args_.head_dim + 2 * pair, sizeof rows[row]);
      transpose(rows);
      for (int i = 0; i < 16; ++i) __builtin_memcpy(packed_queries() + (pair + i) * kFewRows, &rows[i], sizeof rows[i]);
    }
  }

  void reduce_few(long key_tile, Ahead& ahead, const Softmax& out) {
    const Span all = of_.visible(tile_, key_tile), seen{all.first / kStep * kStep, round_up(all.last, kStep)};
    find_keys(key_tile, all);
    shape_.set(kFewRows);
    OddKeys odd;
    score_few(key_tile, all, seen, ahead);
    soften_few(key_tile, seen, ahead, out);
    if (args_.head_dim == kStep) {
      sum_few<2>(all, seen, ahead, odd, out.sums);
    } else {
      sum_few<4>(all, seen, ahead, odd, out.sums);
    }
    if (odd.any()) odd.add_values(of_, tile_, key_tile, work_.offsets, work_.weights, 0, real_rows_, out.sums, args_.head_dim);
  }

  // The 16 keys from k on, of which the span has some, and how many bytes they are apart.
  const uint16_t* keys_from(long key_tile, long k, Span all, long* stride) const {
    const long token_elements = args_.num_kv_heads * args_.head_dim, in_block = (key_tile * kKeyTile + k) % args_.block_size;
    if (in_block + 16 <= args_.block_size) {
      const long known = k < all.first ? all.first : k;
      *stride = token_elements * 2;
      return static_cast<const uint16_t*>(args_.keys) + work_.offsets[known] - (known - k) * token_elements;
    }
    uint16_t* copy = copied_keys(k / 16 % 2);
    for (long i = 0; i < 16; ++i) __builtin_memcpy(copy + i * args_.head_dim, slot_or_nothing(args_.keys, k + i, all), args_.head_dim * 2);
    *stride = args_.head_dim * 2;
    return copy;
  }

  // Of kStep keys.
  void fetch_values(long k, Span all) const {
    const long end = k + kStep < all.last ? k + kStep : all.last;
    for (long key = k < all.first ? all.first : k; key < end; ++key) {
      const uint16_t* values = static_cast<const uint16_t*>(args_.values) + work_.offsets[key];
      for (long d = 0; d < args_.head_dim; d += 32) __builtin_prefetch(values + d);
    }
  }

  // Scores [kKeyTile, kFewRows]; what is there for a key that a row does not see may be anything.
  void score_few(long key_tile, Span all, Span seen, Ahead& ahead) const {
    for (long k = seen.first; k < seen.last; k += kStep) {
      ahead.step();
      const bool low = k + 16 > all.first, high = k + 16 < all.last;  // has any keys
      long strides[2] = {};
      const uint16_t* lower = low ? keys_from(key_tile, k, all, &strides[0]) : nullptr;
      const uint16_t* upper = high ? keys_from(key_tile, k + 16, all, &strides[1]) : nullptr;
      memory_fence();
      _tile_zero(0);
      _tile_zero(1);
      for (long d = 0; d < args_.head_dim; d += kStep) {
        _tile_loadd(6, packed_queries() + d / 2 * kFewRows, 64);
        if (low) {
          _tile_loadd(4, lower + d, strides[0]);
          _tile_dpbf16ps(0, 4, 6);
        }
        if (high) {
          _tile_loadd(5, upper + d, strides[1]);
          _tile_dpbf16ps(1, 5, 6);
        }
      }
      if (!ahead.has_started()) fetch_values(k, all);  // nobody did when the key tile before this one was computed
      _tile_stored(0, work_.scores + k * kFewRows, 64);
      _tile_stored(1, work_.scores + (k + 16) * kFewRows, 64);
      memory_fence();
    }
  }

  // As `soften` for each row, a lane a row; weights [kFewRows, kKeyTile].
  void soften_few(long key_tile, Span seen, Ahead& ahead, const Softmax& out) const {
    alignas(64) int32_t first[16] = {}, last[16] = {};
    Span common = seen;  // that all rows see
    for (long row = 0; row < real_rows_; ++row) {
      const Span span = of_.visible(tile_.position + row / of_.group, key_tile);
      first[row] = (int32_t)span.first, last[row] = (int32_t)span.last;
      common = {span.first > common.first ? span.first : common.first, span.last < common.last ? span.last : common.last};
    }
    const __m512i firsts = _mm512_load_si512(first), lasts = _mm512_load_si512(last);
    const __mmask16 real = (__mmask16)((1u << real_rows_) - 1);
    const auto rows_that_see = [&](long k) {
      if (k >= common.first && k < common.last) return real;
      const __m512i key = _mm512_set1_epi32((int)k);
      return (__mmask16)(_mm512_cmpge_epi32_mask(key, firsts) & _mm512_cmplt_epi32_mask(key, lasts));
    };

    const float to_power = args_.scale * 1.44269504088896341f;
    __m512 highest[4];
    for (__m512& part : highest) part = _mm512_set1_ps(kNothing);
    for (long k = seen.first; k < seen.last; k += 4) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        highest[i] = _mm512_mask_max_ps(highest[i], rows_that_see(k + i), _mm512_load_ps(work_.scores + (k + i) * kFewRows), highest[i]);
      }
    }
    const __m512 maximum = _mm512_max_ps(_mm512_max_ps(highest[0], highest[1]), _mm512_max_ps(highest[2], highest[3]));
    const __m512 factor = _mm512_set1_ps(to_power);
    const __m512 shift = _mm512_maskz_mul_ps(_mm512_cmp_ps_mask(maximum, _mm512_set1_ps(kNothing), _CMP_NEQ_OQ), maximum, factor);

    alignas(64) float totals[kStep][16] = {};  // of every kStep-th key
    for (long k = seen.first; k < seen.last; k += kStep) {
      ahead.step();
      IntVec pairs[16];  // of keys
      const auto weigh = [&](auto&& rows_of) __attribute__((always_inline)) {
#pragma GCC unroll 16
        for (int pair = 0; pair < 16; ++pair) {
          __m512 weight[2];
#pragma GCC unroll 2
          for (int i = 0; i < 2; ++i) {
            const long key = k + 2 * pair + i;
            const __m512 power = _mm512_fmsub_ps(_mm512_load_ps(work_.scores + key * kFewRows), factor, shift);
            weight[i] = power_of_two(rows_of(key), power);
            float* total = totals[2 * pair + i];
            _mm512_store_ps(total, _mm512_add_ps(_mm512_load_ps(total), weight[i]));
          }
          const __m512i even = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(weight[0]));
          const __m512i odd = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(weight[1]));
          pairs[pair] = (IntVec)_mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
        }
      };
      if (k >= common.first && k + kStep <= common.last) {
        weigh([&](long) { return real; });
      } else {
        weigh(rows_that_see);
      }
      transpose(pairs);
#pragma GCC unroll 16
      for (int row = 0; row < 16; ++row) __builtin_memcpy(work_.weights + row * kKeyTile + k, &pairs[row], sizeof pairs[row]);
    }
    // The order in which `soften` adds up its lanes.
    for (int half = kStep / 2; half >= 1; half /= 2) {
      for (int i = 0; i < half; ++i) _mm512_store_ps(totals[i], _mm512_add_ps(_mm512_load_ps(totals[i]), _mm512_load_ps(totals[i + half])));
    }
    _mm512_storeu_ps(out.maxima, _mm512_maskz_mul_ps(real, maximum, _mm512_set1_ps(args_.scale)));
    _mm512_storeu_ps(out.totals, _mm512_load_ps(totals[0]));
  }

  // sums[kFewRows, head_dim]: weights times values.
  template <int kColumns>  // of tiles
  void sum_few(Span all, Span seen, Ahead& ahead, OddKeys& odd, float* sums) const {
    constexpr long kRing = 2 * kStepsAhead, kWidth = 16 * kColumns;
    const long num_steps = (seen.last - seen.first) / kStep;
    const auto packed = [&](long step) { return work_.values + step % kRing * kStep * kWidth / 2; };
    const auto pack = [&](long step) {
      if (step >= num_steps) return;
      const long k = seen.first + step * kStep;
      if (!pack_group(k, all, ahead, packed(step))) leave_out(k, packed(step), odd);
    };
    for (long step = 0; step < kStepsAhead; ++step) pack(step);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long step = 0; step < num_steps; ++step) {
      const int32_t* values = packed(step);
      memory_fence();
      _tile_loadd(4, work_.weights + seen.first + step * kStep, kKeyTile * 2);
      _tile_loadd(6, values, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, values + kStepPairs, 64);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (kColumns > 2) {
        _tile_loadd(6, values + 2 * kStepPairs, 64);
        _tile_dpbf16ps(2, 4, 6);
        _tile_loadd(7, values + 3 * kStepPairs, 64);
        _tile_dpbf16ps(3, 4, 7);
      }
      memory_fence();
      pack(step + kStepsAhead);
    }
    memory_fence();
    _tile_stored(0, sums, kWidth * 4);
    _tile_stored(1, sums + 16, kWidth * 4);
    if constexpr (kColumns > 2) {
      _tile_stored(2, sums + 32, kWidth * 4);
      _tile_stored(3, sums + 48, kWidth * 4);
    }
    memory_fence();
  }
#endif

  // Rows [row, end_row), padded to `rows`.
  void reduce_rows(long key_tile, long row, long end_row, long rows, const OddKeys& odd, Ahead& ahead, const Softmax& out) const {
    const long head_dim = args_.head_dim;
    const auto span_of = [&](long row) { return of_.visible(tile_.position + row / of_.group, key_tile); };
    const Span seen{span_of(row).first / kStep * kStep, round_up(span_of(end_row - 1).last, kStep)};
    float* sums = out.sums + row * head_dim;
    if (seen.empty()) {
      for (long r = row; r < end_row; ++r) out.maxima[r] = kNothing, out.totals[r] = 0.0f;
      __builtin_memset(sums, 0, sizeof(float) * (end_row - row) * head_dim);
      return;
    }
    for (long k = seen.first; k < seen.last; k += kStep) {
      ahead.step();
      const int32_t* keys = work_.keys + k * head_dim / 2;
      multiply(rows, head_dim / kStep, work_.queries + row * head_dim, head_dim, keys, keys + 8 * head_dim, kStepPairs, work_.scores + k, kKeyTile);
    }
    for (long r = row; r < row + rows; ++r) {
      ahead.step();
      const Span span = r < end_row ? span_of(r) : Span{0, 0};
      const Reduced reduced = soften(work_.scores + (r - row) * kKeyTile, span, seen, args_.scale, work_.weights + (r - row) * kKeyTile);
      if (r < end_row) out.maxima[r] = reduced.maximum, out.totals[r] = reduced.total;
    }
    const int32_t* values = work_.values + seen.first * head_dim / 2;
    for (long d = 0; d < head_dim; d += kStep) {
      const int32_t* column = values + d / 16 * kStepPairs;
      multiply(rows, (seen.last - seen.first) / kStep, work_.weights + seen.first, kKeyTile, column, column + kStepPairs, head_dim / 16 * kStepPairs,
               sums + d, head_dim);
    }
    if (odd.any()) odd.add_values(of_, tile_, key_tile, work_.offsets, work_.weights, row, end_row, sums, head_dim);
  }

  const Sequences<uint16_t>& of_;
  const AttentionArgs& args_;
  const QueryTile& tile_;
  const long real_rows_;
  const Workspace& work_;
  TileShape shape_;
  long head_ = 0, found_key_tile_ = -1, found_head_ = 0;  // whose keys `offsets` has
};

}  // namespace
}  // namespace cantata
