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

// A layer on packed weights (kernels/cpu/dense.py); bf16 without scales, int8 with.
struct DenseArgs {
  const uint16_t* x;    // [num_rows, width] bf16, width a multiple of 32
  const void* weight;   // rows padded to a multiple of 16
  const float* scales;  // [num_outputs], or null
  const uint16_t* bias;  // [num_outputs] bf16, or null
  uint16_t* out;        // [num_rows, num_outputs] bf16
  int64_t num_rows, width, num_outputs;
};

// Weights in the layout `rows16` (kernels/cpu/layout.py).
struct Mxfp4 {
  const uint8_t* blocks;  // [experts, rows / 16, width / 8, 64]
  const uint8_t* scales;  // [experts, rows / 16, width / 32, 16]
};

struct ExpertsArgs {
  const void* x;              // [num_tokens, hidden] of type
  const int32_t* topk_ids;    // [num_tokens, top_k], global expert ids
  const float* topk_weights;  // [num_tokens, top_k]
  Mxfp4 gate_up, down;        // rows 2 * intermediate and hidden
  const void* gate_up_bias;   // [experts, 2 * intermediate] of bias_type
  const void* down_bias;      // [experts, hidden] of bias_type
  void* out;                  // [num_tokens, hidden] of type
  int64_t num_tokens, top_k, hidden, intermediate, first_expert, num_experts;
  float limit, alpha;
  int32_t type, bias_type;
};

struct PackArgs {
  const uint8_t* blocks;   // [num_rows, num_groups, 16], a checkpoint's; rows blocks_stride bytes apart
  const uint8_t* scales;   // [num_rows, num_groups], rows scales_stride bytes apart
  uint8_t* packed_blocks;  // [num_rows / 16, 4 * packed_groups, 64], of which the first num_groups are written
  uint8_t* packed_scales;  // [num_rows / 16, packed_groups, 16]
  int64_t num_rows, num_groups, blocks_stride, scales_stride, packed_groups;
};

struct PackDenseArgs {
  const uint16_t* weight;  // [num_rows, width] bf16
  void* packed;            // all of it
  float* scales;           // for int8, or null; all of them
  int64_t first_row, num_rows, width, packed_width;
};

struct ReadArgs {
  const uint8_t* memory;
  int64_t num_bytes;
};

// What an operation that reads indices found wrong with them; it has written nothing then.
enum Status : int { kDone = 0, kBadLengths = 1, kBadSlot = 2 };

struct AttentionArgs {
  const void* q;                // [num_tokens, num_heads, head_dim] of type, its tokens q_stride elements apart
  const void* keys;             // [num_blocks, block_size, num_kv_heads, head_dim] of type
  const void* values;           // likewise
  const int32_t* block_table;   // [num_seqs, max_blocks]
  const int32_t* context_lens;  // [num_seqs]
  const int32_t* cu_seqlens_q;  // [num_seqs + 1]
  const float* sinks;           // [num_heads]
  void* out;                    // [num_tokens, num_heads, head_dim] of type
  int64_t num_tokens, q_stride, num_seqs, max_blocks, num_blocks, block_size, num_heads, num_kv_heads, head_dim;
  int64_t window;  // 0: all
  float scale;
  int32_t type;
};

struct NormArgs {
  void* x;             // [num_rows, width] of type; delta is added to it
  const void* delta;   // likewise, or null
  const void* weight;  // [width] of weight_type
  void* out;           // [num_rows, width] of type
  int64_t num_rows, width;
  float eps;
  int32_t type, weight_type;
};

struct RopeStoreArgs {
  void* qkv;         // [num_tokens, num_heads + 2 * num_kv_heads, head_dim] of type; the query heads are rotated in place
  const float* cos;  // [num_tokens, head_dim / 2]
  const float* sin;
  void* keys;                   // [num_slots, num_kv_heads, head_dim] of type
  void* values;                 // likewise
  const int64_t* slot_mapping;  // [num_tokens]
  int64_t num_tokens, num_heads, num_kv_heads, head_dim, num_slots;
  int32_t type;
};

struct GateTopkArgs {
  const float* logits;  // [num_tokens, num_experts]
  int32_t* topk_ids;    // [num_tokens, k]
  float* topk_weights;  // [num_tokens, k]
  int64_t num_tokens, num_experts, k;
};

// For null pointers see kernels/sampling/batch.py. A row's logits are row_stride elements after the last one's.
struct SampleArgs {
  const float* logits;       // [num_rows, vocab]
  const float* temperature;  // [num_rows], as the next five; null: all greedy
  const int64_t* seeds;
  const int64_t* output_positions;
  const int64_t* top_k;
  const float* top_p;
  const float* min_p;
  int64_t* token_ids;   // [num_rows]
  float* block_maxima;  // scratch [num_rows, blocks of 512 tokens]
  double* block_sums;   // scratch, likewise
  int64_t num_rows, vocab, row_stride;
};

struct LogprobArgs {
  const float* logits;
  const int64_t* rows;       // [num_rows], of logits and token_ids
  const int64_t* token_ids;  // of all rows of logits
  float* logprobs;           // [num_rows]
  int64_t* top_ids;          // [num_rows, num_top]
  float* top_logprobs;       // [num_rows, num_top]
  float* block_maxima;       // scratch, as above
  double* block_sums;
  int64_t num_rows, vocab, row_stride, num_top;
};

// The automata of some rows, see kernels/automaton/layout.py.
struct AutomatonArgs {
  float* logits;             // the mask's: rows of vocab, each row_stride after the last
  const int32_t* words;
  int32_t* places;           // [num_slots, 2]; the mask only reads them
  const int32_t* rows;       // [10, num_rows]
  const int64_t* token_ids;  // what advances them: of all rows of the logits
  int64_t num_rows, vocab, row_stride;
};

struct EmbedArgs {
  const int64_t* token_ids;  // [num_tokens]
  const void* weight;        // [num_rows, width] of type, tokens first_id to first_id + num_rows - 1
  void* out;                 // [num_tokens, width] of type
  int64_t num_tokens, num_rows, width, first_id;
  int32_t type;
};

struct YarnArgs {
  const int64_t* positions;  // [num_tokens]
  const float* frequencies;  // [half]
  float* cos;                // [num_tokens, half]
  float* sin;
  int64_t num_tokens, half;
  float concentration;
};

struct ConvertArgs {
  const void* from;  // [count] of one type
  void* to;          // [count] of the other
  int64_t count;
  int32_t to_type;
};

// One operation of a recorded program (kernels/cpu/program.py): one of the functions that Python calls.
struct Call {
  void (*function)();
  const void* arguments;
  double* seconds;  // where to write how long it took, or null
  int32_t returns_status;
};

struct StepOps {
  int (*attention)(const AttentionArgs&);
  void (*norm)(const NormArgs&);
  int (*rope_and_store)(const RopeStoreArgs&);
  void (*gate_topk)(const GateTopkArgs&);
  void (*sample)(const SampleArgs&);
  void (*logprobs)(const LogprobArgs&);
  void (*automaton_mask)(const AutomatonArgs&);
  void (*automaton_advance)(const AutomatonArgs&);
  void (*embed)(const EmbedArgs&);
  void (*yarn)(const YarnArgs&);
  void (*convert)(const ConvertArgs&);
};

struct Ops {
  void (*linear)(const LinearArgs&);
  void (*experts)(const ExpertsArgs&);
  void (*dense)(const DenseArgs&);
  bool (*pack)(const PackArgs&);  // on the caller's thread; whether a scale is NaN
  void (*pack_dense)(const PackDenseArgs&);  // on the caller's thread
  uint64_t (*read_through)(const ReadArgs&);
  StepOps step;
};

// What an instruction set with bf16 arithmetic does otherwise than AVX-512, to which it passes arguments that it has no code for.
struct Bf16Ops {
  void (*experts)(const ExpertsArgs&);
  void (*dense)(const DenseArgs&);
  int (*attention)(const AttentionArgs&);
};

// The tables, null where an instruction set was not compiled in. They are constants: a function in a file of an instruction set may
// itself consist of instructions that the processor lacks, so none runs before dispatch.cpp has asked for them.
extern const Ops* const portable_ops;
extern const Ops* const neon_ops;
extern const Ops* const avx2_ops;
extern const Ops* const avx512_ops;
extern const Bf16Ops* const avx512_bf16_ops;
extern const Bf16Ops* const amx_ops;

}  // namespace cantata
