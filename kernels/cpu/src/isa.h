// The instruction set of a source file. The file declares it before it includes anything: by its
// target pragma, and with
//
//   CANTATA_ISA   0 portable, 1 AVX2, 2 AVX-512, 3 NEON
//   CANTATA_BF16  beside AVX-512: 1 its bf16 instructions, 2 AMX; else 0
//
// What depends on these is in unnamed namespaces, also in headers: each source file has its own
// copy, and no inline function leaks into code for lesser processors. A header that is compiled by
// itself, as editors do, is for any processor.
#pragma once

#ifndef CANTATA_ISA
#define CANTATA_ISA 0
#endif
#ifndef CANTATA_BF16
#define CANTATA_BF16 0
#endif

#if CANTATA_ISA == 1 || CANTATA_ISA == 2
#include <immintrin.h>
#elif CANTATA_ISA == 3
#include <arm_neon.h>
#endif
