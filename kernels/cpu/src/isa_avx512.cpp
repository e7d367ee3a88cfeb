// The operations for processors with AVX-512.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
#define CANTATA_ISA 2

#include "fp32_isa.h"

namespace cantata {
const Ops* const avx512_ops = &kOps;
}
#else
#include "ops.h"

namespace cantata {
const Ops* const avx512_ops = nullptr;
}
#endif
