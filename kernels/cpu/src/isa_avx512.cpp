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

const Ops kOps{"avx512", linear, experts, dense, pack, pack_dense, read_through, kStepOps};
}  // namespace

const Ops* avx512_ops() { return &kOps; }
}  // namespace cantata
#else
namespace cantata {
const Ops* avx512_ops() { return nullptr; }
}
#endif
