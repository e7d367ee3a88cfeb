// The mixture of experts on MXFP4 weights in the layout `rows16`. For each output: the 32 products of a group are added in order, then
// scaled and added to the total; the same operations whatever the number of tokens and threads.

constexpr int kRows = 16;                   // of a row group
constexpr int kVectors = kRows / kLanes;    // a column of a row group
constexpr long kGroupBytes = 4 * 64;        // 32 columns of a row group
constexpr long kSlice = 256;                // columns decoded at a time for many tokens: 16 KiB, half of a first-level cache
constexpr int kFewTokens = 4;               // up to here weights are decoded on the way to the multiplication
constexpr int kTokensPerTile = kLanes == 4 ? 2 : 6;

struct Projection {
  const uint8_t* blocks;
  const uint8_t* scales;
  long width;  // contracted

  const uint8_t* group_blocks(long group) const { return blocks + group * (width / 8) * 64; }
  const uint8_t* group_scales(long group) const { return scales + group * (width / 32) * 16; }
};

typedef float RowGroup[kRows];

// Row groups group … group + kGroups - 1 times kTokens tokens; y [kGroups][kTokens].
template <int kTokens, int kGroups>
void few_tokens(const Projection& weights, long group, const float* const* x, RowGroup* y) {
  const uint8_t* blocks = weights.group_blocks(group);
  const uint8_t* codes = weights.group_scales(group);
  const long group_blocks = weights.width / 8 * 64, group_codes = weights.width / 32 * 16;
  Vec total[kGroups][kTokens][kVectors] = {};
  for (long k = 0; k < weights.width; k += 32, blocks += kGroupBytes, codes += kRows) {
    Vec part[kGroups][kTokens][kVectors] = {};
    for (int chunk = 0; chunk < 4; ++chunk) {
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          Vec columns[8];
          decode(blocks + g * group_blocks + 64 * chunk + 4 * kLanes * v, columns);
#pragma GCC unroll 8
          for (int column = 0; column < 8; ++column) {
#pragma GCC unroll 8
            for (int t = 0; t < kTokens; ++t) part[g][t][v] += columns[column] * broadcast(x[t][k + 8 * chunk + column]);
          }
        }
      }
    }
    for (int g = 0; g < kGroups; ++g) {
      for (int v = 0; v < kVectors; ++v) {
        const Vec scale = scales(codes + g * group_codes + kLanes * v);
        for (int t = 0; t < kTokens; ++t) total[g][t][v] += part[g][t][v] * scale;
      }
    }
  }
  for (int g = 0; g < kGroups; ++g) {
    for (int t = 0; t < kTokens; ++t) {
      for (int v = 0; v < kVectors; ++v) store(y[g * kTokens + t] + kLanes * v, total[g][t][v]);
    }
  }
}

// Adds `width` decoded columns times kTokens tokens to y; panel [width][16] unscaled, factors [width / 32][16].
template <int kTokens>
void panel_tile(const float* panel, const float* factors, const float* const* x, long first, long width, RowGroup* y) {
  for (long k = 0; k < width; k += 32) {
    Vec part[kTokens][kVectors] = {};
    for (long column = k; column < k + 32; ++column) {
      Vec w[kVectors];
      for (int v = 0; v < kVectors; ++v) w[v] = load(panel + column * kRows + kLanes * v);
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) {
        const Vec activation = broadcast(x[t][first + column]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) part[t][v] += w[v] * activation;
      }
    }
    for (int t = 0; t < kTokens; ++t) {
      for (int v = 0; v < kVectors; ++v) {
        float* total = y[t] + kLanes * v;
        store(total, load(total) + part[t][v] * load(factors + k / 32 * kRows + kLanes * v));
      }
    }
  }
}

template <int kTokens>
void panel_rest(long left, const float* panel, const float* factors, const float* const* x, long first, long width, RowGroup* y) {
  if constexpr (kTokens > 0) {
    if (left == kTokens) {
      panel_tile<kTokens>(panel, factors, x, first, width, y);
    } else {
      panel_rest<kTokens - 1>(left, panel, factors, x, first, width, y);
    }
  }
}

void many_tokens(const Projection& weights, long group, const float* const* x, long num_tokens, RowGroup* y) {
  alignas(64) float panel[kSlice * kRows];
  alignas(64) float factors[kSlice / 32 * kRows];
  __builtin_memset(y, 0, sizeof(RowGroup) * num_tokens);
  for (long first = 0; first < weights.width; first += kSlice) {
    const long width = weights.width - first < kSlice ? weights.width - first : kSlice;
    const uint8_t* blocks = weights.group_blocks(group) + first / 8 * 64;
    for (long chunk = 0; chunk < width / 8; ++chunk) {
      for (int v = 0; v < kVectors; ++v) {
        Vec columns[8];
        decode(blocks + 64 * chunk + 4 * kLanes * v, columns);
        for (int column = 0; column < 8; ++column) store(panel + (8 * chunk + column) * kRows + kLanes * v, columns[column]);
      }
    }
    const uint8_t* codes = weights.group_scales(group) + first / 32 * kRows;
    for (long lane = 0; lane < width / 32 * kRows; lane += kLanes) store(factors + lane, scales(codes + lane));
    long t = 0;
    for (; t + kTokensPerTile <= num_tokens; t += kTokensPerTile) {
      panel_tile<kTokensPerTile>(panel, factors, x + t, first, width, y + t);
    }
    panel_rest<kTokensPerTile - 1>(num_tokens - t, panel, factors, x + t, first, width, y + t);
  }
}

// (row group, tokens) of one expert's projection, handed to `finish(group, token index, values)`.
template <typename Finish>
void project(const Projection& weights, long begin, long end, const float* const* x, long num_tokens, RowGroup* y, Finish&& finish) {
  for (long group = begin; group < end;) {
    long num_groups = 1;
    if (num_tokens == 1 && group + 2 <= end) {
      few_tokens<1, 2>(weights, group, x, y);
      num_groups = 2;
    } else if (num_tokens == 1) {
      few_tokens<1, 1>(weights, group, x, y);
    } else if (num_tokens == 2) {
      few_tokens<2, 1>(weights, group, x, y);
    } else if (num_tokens == 3) {
      few_tokens<3, 1>(weights, group, x, y);
    } else if (num_tokens == kFewTokens) {
      few_tokens<kFewTokens, 1>(weights, group, x, y);
    } else {
      many_tokens(weights, group, x, num_tokens, y);
    }
    for (long g = 0; g < num_groups; ++g) {
      for (long t = 0; t < num_tokens; ++t) finish(group + g, t, y[g * num_tokens + t]);
    }
    group += num_groups;
  }
}

void bias_of(const void* bias, int32_t type, long first, RowGroup& out) {
  for (int row = 0; row < kRows; ++row) {
    out[row] = type == kBfloat16 ? widen(static_cast<const uint16_t*>(bias)[first + row]) : static_cast<const float*>(bias)[first + row];
  }
}

// Rows even = gate, odd = up → 8 activations.
void swiglu(const float* rows, const RowGroup& bias, float limit, float alpha, float* out) {
  constexpr int kWidth = kLanes > 8 ? kLanes : 8;
  float gate[kWidth] = {}, up[kWidth] = {}, result[kWidth];
  for (int i = 0; i < 8; ++i) {
    const float g = rows[2 * i] + bias[2 * i], u = rows[2 * i + 1] + bias[2 * i + 1];
    gate[i] = g > limit ? limit : g;
    up[i] = u > limit ? limit : u < -limit ? -limit : u;
  }
  for (int i = 0; i < kWidth; i += kLanes) {
    const Vec g = load(gate + i);
    store(result + i, (load(up + i) + 1.0f) * (g / (exponential(g * -alpha) + 1.0f)));
  }
  __builtin_memcpy(out, result, 8 * sizeof(float));
}

// Which tokens go to which expert. entries: [pairs] token * top_k + slot, by expert and then by token; starts: [experts + 1].
struct Assignment {
  int32_t* entries;
  int32_t* starts;
  int32_t* hit;  // experts with any token
  long num_hit;
};

Assignment assign(const ExpertsArgs& args) {
  const long pairs = args.num_tokens * args.top_k;
  Assignment result{args.order, args.order + pairs, args.order + pairs + args.num_experts + 1, 0};
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
  return result;
}

// Runs `finish` over all (hit expert, row group, token) of a projection. `activation(pair)` is the input row of a pair.
template <typename Activation, typename Finish>
void project_all(const Assignment& assignment, const Mxfp4& weights, long rows, long width, Activation&& activation,
                 Finish&& finish) {
  const long groups = rows / kRows;
  auto body = [&](long begin, long end) {
    for (long task = begin; task < end;) {
      const long expert = assignment.hit[task / groups], first = task % groups;
      const long last = first + (end - task) < groups ? first + (end - task) : groups;
      const int32_t* entries = assignment.entries + assignment.starts[expert];
      const long num_tokens = assignment.starts[expert + 1] - assignment.starts[expert];
      const Projection projection{weights.blocks + expert * rows * width / 2, weights.scales + expert * rows * width / 32, width};
      constexpr long kBatch = 192;  // tokens at a time: bounds what lies on the stack
      for (long from = 0; from < num_tokens; from += kBatch) {
        const long count = num_tokens - from < kBatch ? num_tokens - from : kBatch;
        const float* x[kBatch];
        alignas(64) RowGroup y[kBatch];
        for (long t = 0; t < count; ++t) x[t] = activation(entries[from + t]);
        project(projection, first, last, x, count, y, [&](long group, long t, const float* values) {
          finish(expert, group, entries[from + t], values);
        });
      }
      task += last - first;
    }
  };
  const long tasks = assignment.num_hit * groups;
  const long chunk = tasks / (16 * num_threads());
  parallel_for(tasks, chunk < 2 ? 2 : chunk - chunk % 2, body);
}

void experts(const ExpertsArgs& args) {
  const Assignment assignment = assign(args);
  const long hidden = args.hidden, width = args.intermediate;
  project_all(
      assignment, args.gate_up, 2 * width, hidden, [&](long pair) { return args.x + pair / args.top_k * hidden; },
      [&](long expert, long group, long pair, const float* values) {
        RowGroup bias;
        bias_of(args.gate_up_bias, args.bias_type, expert * 2 * width + group * kRows, bias);
        swiglu(values, bias, args.limit, args.alpha, args.activations + pair * width + group * kRows / 2);
      });
  project_all(
      assignment, args.down, hidden, width, [&](long pair) { return args.activations + pair * width; },
      [&](long expert, long group, long pair, const float* values) {
        RowGroup bias;
        bias_of(args.down_bias, args.bias_type, expert * hidden + group * kRows, bias);
        float* result = args.results + pair * hidden + group * kRows;
        for (int row = 0; row < kRows; ++row) result[row] = (values[row] + bias[row]) * args.topk_weights[pair];
      });
  auto combine = [&](long begin, long end) {
    for (long token = begin; token < end; ++token) {
      float* out = args.out + token * hidden;
      __builtin_memset(out, 0, sizeof(float) * hidden);
      // In ascending order of the expert, as the reference adds them; a token names an expert once.
      for (long previous = -1;;) {
        long next = -1;
        for (long slot = 0; slot < args.top_k; ++slot) {
          const long id = args.topk_ids[token * args.top_k + slot];
          if (id > previous && (next < 0 || id < args.topk_ids[token * args.top_k + next])) next = slot;
        }
        if (next < 0) break;
        previous = args.topk_ids[token * args.top_k + next];
        if (previous < args.first_expert || previous >= args.first_expert + args.num_experts) continue;
        const float* result = args.results + (token * args.top_k + next) * hidden;
        for (long h = 0; h < hidden; ++h) out[h] += result[h];
      }
    }
  };
  parallel_for(args.num_tokens, 4, combine);
}
