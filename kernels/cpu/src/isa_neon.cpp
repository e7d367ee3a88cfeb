// The operations for ARM processors of 64 bits, all of which have NEON.
#if defined(__aarch64__)
#define CANTATA_ISA 3

#include "fp32_isa.h"

namespace cantata {
const Ops* const neon_ops = &kOps;
}
#else
#include "ops.h"

namespace cantata {
const Ops* const neon_ops = nullptr;
}
#endif
