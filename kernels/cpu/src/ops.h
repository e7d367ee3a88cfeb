// The operations, one set of implementations for each instruction set, and their arguments. Pointers are borrowed for the call.
#pragma once

#include <stdint.h>

namespace cantata {

enum DataType : int32_t { kFloat32 = 0, kBfloat16 = 1 };

struct LinearArgs {
  const float* x;       // [num_rows, width]
  const void* weight;   // [num_outputs, width] of weight_type
  const void* bias;     // [num_outputs] of weight_type, or null
  float* out;           // [num_rows, num_outputs]
  int64_t num_rows, width, num_outputs;
  int32_t weight_type;
};

// Weights in the layout `rows16` (kernels/cpu/layout.py).
struct Mxfp4 {
  const uint8_t* blocks;  // [experts, rows / 16, width / 8, 64]
  const uint8_t* scales;  // [experts, rows / 16, width / 32, 16]
};

struct ExpertsArgs {
  const float* x;             // [num_tokens, hidden]
  const int32_t* topk_ids;    // [num_tokens, top_k], global expert ids
  const float* topk_weights;  // [num_tokens, top_k]
  Mxfp4 gate_up, down;        // rows 2 * intermediate and hidden
  const void* gate_up_bias;   // [experts, 2 * intermediate] of bias_type
  const void* down_bias;      // [experts, hidden] of bias_type
  float* out;                 // [num_tokens, hidden]
  float* activations;         // scratch [num_tokens * top_k, intermediate]
  float* results;             // scratch [num_tokens * top_k, hidden]
  int32_t* order;             // scratch [2 * num_tokens * top_k + 2 * experts + 1]
  int64_t num_tokens, top_k, hidden, intermediate, first_expert, num_experts;
  float limit, alpha;
  int32_t bias_type;
};

struct PackArgs {
  const uint8_t* blocks;   // [num_rows, num_groups, 16], a checkpoint's
  const uint8_t* scales;   // [num_rows, num_groups]
  uint8_t* packed_blocks;  // [num_rows / 16, 4 * num_groups, 64]
  uint8_t* packed_scales;  // [num_rows / 16, num_groups, 16]
  int64_t num_rows, num_groups;
};

struct Ops {
  const char* name;
  void (*linear)(const LinearArgs&);
  void (*experts)(const ExpertsArgs&);
  void (*pack)(const PackArgs&);
};

const Ops* portable_ops();
const Ops* avx2_ops();    // null where it was not compiled in
const Ops* avx512_ops();  // null where it was not compiled in

}  // namespace cantata
