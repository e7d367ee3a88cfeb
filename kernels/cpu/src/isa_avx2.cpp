// The operations for processors with AVX2.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#define CANTATA_ISA 1

#include "fp32_isa.h"

namespace cantata {
const Ops* const avx2_ops = &kOps;
}
#else
#include "ops.h"

namespace cantata {
const Ops* const avx2_ops = nullptr;
}
#endif
