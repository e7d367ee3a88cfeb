// Weights in row groups times rows of fp32 activations. The 32 products of a group of columns are added in order (in kParts sums where the
// format has several), then scaled and added to the total: the same operations whatever the number of tokens and threads.
#pragma once

#include <stdint.h>

#include "simd.h"
#include "weights.h"

namespace cantata {
namespace {

constexpr long kSlice = 256;  // columns decoded at a time for many tokens: 16 KiB, half of a first-level cache

template <typename Weights, int kTokens, int kGroups>
void few_tokens(const Weights& weights, long group, const float* x, Outputs* y) {
  constexpr int kParts = Weights::kParts;
  const uint8_t *blocks[kGroups], *codes[kGroups];
  for (int g = 0; g < kGroups; ++g) {
    blocks[g] = weights.group(group + g);
    if constexpr (Weights::kScaled) codes[g] = weights.scale_codes(group + g);
  }
  constexpr long kStepBytes = 4 * Weights::kChunkBytes;
  const long group_bytes = weights.width / 32 * kStepBytes;
  Vec total[kGroups][kTokens][kVectors] = {};
  for (long k = 0; k < weights.width; k += 32) {
    const long at = k / 32 * kStepBytes, ahead = at + prefetch_distance(at, group_bytes, kGroups);
    Vec part[kGroups][kTokens][kVectors][kParts] = {};
    for (int chunk = 0; chunk < 4; ++chunk) {
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g) {
        prefetch<Weights::kChunkBytes>(blocks[g] + ahead + chunk * Weights::kChunkBytes);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          Vec decoded[8];
          Weights::decode(blocks[g] + (k / 8 + chunk) * Weights::kChunkBytes, v, decoded);
#pragma GCC unroll 8
          for (int i = 0; i < 8; ++i) {
#pragma GCC unroll 8
            for (int t = 0; t < kTokens; ++t) {
              part[g][t][v][i % kParts] += decoded[i] * Weights::activation(x + t * weights.width + k + 8 * chunk, i);
            }
          }
        }
      }
    }
    for (int g = 0; g < kGroups; ++g) {
      for (int t = 0; t < kTokens; ++t) {
        for (int v = 0; v < kVectors; ++v) {
          const Vec sum = Weights::fold(part[g][t][v]);
          if constexpr (Weights::kScaled) {
            total[g][t][v] += sum * scales(codes[g] + k / 32 * kRows + kLanes * v);
          } else {
            total[g][t][v] += sum;
          }
        }
      }
    }
  }
  for (int g = 0; g < kGroups; ++g) {
    for (int t = 0; t < kTokens; ++t) {
      for (int v = 0; v < kVectors; ++v) store(y[t] + kRows * g + kLanes * v, total[g][t][v]);
    }
  }
}

// Decoded columns of a row group: the vectors of each 8 columns in the order of `decode`, factors [columns / 32][16].
struct Panel {
  alignas(64) float values[kSlice * kRows];
  alignas(64) float factors[kSlice / 32 * kRows];
};

// Adds `width` decoded columns times kTokens tokens to y.
template <typename Weights, int kTokens>
void panel_tile(const Panel& panel, const float* x, long stride, long width, float* y) {
  constexpr int kParts = Weights::kParts;
  for (long k = 0; k < width; k += 32) {
    Vec part[kTokens][kVectors][kParts] = {};
    for (long chunk = k / 8; chunk < k / 8 + 4; ++chunk) {
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        Vec w[kVectors];
        for (int v = 0; v < kVectors; ++v) w[v] = load(panel.values + ((chunk * kVectors + v) * 8 + i) * kLanes);
#pragma GCC unroll 16
        for (int t = 0; t < kTokens; ++t) {
          const Vec activation = Weights::activation(x + t * stride + 8 * chunk, i);
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) part[t][v][i % kParts] += w[v] * activation;
        }
      }
    }
    for (int t = 0; t < kTokens; ++t) {
      for (int v = 0; v < kVectors; ++v) {
        float* total = y + t * kBlockGroups * kRows + kLanes * v;
        const Vec sum = Weights::fold(part[t][v]);
        if constexpr (Weights::kScaled) {
          store(total, load(total) + sum * load(panel.factors + k / 32 * kRows + kLanes * v));
        } else {
          store(total, load(total) + sum);
        }
      }
    }
  }
}

template <typename Weights, int kTokens>
void panel_rest(long left, const Panel& panel, const float* x, long stride, long width, float* y) {
  if constexpr (kTokens > 0) {
    if (left == kTokens) {
      panel_tile<Weights, kTokens>(panel, x, stride, width, y);
    } else {
      panel_rest<Weights, kTokens - 1>(left, panel, x, stride, width, y);
    }
  }
}

template <typename Weights>
void many_tokens(const Weights& weights, long group, const float* x, long num_tokens, float* y) {
  // As many as the registers hold sums of, beside weights and activations.
  constexpr int kTile = CANTATA_ISA == 0 ? 2 : CANTATA_ISA == 3 ? 6 : 12 / (kVectors * Weights::kParts);
  Panel panel;
  for (long t = 0; t < num_tokens; ++t) __builtin_memset(y + t * kBlockGroups * kRows, 0, sizeof(RowGroup));
  for (long first = 0; first < weights.width; first += kSlice) {
    const long width = weights.width - first < kSlice ? weights.width - first : kSlice;
    const uint8_t* blocks = weights.group(group) + first / 8 * Weights::kChunkBytes;
    for (long chunk = 0; chunk < width / 8; ++chunk) {
      prefetch<Weights::kChunkBytes>(blocks + chunk * Weights::kChunkBytes + kPrefetchBytes);
      for (int v = 0; v < kVectors; ++v) {
        Vec decoded[8];
        Weights::decode(blocks + chunk * Weights::kChunkBytes, v, decoded);
        for (int i = 0; i < 8; ++i) store(panel.values + ((chunk * kVectors + v) * 8 + i) * kLanes, decoded[i]);
      }
    }
    if constexpr (Weights::kScaled) {
      const uint8_t* codes = weights.scale_codes(group) + first / 32 * kRows;
      for (long lane = 0; lane < width / 32 * kRows; lane += kLanes) store(panel.factors + lane, scales(codes + lane));
    }
    long t = 0;
    for (; t + kTile <= num_tokens; t += kTile) {
      panel_tile<Weights, kTile>(panel, x + t * weights.width + first, weights.width, width, y + t * kBlockGroups * kRows);
    }
    panel_rest<Weights, kTile - 1>(num_tokens - t, panel, x + t * weights.width + first, weights.width, width, y + t * kBlockGroups * kRows);
  }
}

class Fp32 {
 public:
  typedef float Activation;

  // num_groups row groups (at most kBlockGroups) from `group` on, times num_tokens (at most kMaxTokens) rows of x, one behind the other;
  // y [tokens].
  template <typename Weights>
  static void multiply(const Weights& weights, long group, int num_groups, const float* x, long num_tokens, Outputs* y) {
    constexpr int kFewTokens = Weights::kParts == 1 ? 4 : 2;
    if (num_tokens <= kFewTokens) return few<Weights, kFewTokens>(weights, group, num_groups, x, num_tokens, y);
    for (int g = 0; g < num_groups; ++g) many_tokens(weights, group + g, x, num_tokens, &y[0][kRows * g]);
  }

 private:
  template <typename Weights, int kTokens>
  static void few(const Weights& weights, long group, int num_groups, const float* x, long num_tokens, Outputs* y) {
    if constexpr (kTokens > 1) {
      if (num_tokens < kTokens) return few<Weights, kTokens - 1>(weights, group, num_groups, x, num_tokens, y);
    }
    // Decoding MXFP4 gains from more to do at once; what is read faster loses by reading at four places. NEON has registers for one group.
    constexpr int kPair = CANTATA_ISA == 3 ? 1 : 2, kOfOneToken = Weights::kScaled ? kPair * kBlockGroups / 2 : kPair;
    side_by_side<Weights, kTokens, kTokens == 1 ? kOfOneToken : CANTATA_ISA == 2 ? 2 : 1>(weights, group, num_groups, x, y);
  }

  // kGroups at a time, then the rest.
  template <typename Weights, int kTokens, int kGroups>
  static void side_by_side(const Weights& weights, long group, int num_groups, const float* x, Outputs* y) {
    const auto results = [&](int g) { return (Outputs*)&y[0][g * kRows]; };
    int g = 0;
    for (; g + kGroups <= num_groups; g += kGroups) few_tokens<Weights, kTokens, kGroups>(weights, group + g, x, results(g));
    if constexpr (kGroups > 1) {
      if (g < num_groups) side_by_side<Weights, kTokens, kGroups / 2>(weights, group + g, num_groups - g, x, results(g));
    }
  }
};

}  // namespace
}  // namespace cantata
