// The operations for any processor, in vectors of four floats.
#include <stdint.h>

#include <atomic>

#include "ops.h"
#include "pool.h"
#include "scratch.h"

#define CANTATA_ISA 0

namespace cantata {
namespace {
#include "fp32_isa.h"

constexpr Ops kOps{linear, experts, dense, pack, pack_dense, read_through, kStepOps};
}  // namespace

const Ops* const portable_ops = &kOps;
}  // namespace cantata
