// The operations for processors with AMX.
#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 11
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi,avx512vbmi2,amx-tile,amx-bf16")
#define CANTATA_ISA 2
#define CANTATA_BF16 2

#include "bf16_ops.h"

namespace cantata {
const Bf16Ops* const amx_ops = &kOps;
}
#else
#include "ops.h"

namespace cantata {
const Bf16Ops* const amx_ops = nullptr;
}
#endif
