// Attention in fp32: queries, keys and values are widened, scores are sums over the dimensions in their order.
#pragma once

#include <stdint.h>

#include "activations.h"
#include "attention.h"
#include "ops.h"
#include "simd.h"
#include "workspace.h"

namespace cantata {
namespace {

constexpr int kScoreRows = kLanes == 16 ? 8 : 4;
constexpr int kValueRows = 4;
constexpr int kValueVectors = kManyRegisters ? 4 : 2;
constexpr long kKeyGroup = 2 * kLanes;  // keys whose dimensions are transposed together
constexpr long kValueGroup = 32;        // keys whose values are widened together

// keys[lane][...] → panel[dimension][lane], kLanes keys of a panel that is kKeyGroup wide.
inline void transpose_keys(const float* const* keys, long head_dim, float* panel) {
  long d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) {
    IntVec rows[kLanes];
#pragma GCC unroll 16
    for (int lane = 0; lane < kLanes; ++lane) rows[lane] = (IntVec)load(keys[lane] + d);
    transpose(rows);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store(panel + (d + i) * kKeyGroup, (Vec)rows[i]);
  }
  for (; d < head_dim; ++d) {
    for (int lane = 0; lane < kLanes; ++lane) panel[d * kKeyGroup + lane] = keys[lane][d];
  }
}

inline void transpose_keys(const uint16_t* const* keys, long head_dim, float* panel) {
  const IntVec upper = IntVec{} + (int)0xFFFF0000;
  long d = 0;
  for (; d + 2 * kLanes <= head_dim; d += 2 * kLanes) {
    IntVec rows[kLanes];  // pairs of dimensions, the even one below
#pragma GCC unroll 16
    for (int lane = 0; lane < kLanes; ++lane) __builtin_memcpy(&rows[lane], keys[lane] + d, sizeof rows[lane]);
    transpose(rows);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      store(panel + (d + 2 * i) * kKeyGroup, (Vec)(rows[i] << 16));
      store(panel + (d + 2 * i + 1) * kKeyGroup, (Vec)(rows[i] & upper));
    }
  }
  for (; d < head_dim; ++d) {
    for (int lane = 0; lane < kLanes; ++lane) panel[d * kKeyGroup + lane] = widen(keys[lane][d]);
  }
}

// kScoreRows queries times a panel of kKeyGroup keys; a score is one sum over the dimensions in their order.
inline void score(const float* queries, const float* panel, long head_dim, float* scores) {
  Vec total[kScoreRows][2] = {};
  for (long d = 0; d < head_dim; ++d) {
    const Vec low = load(panel + d * kKeyGroup), high = load(panel + d * kKeyGroup + kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kScoreRows; ++r) {
      const Vec query = broadcast(queries[r * head_dim + d]);
      total[r][0] += query * low;
      total[r][1] += query * high;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kScoreRows; ++r) {
    store(scores + r * kKeyTile, total[r][0]);
    store(scores + r * kKeyTile + kLanes, total[r][1]);
  }
}

// sums[kValueRows][width] += weights of num_keys keys times their values [num_keys][width].
inline void add_values(const float* weights, const float* values, long num_keys, long width, float* sums) {
  for (long column = 0; column < width; column += kValueVectors * kLanes) {
    Vec total[kValueRows][kValueVectors];
#pragma GCC unroll 4
    for (int r = 0; r < kValueRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kValueVectors; ++v) total[r][v] = load(sums + r * width + column + v * kLanes);
    }
    for (long key = 0; key < num_keys; ++key) {
      Vec value[kValueVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kValueVectors; ++v) value[v] = load(values + key * width + column + v * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < kValueRows; ++r) {
        const Vec weight = broadcast(weights[r * kKeyTile + key]);
#pragma GCC unroll 4
        for (int v = 0; v < kValueVectors; ++v) total[r][v] += weight * value[v];
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kValueRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kValueVectors; ++v) store(sums + r * width + column + v * kLanes, total[r][v]);
    }
  }
}

// A row of scores → weights relative to the maximum of the row's span; zeros in the rest of `all`. Returns (maximum, sum of weights).
inline Reduced soften(float* scores, Span span, Span all) {
  IntVec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  const long begin = span.first / kLanes * kLanes;
  Vec highest = broadcast(kNothing);
  for (long k = begin; k < span.last; k += kLanes) {
    const IntVec key = lane + (int)k;
    const Vec here = (key >= (int)span.first) & (key < (int)span.last) ? load(scores + k) : broadcast(kNothing);
    store(scores + k, here);
    highest = here > highest ? here : highest;
  }
  float maximum = kNothing;
  for (int i = 0; i < kLanes; ++i) maximum = highest[i] > maximum ? highest[i] : maximum;
  // Without a number among them there is no maximum; NaN must come through, minus infinity as zero.
  const Vec shift = broadcast(maximum == kNothing ? 0.0f : maximum);
  Vec total = {};
  for (long k = begin; k < span.last; k += kLanes) {
    const Vec weight = exponential_or_zero(load(scores + k) - shift);
    store(scores + k, weight);
    total += weight;
  }
  for (long k = all.first / kLanes * kLanes; k < begin; k += kLanes) store(scores + k, Vec{});
  for (long k = round_up(span.last, kLanes); k < all.last; k += kLanes) store(scores + k, Vec{});
  return {maximum, sum(total)};
}

template <typename CacheElement>
class Fp32Reducer {
 public:
  typedef CacheElement Element;

  static long width(long head_dim) { return round_up(head_dim, kValueVectors * kLanes); }

  struct Workspace {
    float* queries;  // [rows, head_dim], scaled
    float* scores;   // [rows, kKeyTile]
    float* panel;    // [head_dim, kKeyGroup]
    float* values;   // [kValueGroup, width]
    float* nothing;  // [head_dim] zeros
    long* offsets;   // [kKeyTile]

    Workspace(Layout& layout, long rows, long head_dim)
        : queries(layout.take<float>(rows * head_dim)),
          scores(layout.take<float>(rows * kKeyTile)),
          panel(layout.take<float>(head_dim * kKeyGroup)),
          values(layout.take<float>(kValueGroup * width(head_dim))),
          nothing(layout.take<float>(head_dim)),
          offsets(layout.take<long>(kKeyTile)) {}
  };

  static constexpr long kSteps = kKeyTile / kKeyGroup + kKeyTile / kValueGroup;  // of reduce, about

  Fp32Reducer(const Sequences<Element>& of, const QueryTile& tile, const Workspace& work) : of_(of), args_(of.args), tile_(tile), work_(work) {
    __builtin_memset(work.nothing, 0, sizeof(float) * args_.head_dim);
  }

  void load_queries(long head) {
    const long head_dim = args_.head_dim;
    head_ = head;
    float* to = work_.queries;
    for (long query = 0; query < tile_.num_queries; ++query) {
      const Element* from = of_.queries(tile_.row + query, head);
      for (long i = 0; i < of_.group * head_dim; ++i) *to++ = widen(from[i]) * args_.scale;
    }
    for (float* end = work_.queries + padded_rows() * head_dim; to < end;) *to++ = 0.0f;
  }

  // One key tile for all rows; `ahead` takes its steps meanwhile.
  void reduce(long key_tile, Ahead& ahead, const Softmax& out) const {
    const Span all = of_.visible(tile_, key_tile);
    of_.find(tile_, head_, key_tile, all, work_.offsets);
    score_keys(key_tile, all, ahead);
    const long rows = padded_rows(), real_rows = this->real_rows(), width = Fp32Reducer::width(args_.head_dim);
    for (long row = 0; row < rows; ++row) {
      const Span span = row < real_rows ? of_.visible(tile_.position + row / of_.group, key_tile) : Span{0, 0};
      const Reduced reduced = span.empty() ? Reduced{kNothing, 0.0f} : soften(work_.scores + row * kKeyTile, span, all);
      if (span.empty()) {
        for (long k = all.first / kLanes * kLanes; k < all.last; k += kLanes) store(work_.scores + row * kKeyTile + k, Vec{});
      }
      out.maxima[row] = reduced.maximum;
      out.totals[row] = reduced.total;
    }
    __builtin_memset(out.sums, 0, sizeof(float) * rows * width);
    OddKeys odd;
    for (long k = all.first; k < all.last; k += kValueGroup) {
      ahead.step();
      const long num_keys = all.last - k < kValueGroup ? all.last - k : kValueGroup;
      if (!widen_group(k, num_keys)) leave_out(k, num_keys, odd);
      for (long row = 0; row < real_rows; row += kValueRows) {
        add_values(work_.scores + row * kKeyTile + k, work_.values, num_keys, width, out.sums + row * width);
      }
    }
    if (odd.any()) odd.add_values(of_, tile_, key_tile, work_.offsets, work_.scores, 0, real_rows, out.sums, width);
  }

 private:
  long real_rows() const { return tile_.num_queries * of_.group; }
  long padded_rows() const { return round_up(real_rows(), kLanes); }

  void score_keys(long key_tile, Span all, Ahead& ahead) const {
    const long head_dim = args_.head_dim, real_rows = this->real_rows();
    for (long k = all.first / kKeyGroup * kKeyGroup; k < all.last; k += kKeyGroup) {
      ahead.step();
      for (long half = 0; half < 2; ++half) {
        const Element* keys[kLanes];
        for (long lane = 0; lane < kLanes; ++lane) {
          const long key = k + half * kLanes + lane;
          const bool there = key >= all.first && key < all.last;
          keys[lane] = there ? static_cast<const Element*>(args_.keys) + work_.offsets[key] : reinterpret_cast<const Element*>(work_.nothing);
        }
        transpose_keys(keys, head_dim, work_.panel + half * kLanes);
      }
      for (long row = 0; row < real_rows; row += kScoreRows) {
        const long last_query = (row + kScoreRows < real_rows ? row + kScoreRows : real_rows) - 1;
        if (of_.visible(tile_.position + last_query / of_.group, key_tile).last <= k) continue;
        score(work_.queries + row * head_dim, work_.panel, head_dim, work_.scores + row * kKeyTile + k);
      }
    }
  }

  // Whether all are finite.
  bool widen_group(long k, long num_keys) const {
    const long head_dim = args_.head_dim, width = Fp32Reducer::width(head_dim);
    Vec zeros = {};  // not zero where anything is not finite
    for (long key = 0; key < num_keys; ++key) {
      const Element* from = static_cast<const Element*>(args_.values) + work_.offsets[k + key];
      float* to = work_.values + key * width;
      long d = 0;
      for (; d + kLanes <= head_dim; d += kLanes) store(to + d, load_wide(from + d));
      for (; d < head_dim; ++d) to[d] = widen(from[d]);
      for (; d < width; ++d) to[d] = 0.0f;
      for (d = 0; d < head_dim; d += kLanes) zeros += load(to + d) * 0.0f;
    }
    return sum(zeros) == 0.0f;
  }

  void leave_out(long k, long num_keys, OddKeys& odd) const {
    const long width = Fp32Reducer::width(args_.head_dim);
    for (long key = 0; key < num_keys; ++key) {
      for (long d = 0; d < width; ++d) {
        float& value = work_.values[key * width + d];
        if (__builtin_isfinite(value)) continue;
        value = 0.0f;
        odd.add(k + key);
      }
    }
  }

  const Sequences<Element>& of_;
  const AttentionArgs& args_;
  const QueryTile& tile_;
  const Workspace& work_;
  long head_ = 0;
};

int attention(const AttentionArgs& args) {
  return args.type == kBfloat16 ? Attention<Fp32Reducer<uint16_t>>(args).run() : Attention<Fp32Reducer<float>>(args).run();
}

}  // namespace
}  // namespace cantata
