// Dense layer on weights in rows, [outputs, width]. An output is one vector accumulator over the width, its lanes added at the end and
// then the remainder: the same operations whatever the number of rows and threads.
#pragma once

#include <stdint.h>

#include "ops.h"
#include "pool.h"
#include "simd.h"

namespace cantata {
namespace {

constexpr long kOutputsPerTask = 8;
constexpr long kRowsPerPass = 32;  // activations that stay in the second-level cache while all tasks' weights pass

template <int kRows, int kOutputs, typename Weight>
void linear_tile(const float* x, const Weight* weight, const Weight* bias, float* out, long width, long num_outputs) {
  Vec total[kRows][kOutputs] = {};
  const long vectorised = width - width % kLanes;
  for (long k = 0; k < vectorised; k += kLanes) {
    Vec w[kOutputs];
#pragma GCC unroll 8
    for (int o = 0; o < kOutputs; ++o) w[o] = load_weights(weight + o * width + k);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec activation = load(x + r * width + k);
#pragma GCC unroll 8
      for (int o = 0; o < kOutputs; ++o) total[r][o] += activation * w[o];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int o = 0; o < kOutputs; ++o) {
      float value = sum(total[r][o]);
      for (long k = vectorised; k < width; ++k) value += x[r * width + k] * widen(weight[o * width + k]);
      out[r * num_outputs + o] = bias == nullptr ? value : value + widen(bias[o]);
    }
  }
}

template <int kOutputs, typename Weight>
void linear_rows(const float* x, const Weight* weight, const Weight* bias, float* out, long rows, long width, long num_outputs) {
  for (; rows >= 3; rows -= 3, x += 3 * width, out += 3 * num_outputs) linear_tile<3, kOutputs>(x, weight, bias, out, width, num_outputs);
  if (rows == 2) linear_tile<2, kOutputs>(x, weight, bias, out, width, num_outputs);
  if (rows == 1) linear_tile<1, kOutputs>(x, weight, bias, out, width, num_outputs);
}

template <typename Weight>
void linear_of(const LinearArgs& args) {
  const Weight* weight = static_cast<const Weight*>(args.weight);
  const Weight* bias = static_cast<const Weight*>(args.bias);
  const long passes = (args.num_rows + kRowsPerPass - 1) / kRowsPerPass;
  const long tasks = (args.num_outputs + kOutputsPerTask - 1) / kOutputsPerTask;  // of a pass
  auto body = [&](long begin, long end) {
    for (long task = begin; task < end; ++task) {
      const long first = task / tasks * kRowsPerPass, left = args.num_rows - first, rows = left < kRowsPerPass ? left : kRowsPerPass;
      const float* x = args.x + first * args.width;
      float* out = args.out + first * args.num_outputs;
      long o = task % tasks * kOutputsPerTask;
      const long last = o + kOutputsPerTask < args.num_outputs ? o + kOutputsPerTask : args.num_outputs;
      for (; o + 4 <= last; o += 4) {
        linear_rows<4>(x, weight + o * args.width, bias ? bias + o : nullptr, out + o, rows, args.width, args.num_outputs);
      }
      for (; o < last; ++o) {
        linear_rows<1>(x, weight + o * args.width, bias ? bias + o : nullptr, out + o, rows, args.width, args.num_outputs);
      }
    }
  };
  parallel_for(passes * tasks, passes == 1 ? 1 : tasks, body);
}

void linear(const LinearArgs& args) {
  if (args.weight_type == kBfloat16) {
    linear_of<uint16_t>(args);
  } else {
    linear_of<float>(args);
  }
}

}  // namespace
}  // namespace cantata
