// The operations for processors with AVX2.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#include <immintrin.h>
#endif
#include <stdint.h>

#include <atomic>

#include "ops.h"
#include "pool.h"
#include "scratch.h"

#if defined(__x86_64__)
#define CANTATA_ISA 1

namespace cantata {
namespace {
#include "fp32_isa.h"

constexpr Ops kOps{linear, experts, dense, pack, pack_dense, read_through, kStepOps};
}  // namespace

const Ops* const avx2_ops = &kOps;
}  // namespace cantata
#else
namespace cantata {
const Ops* const avx2_ops = nullptr;
}
#endif
