// Dense layers on packed weights (kernels/cpu/dense.py), by the same engines as the experts.
#pragma once

#include <stdint.h>

#include "activations.h"
#include "experts.h"
#include "ops.h"
#include "pool.h"
#include "simd.h"
#include "weights.h"

namespace cantata {
namespace {

template <typename Engine, typename Weights>
void dense_rows(const DenseArgs& args, const Weights& weights, const typename Engine::Activation* x) {
  const long groups = (args.num_outputs + kRows - 1) / kRows;
  uint16_t* out = static_cast<uint16_t*>(args.out);
  const auto some_groups = [&](Engine& engine, long begin, long end) {
    project(engine, weights, begin, end, x, args.num_rows,
            [&](long group, int num_groups, long from, long count, const Outputs* y) {
              const long first = group * kRows, left = args.num_outputs - first;
              const long outputs = smaller(left, num_groups * kRows);
              alignas(64) float scale[kBlockGroups * kRows], bias[kBlockGroups * kRows] = {}, values[kBlockGroups * kRows];
              // Not a choice for each element: compiled to masked loads from null, it cost AVX2 processors 0.4 us.
              for (float& value : scale) value = 1.0f;
              if (args.scales != nullptr) __builtin_memcpy(scale, args.scales + first, outputs * sizeof *scale);
              if (args.bias != nullptr) widen_values(args.bias, kBfloat16, first, outputs, bias);
              for (long t = 0; t < count; ++t) {
                for (int i = 0; i < num_groups * kRows; i += kLanes) store(values + i, load(y[t] + i) * load(scale + i) + load(bias + i));
                store_values(out + (from + t) * args.num_outputs + first, values, outputs);
              }
            });
  };
  auto body = [&](Pieces& pieces) {
    Engine engine;
    for (long begin, end; pieces.take(begin, end);) some_groups(engine, kBlockGroups * begin, smaller(kBlockGroups * end, groups));
  };
  parallel_pieces(num_blocks(groups), body);
}

template <typename Engine>
void run_dense(const DenseArgs& args, const typename Engine::Activation* x) {
  if (args.scales == nullptr) {
    dense_rows<Engine>(args, Bf16Weights(args.weight, args.width), x);
  } else {
    dense_rows<Engine>(args, Int8Weights(args.weight, args.width), x);
  }
}

}  // namespace
}  // namespace cantata
