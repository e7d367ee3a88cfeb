// The operations for any processor, in vectors of four floats.
#include <stdint.h>

#include "ops.h"
#include "pool.h"
#include "scratch.h"

#define CANTATA_ISA 0

namespace cantata {
namespace {
#include "simd.h"
//
#include "linear.h"
//
#include "experts.h"
//
#include "pack.h"
//
#include "step_ops.h"

const Ops kOps{"portable", linear, experts, pack, kStepOps};
}  // namespace

const Ops* portable_ops() { return &kOps; }
}  // namespace cantata
