// All of a step but the multiplications with weights.
#pragma once

#include "attention_fp32.h"
#include "automaton.h"
#include "ops.h"
#include "pointwise.h"
#include "sampling.h"

namespace cantata {
namespace {

constexpr StepOps kStepOps{attention, norm, rope_and_store, gate_topk, sample, logprobs, automaton_mask,
                           automaton_advance, embed, yarn, convert};

}  // namespace
}  // namespace cantata
