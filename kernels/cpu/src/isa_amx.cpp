// The operations for processors with AMX.
#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 11
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi,avx512vbmi2,amx-tile,amx-bf16")
#include <immintrin.h>
#endif
#include <stdint.h>

#include <type_traits>

#include "ops.h"
#include "pool.h"
#include "scratch.h"

#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 11
#define CANTATA_ISA 2
#define CANTATA_BF16 2

namespace cantata {
namespace {
#include "simd.h"
//
#include "workspace.h"
//
#include "activations.h"
//
#include "weights.h"
//
#include "bf16.h"
//
#include "experts.h"
//
#include "dense.h"
//
#include "attention.h"
//
#include "attention_bf16.h"
//
#include "bf16_ops.h"
}  // namespace

const Bf16Ops* const amx_ops = &kOps;
}  // namespace cantata
#else
namespace cantata {
const Bf16Ops* const amx_ops = nullptr;
}
#endif
