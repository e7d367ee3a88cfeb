// The operations for processors with AVX-512 and its bf16 instructions.
#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 10
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")
#define CANTATA_ISA 2
#define CANTATA_BF16 1

#include "bf16_ops.h"

namespace cantata {
const Bf16Ops* const avx512_bf16_ops = &kOps;
}
#else
#include "ops.h"

namespace cantata {
const Bf16Ops* const avx512_bf16_ops = nullptr;
}
#endif
