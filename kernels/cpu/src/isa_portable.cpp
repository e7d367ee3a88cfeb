// The operations for any processor, in vectors of four floats.
#include <stdint.h>

#include "ops.h"
#include "pool.h"

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

const Ops kOps{"portable", linear, experts, pack};
}  // namespace

const Ops* portable_ops() { return &kOps; }
}  // namespace cantata
