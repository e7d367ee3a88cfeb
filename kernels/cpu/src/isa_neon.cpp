// The operations for ARM processors of 64 bits, all of which have NEON.
#if defined(__aarch64__)
#include <arm_neon.h>
#endif
#include <stdint.h>

#include <atomic>

#include "ops.h"
#include "pool.h"
#include "scratch.h"

#if defined(__aarch64__)
#define CANTATA_ISA 3

namespace cantata {
namespace {
#include "fp32_isa.h"

constexpr Ops kOps{linear, experts, dense, pack, pack_dense, read_through, kStepOps};
}  // namespace

const Ops* const neon_ops = &kOps;
}  // namespace cantata
#else
namespace cantata {
const Ops* const neon_ops = nullptr;
}
#endif
