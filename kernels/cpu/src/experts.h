// The mixture of experts on MXFP4 weights. Rows are sorted by expert first; an engine (fp32.h, bf16.h) multiplies them with row groups.
#pragma once

#include <stdint.h>

#include "activations.h"
#include "ops.h"
#include "pool.h"
#include "scratch.h"
#include "simd.h"
#include "weights.h"
#include "workspace.h"

namespace cantata {
namespace {

// The weights of one expert.
inline Mxfp4Weights expert_weights(const Mxfp4& all, long expert, long rows, long width) {
  return {all.blocks + expert * rows * width / 2, all.scales + expert * rows * width / 32, width};
}

// `count` values of fp32 or bf16, from `first`.
inline void widen_values(const void* values, int32_t type, long first, long count, float* out) {
  if (type == kBfloat16) {
    for (long i = 0; i < count; ++i) out[i] = widen(static_cast<const uint16_t*>(values)[first + i]);
  } else {
    __builtin_memcpy(out, static_cast<const float*>(values) + first, count * sizeof(float));
  }
}

inline void copy_row(const void* from, int32_t type, long first, long count, float* to) { widen_values(from, type, first, count, to); }

inline void copy_row(const void* from, int32_t /* kBfloat16 */, long first, long count, uint16_t* to) {
  __builtin_memcpy(to, static_cast<const uint16_t*>(from) + first, count * sizeof(uint16_t));
}

// Rows even = gate, odd = up; biases are added. `count` activations, at most 16.
template <typename Activation>
inline void swiglu(const float* rows, const float* bias, int count, float limit, float alpha, Activation* out) {
  constexpr int kWidth = 16;
  alignas(64) float gate[kWidth] = {}, up[kWidth] = {}, result[kWidth];
  for (int i = 0; i < count; ++i) {
    const float g = rows[2 * i] + bias[2 * i], u = rows[2 * i + 1] + bias[2 * i + 1];
    gate[i] = g > limit ? limit : g;
    up[i] = u > limit ? limit : u < -limit ? -limit : u;
  }
  for (int i = 0; i < kWidth; i += kLanes) {
    const Vec g = load(gate + i);
    store(result + i, (load(up + i) + 1.0f) * (g / (exponential(g * -alpha) + 1.0f)));
  }
  store_values(out, result, count);
}

// Which tokens go to which expert. entries: [pairs] token * top_k + slot, by expert and then by token; starts: [experts + 1].
struct Assignment {
  int32_t* entries;
  int32_t* starts;
  int32_t* hit;  // experts with any token, ascending
  long num_hit;

  long num_entries(long num_experts) const { return starts[num_experts]; }
};

inline void assign(const ExpertsArgs& args, Assignment& result) {
  const long pairs = args.num_tokens * args.top_k;
  for (long expert = 0; expert <= args.num_experts; ++expert) result.starts[expert] = 0;
  const auto local = [&](long pair) { return (long)args.topk_ids[pair] - args.first_expert; };
  for (long pair = 0; pair < pairs; ++pair) {
    const long expert = local(pair);
    if (expert >= 0 && expert < args.num_experts) ++result.starts[expert + 1];
  }
  for (long expert = 0; expert < args.num_experts; ++expert) {
    if (result.starts[expert + 1] > 0) result.hit[result.num_hit++] = (int32_t)expert;
    result.starts[expert + 1] += result.starts[expert];
  }
  // Filling moves each start to its expert's end, which is the next one's start: shifted back below.
  for (long pair = 0; pair < pairs; ++pair) {
    const long expert = local(pair);
    if (expert >= 0 && expert < args.num_experts) result.entries[result.starts[expert]++] = (int32_t)pair;
  }
  for (long expert = args.num_experts; expert > 0; --expert) result.starts[expert] = result.starts[expert - 1];
  result.starts[0] = 0;
}

inline long smaller(long a, long b) { return a < b ? a : b; }

inline long num_blocks(long groups) { return (groups + kBlockGroups - 1) / kBlockGroups; }

// Row groups [first, last) of one expert times its rows of x, a block at a time; `finish(group, number of groups, first token, number of
// tokens, values)` with the token's place among the expert's.
template <typename Engine, typename Weights, typename Finish>
void project(Engine& engine, const Weights& weights, long first, long last, const typename Engine::Activation* x, long num_tokens,
             Finish&& finish) {
  alignas(64) Outputs y[kMaxTokens];
  for (long from = 0; from < num_tokens; from += kMaxTokens) {
    const long count = num_tokens - from < kMaxTokens ? num_tokens - from : kMaxTokens;
    for (long group = first; group < last; group += kBlockGroups) {
      const int num_groups = group + kBlockGroups <= last ? kBlockGroups : (int)(last - group);
      engine.multiply(weights, group, num_groups, x + from * weights.width, count, y);
      finish(group, num_groups, from, count, y);
    }
  }
}

template <typename Activation>
struct ExpertsWorkspace {
  Assignment assignment;
  Activation* rows;         // [pairs, hidden], by expert; those of other ranks' experts are missing
  Activation* activations;  // [pairs, intermediate], likewise
  float* sums;              // [num_tokens, hidden]

  ExpertsWorkspace(Layout& layout, const ExpertsArgs& args) {
    const long pairs = args.num_tokens * args.top_k;
    assignment = {layout.take<int32_t>(pairs), layout.take<int32_t>(args.num_experts + 1), layout.take<int32_t>(args.num_experts), 0};
    rows = layout.take<Activation>(pairs * args.hidden);
    activations = layout.take<Activation>(pairs * args.intermediate);
    sums = args.type == kFloat32 ? static_cast<float*>(args.out) : layout.take<float>(args.num_tokens * args.hidden);
  }
};

template <typename Engine>
void run_experts(const ExpertsArgs& args) {
  typedef typename Engine::Activation Activation;
  Layout size(nullptr);
  ExpertsWorkspace<Activation>(size, args);
  Layout layout(operation_scratch(size.size()));
  ExpertsWorkspace<Activation> work(layout, args);
  assign(args, work.assignment);
  const Assignment& assignment = work.assignment;
  Activation *rows = work.rows, *activations = work.activations;
  float* sums = work.sums;
  const long hidden = args.hidden, width = args.intermediate, num_entries = assignment.num_entries(args.num_experts);

  auto gather = [&](long begin, long end) {
    for (long entry = begin; entry < end; ++entry) {
      copy_row(args.x, args.type, assignment.entries[entry] / args.top_k * hidden, hidden, rows + entry * hidden);
    }
  };
  parallel_for(num_entries, 16, gather);

  const long groups = 2 * width / kRows, blocks = num_blocks(groups);
  auto gate_up = [&](Pieces& pieces) {
    Engine engine;
    for (long begin, end; pieces.take(begin, end);) {
      while (begin < end) {
        const long expert = assignment.hit[begin / blocks], first = begin % blocks;
        const long last = smaller(first + end - begin, blocks);
        const long start = assignment.starts[expert], num_tokens = assignment.starts[expert + 1] - start;
        project(engine, expert_weights(args.gate_up, expert, 2 * width, hidden), kBlockGroups * first, smaller(kBlockGroups * last, groups),
                rows + start * hidden, num_tokens, [&](long group, int num_groups, long from, long count, const Outputs* y) {
                  float bias[kBlockGroups * kRows];
                  widen_values(args.gate_up_bias, args.bias_type, expert * 2 * width + group * kRows, num_groups * kRows, bias);
                  for (long t = 0; t < count; ++t) {
                    Activation* to = activations + (start + from + t) * width + group * kRows / 2;
                    for (int row = 0; row < num_groups * kRows; row += 2 * kRows) {
                      swiglu(y[t] + row, bias + row, (int)smaller(kRows, (num_groups * kRows - row) / 2), args.limit, args.alpha, to + row / 2);
                    }
                  }
                });
        begin += last - first;
      }
    }
  };
  parallel_pieces(assignment.num_hit * blocks, gate_up);

  // Whoever has a piece adds up all experts for its columns, in ascending order of the expert, as the reference does.
  const auto down_columns = [&](Engine& engine, long first, long last) {
    for (long token = 0; token < args.num_tokens; ++token) __builtin_memset(sums + token * hidden + first, 0, (last - first) * sizeof(float));
    for (long index = 0; index < assignment.num_hit; ++index) {
      const long expert = assignment.hit[index], start = assignment.starts[expert], num_tokens = assignment.starts[expert + 1] - start;
      project(engine, expert_weights(args.down, expert, hidden, width), first / kRows, last / kRows, activations + start * width,
              num_tokens, [&](long group, int num_groups, long from, long count, const Outputs* y) {
                float bias[kBlockGroups * kRows];
                widen_values(args.down_bias, args.bias_type, expert * hidden + group * kRows, num_groups * kRows, bias);
                for (long t = 0; t < count; ++t) {
                  const long pair = assignment.entries[start + from + t];
                  const Vec weight = broadcast(args.topk_weights[pair]);
                  float* sum = sums + pair / args.top_k * hidden + group * kRows;
                  for (int i = 0; i < num_groups * kRows; i += kLanes) {
                    const Vec value = load(y[t] + i) + load(bias + i);
                    store(sum + i, load(sum + i) + value * weight);
                  }
                }
              });
    }
    if (args.type == kBfloat16) {
      for (long token = 0; token < args.num_tokens; ++token) {
        store_values(static_cast<uint16_t*>(args.out) + token * hidden + first, sums + token * hidden + first, last - first);
      }
    }
  };
  auto down = [&](Pieces& pieces) {
    Engine engine;
    for (long begin, end; pieces.take(begin, end);) {
      down_columns(engine, kBlockGroups * kRows * begin, smaller(kBlockGroups * kRows * end, hidden));
    }
  };
  parallel_pieces(num_blocks(hidden / kRows), down);
}

}  // namespace
}  // namespace cantata
