// The operations for processors with AVX2.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#include <immintrin.h>
#endif
#include <stdint.h>

#include "ops.h"
#include "pool.h"
#include "scratch.h"

#if defined(__x86_64__)
#define CANTATA_ISA 1

namespace cantata {
namespace {
#include "simd.h"
//
#include "linear.h"
//
#include "experts.h"
//
#include "pack.h"
//
#include "step_ops.h"

const Ops kOps{"avx2", linear, experts, pack, kStepOps};
}  // namespace

const Ops* avx2_ops() { return &kOps; }
}  // namespace cantata
#else
namespace cantata {
const Ops* avx2_ops() { return nullptr; }
}
#endif
