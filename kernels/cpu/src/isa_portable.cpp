// The operations for any processor, in vectors of four floats.
#define CANTATA_ISA 0

#include "fp32_isa.h"

namespace cantata {
const Ops* const portable_ops = &kOps;
}
