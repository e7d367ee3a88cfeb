// All of a step but the multiplications with weights.

#include "attention.h"
//
#include "attention_fp32.h"
//
#include "pointwise.h"
//
#include "sampling.h"

constexpr StepOps kStepOps{attention, norm, rope_and_store, gate_topk, sample, logprobs, embed, yarn, convert};
