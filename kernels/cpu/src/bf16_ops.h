// The operations on bf16 activations; those in fp32, of other shapes, and all others, are AVX-512's.
#pragma once

#include "isa_bf16.h"

#include "attention_bf16.h"
#include "bf16.h"
#include "dense.h"
#include "experts.h"
#include "ops.h"

namespace cantata {
namespace {

void experts(const ExpertsArgs& args) {
  if (args.type == kBfloat16) {
    run_experts<Bf16>(args);
  } else {
    avx512_ops->experts(args);
  }
}

void dense(const DenseArgs& args) { run_dense<Bf16>(args, args.x); }

int attention(const AttentionArgs& args) {
  return Bf16Reducer::can_reduce(args) ? Attention<Bf16Reducer>(args).run() : avx512_ops->step.attention(args);
}

constexpr Bf16Ops kOps{experts, dense, attention};

}  // namespace
}  // namespace cantata
