// The operations in fp32.
#pragma once

#include "dense.h"
#include "experts.h"
#include "fp32.h"
#include "ops.h"
#include "pool.h"
#include "scratch.h"

namespace cantata {
namespace {

void experts(const ExpertsArgs& args) { run_experts<Fp32>(args); }

void dense(const DenseArgs& args) {
  float* wide = static_cast<float*>(operation_scratch(args.num_rows * args.width * (long)sizeof(float)));
  auto widen_rows = [&](long begin, long end) {
    widen_values(args.x, kBfloat16, begin * args.width, (end - begin) * args.width, wide + begin * args.width);
  };
  parallel_for(args.num_rows, 16, widen_rows);
  run_dense<Fp32>(args, wide);
}

}  // namespace
}  // namespace cantata
