// The operations for processors with AVX512.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
#include <immintrin.h>
#endif
#include <stdint.h>

#include <atomic>

#include "ops.h"
#include "pool.h"
#include "scratch.h"

#if defined(__x86_64__)
#define CANTATA_ISA 2

namespace cantata {
namespace {
#include "fp32_isa.h"

constexpr Ops kOps{linear, experts, dense, pack, pack_dense, read_through, kStepOps};
}  // namespace

const Ops* const avx512_ops = &kOps;
}  // namespace cantata
#else
namespace cantata {
const Ops* const avx512_ops = nullptr;
}
#endif
