// isa.h for code that needs bf16 instructions; included before any other header. Compiled by
// itself, it is for AVX-512 with bf16.
#pragma once

#ifndef CANTATA_BF16
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")
#define CANTATA_ISA 2
#define CANTATA_BF16 1
#endif

#include "isa.h"
