// Sampling as kernels/sampling/reference.py defines it, without sorting the vocabulary.
//
// Each row is cut into blocks of kTokenBlock tokens, reduced in parallel: largest logit, sum of weights in fp64. A filter's end is found by
// threshold: tokens that cannot be kept are left out by a bound, then a histogram over the bits of the logits is refined three times. All
// sums run over blocks and tokens in their order, so a row's token does not depend on the batch or the threads.
#pragma once

#include <stdint.h>

#include "activations.h"
#include "ops.h"
#include "pool.h"
#include "scratch.h"
#include "simd.h"

namespace cantata {
namespace {

constexpr long kTokenBlock = 512;

inline long num_token_blocks(long vocab) { return (vocab + kTokenBlock - 1) / kTokenBlock; }

struct Candidate {
  uint32_t key;  // orders as the logit does
  int32_t id;
  float weight;
};

// Ascending with the value; both zeros are equal.
inline uint32_t ordered(float value) {
  value += 0.0f;
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The tokens of a block, padded with minus infinity to whole vectors; `count` of them are real.
struct TokenBlock {
  long first, count;
  alignas(64) float logits[kTokenBlock];

  TokenBlock(const float* row, long vocab, long block) : first(block * kTokenBlock) {
    count = vocab - first < kTokenBlock ? vocab - first : kTokenBlock;
    __builtin_memcpy(logits, row + first, sizeof(float) * count);
    for (long i = count; i % kLanes != 0; ++i) logits[i] = -__builtin_inff();
  }
};

inline bool any(IntVec mask) {
  int32_t found = 0;
  for (int lane = 0; lane < kLanes; ++lane) found |= mask[lane];
  return found != 0;
}

inline float block_maximum(const TokenBlock& block) {
  Vec highest = broadcast(-__builtin_inff());
  for (long i = 0; i < block.count; i += kLanes) {
    const Vec here = load(block.logits + i);
    highest = here > highest ? here : highest;
  }
  float maximum = -__builtin_inff();
  for (int lane = 0; lane < kLanes; ++lane) maximum = highest[lane] > maximum ? highest[lane] : maximum;
  return maximum;
}

// e^((logit - maximum) / temperature), 0 below min_p; written over the logits. Returns their sum.
inline double to_weights(TokenBlock& block, float maximum, float temperature, float min_p) {
  for (long i = 0; i < block.count; i += kLanes) {
    const Vec weight = exponential_or_zero((load(block.logits + i) - maximum) / temperature);
    store(block.logits + i, weight < min_p ? Vec{} : weight);
  }
  double total = 0.0;
  typedef float Part __attribute__((vector_size(kLanes * 2)));
  typedef double Wide __attribute__((vector_size(kLanes * 4)));
  Wide sums = {};
  for (long i = 0; i < block.count; i += kLanes / 2) {
    Part part;
    __builtin_memcpy(&part, block.logits + i, sizeof part);
    sums += __builtin_convertvector(part, Wide);
  }
  for (int lane = 0; lane < kLanes / 2; ++lane) total += sums[lane];
  return total;
}

// Philox4x32-10: the first word for a seed and an output position, as a number in (0, 1).
inline double uniform(uint64_t seed, uint64_t position) {
  uint32_t c0 = (uint32_t)position, c1 = (uint32_t)(position >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = (uint64_t)c0 * 0xD2511F53u, b = (uint64_t)c2 * 0xCD9E8D57u;
    const uint32_t next0 = (uint32_t)(b >> 32) ^ c1 ^ k0, next2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
    c1 = (uint32_t)b;
    c3 = (uint32_t)a;
    c0 = next0;
    c2 = next2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return ((double)c0 + 0.5) / 4294967296.0;
}

// The candidates in front of the order (logit descending, id ascending) up to a number of them, or up to a sum of weights: those with a key
// above `key`, and the first `num_ties` of those at it. Candidates are in ascending order of ids.
struct Threshold {
  uint32_t key;
  long num_ties;
};

template <bool kByWeight>
Threshold find_threshold(const Candidate* candidates, long count, double wanted) {
  constexpr int kShifts[3] = {21, 10, 0};
  long counts[2048];
  double weights[2048];
  uint32_t prefix = 0, mask = 0;
  double above = 0.0;  // number or weight of the candidates in front of the bin in hand
  for (const int shift : kShifts) {
    const uint32_t bins = shift == 0 ? 1024 : 2048;
    __builtin_memset(counts, 0, sizeof(long) * bins);
    if (kByWeight) __builtin_memset(weights, 0, sizeof(double) * bins);
    for (long i = 0; i < count; ++i) {
      if ((candidates[i].key & mask) != prefix) continue;
      const uint32_t bin = candidates[i].key >> shift & (bins - 1);
      ++counts[bin];
      if (kByWeight) weights[bin] += candidates[i].weight;
    }
    // The last bin with anything in it takes what rounding leaves.
    long bin = -1;
    for (long next = (long)bins - 1; next >= 0; --next) {
      if (counts[next] == 0) continue;
      if (bin >= 0) above += kByWeight ? weights[bin] : (double)counts[bin];
      bin = next;
      if (above + (kByWeight ? weights[bin] : (double)counts[bin]) >= wanted) break;
    }
    prefix |= (uint32_t)bin << shift;
    mask |= (bins - 1) << shift;
    if (shift == 0) {
      // All at this key weigh the same.
      const double each = kByWeight ? weights[bin] / (double)counts[bin] : 1.0;
      long ties = 1;
      if (each > 0.0) {
        while (ties < counts[bin] && above + each * (double)ties < wanted) ++ties;
      }
      return {prefix, ties};
    }
  }
  return {0, 0};
}

// Keeps what the threshold keeps, in the same order; returns how many.
inline long cut(Candidate* candidates, long count, Threshold threshold) {
  long kept = 0, ties = 0;
  for (long i = 0; i < count; ++i) {
    const bool tie = candidates[i].key == threshold.key && ties < threshold.num_ties;
    ties += tie;
    if (tie || candidates[i].key > threshold.key) candidates[kept++] = candidates[i];
  }
  return kept;
}

inline uint32_t ordered_or_least(float value) { return ordered(value == value ? value : -__builtin_inff()); }

// A lower bound of the row's k-th largest logit: the k-th largest of the blocks' maxima, minus infinity if there are fewer blocks.
inline float kth_largest_bound(const float* maxima, long num_blocks, long k, float* scratch) {
  if (k > num_blocks) return -__builtin_inff();
  long count = 0;
  for (long block = 0; block < num_blocks; ++block) {
    long place = count < k ? count++ : k;
    if (place == k && !(maxima[block] > scratch[--place])) continue;
    for (; place > 0 && maxima[block] > scratch[place - 1]; --place) scratch[place] = scratch[place - 1];
    scratch[place] = maxima[block];
  }
  return scratch[k - 1];
}

inline float row_maximum(const float* maxima, long num_blocks) {
  float maximum = maxima[0];
  for (long block = 1; block < num_blocks; ++block) maximum = maxima[block] > maximum ? maxima[block] : maximum;
  return maximum;
}

// Blocks [begin, end), counted over all rows: `body(row, first, last)` for each row's own.
template <typename Body>
inline void row_by_row(long begin, long end, long num_blocks, const Body& body) {
  while (begin < end) {
    const long row = begin / num_blocks, first = begin % num_blocks;
    const long last = first + end - begin < num_blocks ? first + end - begin : num_blocks;
    body(row, first, last);
    begin += last - first;
  }
}

inline long first_largest(const float* row, const float* maxima, long vocab) {
  const long num_blocks = num_token_blocks(vocab);
  const float maximum = row_maximum(maxima, num_blocks);
  for (long block = 0; block < num_blocks; ++block) {
    if (maxima[block] != maximum) continue;
    for (long id = block * kTokenBlock; id < vocab; ++id) {
      if (row[id] == maximum) return id;
    }
  }
  return 0;  // no number among them
}

struct Sampler {
  const SampleArgs& args;
  const long num_blocks;

  const float* logits(long row) const { return args.logits + row * args.row_stride; }
  const float* maxima(long row) const { return args.block_maxima + row * num_blocks; }
  const double* sums(long row) const { return args.block_sums + row * num_blocks; }
  bool is_random(long row) const { return args.temperature != nullptr && args.temperature[row] > 0.0f; }
  float min_p(long row) const { return args.min_p == nullptr ? 0.0f : args.min_p[row]; }
  float top_p(long row) const { return args.top_p == nullptr ? 1.0f : args.top_p[row]; }
  long top_k(long row) const {
    return args.top_k == nullptr || args.top_k[row] <= 0 || args.top_k[row] >= args.vocab ? args.vocab : args.top_k[row];
  }

  void run() const {
    auto reduce_maxima = [&](long begin, long end) {
      for (long i = begin; i < end; ++i) {
        args.block_maxima[i] = block_maximum(TokenBlock(logits(i / num_blocks), args.vocab, i % num_blocks));
      }
    };
    parallel_for(args.num_rows * num_blocks, 32, reduce_maxima);
    auto reduce_sums = [&](long begin, long end) {
      row_by_row(begin, end, num_blocks, [&](long row, long first, long last) {
        if (!is_random(row)) return;
        const float maximum = row_maximum(maxima(row), num_blocks);
        for (long b = first; b < last; ++b) {
          TokenBlock block(logits(row), args.vocab, b);
          args.block_sums[row * num_blocks + b] = to_weights(block, maximum, args.temperature[row], min_p(row));
        }
      });
    };
    if (args.temperature != nullptr) parallel_for(args.num_rows * num_blocks, 32, reduce_sums);
    auto choose = [&](long begin, long end) {
      for (long row = begin; row < end; ++row) args.token_ids[row] = token(row);
    };
    parallel_for(args.num_rows, 1, choose);
  }

  long token(long row) const {
    if (!is_random(row)) return first_largest(logits(row), maxima(row), args.vocab);
    return top_k(row) < args.vocab || top_p(row) < 1.0f ? among_leading(row) : among_all(row);
  }

  long among_all(long row) const {
    const double target = number(row) * row_weight(row);
    double before = 0.0;
    long last = num_blocks - 1;
    while (last > 0 && !(sums(row)[last] > 0.0)) --last;
    long chosen = 0;
    while (chosen < last && !(before + sums(row)[chosen] > target)) before += sums(row)[chosen++];
    TokenBlock block(logits(row), args.vocab, chosen);
    to_weights(block, row_maximum(maxima(row), num_blocks), args.temperature[row], min_p(row));
    // The last token of any weight, if the sum of the block, rounded otherwise, was that much larger.
    long id = block.first;
    for (long i = 0; i < block.count; ++i) {
      if (!(block.logits[i] > 0.0f)) continue;
      id = block.first + i;
      before += block.logits[i];
      if (before > target) break;
    }
    return id;
  }

  // The tokens of a row that have at least this logit, this weight and any weight, ascending; returns how many.
  long collect(long row, float least_logit, float least_weight, Candidate* candidates) const {
    const float maximum = row_maximum(maxima(row), num_blocks);
    long count = 0;
    for (long b = 0; b < num_blocks; ++b) {
      if (maxima(row)[b] < least_logit) continue;
      if (exponential_or_zero((maxima(row)[b] - maximum) / args.temperature[row]) < least_weight) continue;
      TokenBlock block(logits(row), args.vocab, b);
      to_weights(block, maximum, args.temperature[row], min_p(row));
      const float* values = logits(row) + block.first;
      for (long from = 0; from < block.count; from += kLanes) {
        if (!any(load(block.logits + from) >= least_weight)) continue;
        const long end = from + kLanes < block.count ? from + kLanes : block.count;
        for (long i = from; i < end; ++i) {
          candidates[count] = {ordered(values[i]), (int32_t)(block.first + i), block.logits[i]};
          count += (values[i] >= least_logit) & (block.logits[i] >= least_weight) & (block.logits[i] > 0.0f);
        }
      }
    }
    return count;
  }

  long among_leading(long row) const {
    const long k = top_k(row);
    const float p = top_p(row);
    Candidate* candidates = static_cast<Candidate*>(thread_scratch(sizeof(Candidate) * (args.vocab + kTokenBlock) + sizeof(float) * num_blocks));
    float* bounds = reinterpret_cast<float*>(candidates + args.vocab + kTokenBlock);
    constexpr float kAny = -__builtin_inff();
    long count = 0;
    if (k < args.vocab) {
      count = collect(row, kth_largest_bound(maxima(row), num_blocks, k, bounds), 0.0f, candidates);
    } else {
      // Mostly those of a ten-thousandth of the largest weight are enough. Those of the next bound are always: all below it together weigh less
      // than what top_p leaves out, half of it for the rounding of the sums.
      count = collect(row, kAny, 1e-4f, candidates);
      if (!(weight_of(candidates, count) > 1.000001 * (double)p * row_weight(row))) {
        count = collect(row, kAny, (float)(0.5 * (1.0 - (double)p) * row_weight(row) / (double)args.vocab), candidates);
      }
    }
    if (k < count) count = cut(candidates, count, find_threshold<false>(candidates, count, (double)k));
    if (p < 1.0f && count > 0) {
      const double wanted = (double)p * (k < args.vocab ? weight_of(candidates, count) : row_weight(row));
      count = cut(candidates, count, find_threshold<true>(candidates, count, wanted));
    }
    if (count == 0) return first_largest(logits(row), maxima(row), args.vocab);
    const double target = number(row) * weight_of(candidates, count);
    double sum = 0.0;
    for (long i = 0; i < count; ++i) {
      sum += candidates[i].weight;
      if (sum > target) return candidates[i].id;
    }
    return candidates[count - 1].id;
  }

  static double weight_of(const Candidate* candidates, long count) {
    double total = 0.0;
    for (long i = 0; i < count; ++i) total += candidates[i].weight;
    return total;
  }

  double number(long row) const { return uniform((uint64_t)args.seeds[row], (uint64_t)args.output_positions[row]); }

  double row_weight(long row) const {
    double total = 0.0;
    for (long block = 0; block < num_blocks; ++block) total += sums(row)[block];
    return total;
  }
};

void sample(const SampleArgs& args) { Sampler{args, num_token_blocks(args.vocab)}.run(); }

// Log probabilities of chosen tokens and of the num_top most likely ones, those by (logit descending, id ascending). NaN is least likely.
void logprobs(const LogprobArgs& args) {
  const long num_blocks = num_token_blocks(args.vocab), num_top = args.num_top;
  const auto logits = [&](long i) { return args.logits + args.rows[i] * args.row_stride; };
  auto reduce_maxima = [&](long begin, long end) {
    for (long i = begin; i < end; ++i) args.block_maxima[i] = block_maximum(TokenBlock(logits(i / num_blocks), args.vocab, i % num_blocks));
  };
  parallel_for(args.num_rows * num_blocks, 32, reduce_maxima);
  auto reduce_sums = [&](long begin, long end) {
    row_by_row(begin, end, num_blocks, [&](long i, long first, long last) {
      const float maximum = row_maximum(args.block_maxima + i * num_blocks, num_blocks);
      for (long b = first; b < last; ++b) {
        TokenBlock block(logits(i), args.vocab, b);
        args.block_sums[i * num_blocks + b] = to_weights(block, maximum, 1.0f, 0.0f);
      }
    });
  };
  parallel_for(args.num_rows * num_blocks, 32, reduce_sums);
  auto finish = [&](long begin, long end) {
    for (long i = begin; i < end; ++i) {
      const float* row = logits(i);
      const float* maxima = args.block_maxima + i * num_blocks;
      double total = 0.0;
      for (long block = 0; block < num_blocks; ++block) total += args.block_sums[i * num_blocks + block];
      const double normaliser = (double)row_maximum(maxima, num_blocks) + __builtin_log(total);
      args.logprobs[i] = (float)((double)row[args.token_ids[args.rows[i]]] - normaliser);
      if (num_top == 0) continue;
      Candidate* candidates = static_cast<Candidate*>(thread_scratch(sizeof(Candidate) * (args.vocab + 1) + sizeof(float) * num_blocks));
      const float least = kth_largest_bound(maxima, num_blocks, num_top, reinterpret_cast<float*>(candidates + args.vocab + 1));
      long count = 0;
      for (long block = 0; block < num_blocks; ++block) {
        if (maxima[block] < least) continue;
        for (long id = block * kTokenBlock; id < (block + 1) * kTokenBlock && id < args.vocab; ++id) {
          candidates[count] = {ordered_or_least(row[id]), (int32_t)id, 0.0f};
          count += candidates[count].key >= ordered(least);
        }
      }
      if (num_top < count) count = cut(candidates, count, find_threshold<false>(candidates, count, (double)num_top));
      for (long j = 0; j < count; ++j) {
        long place = j;
        for (; place > 0 && candidates[j].key > ordered_or_least(row[args.top_ids[i * num_top + place - 1]]); --place) {
          args.top_ids[i * num_top + place] = args.top_ids[i * num_top + place - 1];
        }
        args.top_ids[i * num_top + place] = candidates[j].id;
      }
      for (long j = 0; j < num_top; ++j) {
        args.top_logprobs[i * num_top + j] = (float)((double)row[args.top_ids[i * num_top + j]] - normaliser);
      }
    }
  };
  parallel_for(args.num_rows, 1, finish);
}

}  // namespace
}  // namespace cantata
