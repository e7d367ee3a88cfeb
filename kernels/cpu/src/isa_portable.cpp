// The operations for any processor, in vectors of four floats.
#include <stdint.h>

#include <atomic>

#include "ops.h"
#include "pool.h"
#include "scratch.h"

#define CANTATA_ISA 0

namespace cantata {
namespace {
#include "simd.h"
//
#include "workspace.h"
//
#include "activations.h"
//
#include "linear.h"
//
#include "weights.h"
//
#include "fp32.h"
//
#include "experts.h"
//
#include "dense.h"
//
#include "fp32_ops.h"
//
#include "pack.h"
//
#include "stream.h"
//
#include "step_ops.h"

const Ops kOps{"portable", linear, experts, dense, pack, pack_dense, read_through, kStepOps};
}  // namespace

const Ops* portable_ops() { return &kOps; }
}  // namespace cantata
