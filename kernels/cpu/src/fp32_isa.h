// All operations in fp32, for the instruction set that CANTATA_ISA names (simd.h). What comes later uses what comes before.
#include "simd.h"
//
#include "workspace.h"
//
#include "activations.h"
//
#include "linear.h"
//
#include "weights.h"
//
#include "fp32.h"
//
#include "experts.h"
//
#include "dense.h"
//
#include "fp32_ops.h"
//
#include "pack.h"
//
#include "stream.h"
//
#include "step_ops.h"
