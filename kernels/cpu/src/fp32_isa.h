// The operations of an instruction set (isa.h) in fp32, all of them.
#pragma once

#include "fp32_ops.h"
#include "linear.h"
#include "ops.h"
#include "pack.h"
#include "step_ops.h"
#include "stream.h"

namespace cantata {
namespace {

constexpr Ops kOps{linear, experts, dense, pack, pack_dense, read_through, kStepOps};

}  // namespace
}  // namespace cantata
