// What Python calls. The instruction set is chosen once, from what the processor and the operating system offer.
#include <string.h>

#include <initializer_list>

#include "ops.h"
#include "pool.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace cantata {
namespace {

bool supported(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (strcmp(name, "avx512") == 0) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  }
  if (strcmp(name, "avx2") == 0) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return strcmp(name, "portable") == 0;
}

const Ops* find(const char* name) {
  for (const Ops* ops : {avx512_ops(), avx2_ops(), portable_ops()}) {
    if (ops != nullptr && supported(ops->name) && (name == nullptr || strcmp(ops->name, name) == 0)) return ops;
  }
  return nullptr;
}

const Ops* chosen = find(nullptr);

// A row's 8 columns, a nibble each from the lowest up → the bytes of `rows16`: column c low, column c + 4 high.
uint32_t pair_columns(uint32_t nibbles) {
  const auto spread = [](uint32_t half) {
    half = (half | half << 8) & 0x00FF00FF;
    return (half | half << 4) & 0x0F0F0F0F;
  };
  return spread(nibbles & 0xFFFF) | spread(nibbles >> 16) << 4;
}

void pack_group(const PackArgs& args, long group) {
  const long num_chunks = 4 * args.num_groups;
  for (long row = 0; row < 16; ++row) {
    const uint8_t* from = args.blocks + (16 * group + row) * args.num_groups * 16;
    uint8_t* to = args.packed_blocks + group * num_chunks * 64 + row / 4 * 16 + row % 4 * 2;
    for (long chunk = 0; chunk < num_chunks; ++chunk, from += 4, to += 64) {
      const uint32_t bytes = pair_columns(from[0] | from[1] << 8 | from[2] << 16 | (uint32_t)from[3] << 24);
      to[0] = (uint8_t)bytes;
      to[1] = (uint8_t)(bytes >> 8);
      to[8] = (uint8_t)(bytes >> 16);
      to[9] = (uint8_t)(bytes >> 24);
    }
    for (long scale = 0; scale < args.num_groups; ++scale) {
      args.packed_scales[(group * args.num_groups + scale) * 16 + row] = args.scales[(16 * group + row) * args.num_groups + scale];
    }
  }
}

}  // namespace
}  // namespace cantata

EXPORT int cantata_version() { return 1; }

EXPORT const char* cantata_isa() { return cantata::chosen->name; }

// Another instruction set, by name (for tests and comparisons); 0 if this processor does not have it.
EXPORT int cantata_use_isa(const char* name) {
  const cantata::Ops* ops = cantata::find(name);
  if (ops == nullptr) return 0;
  cantata::chosen = ops;
  return 1;
}

EXPORT void cantata_linear(const cantata::LinearArgs* args) { cantata::chosen->linear(*args); }

EXPORT void cantata_experts(const cantata::ExpertsArgs* args) { cantata::chosen->experts(*args); }

EXPORT void cantata_pack_rows16(const cantata::PackArgs* args) {
  auto body = [&](long begin, long end) {
    for (long group = begin; group < end; ++group) cantata::pack_group(*args, group);
  };
  cantata::parallel_for(args->num_rows / 16, 4, body);
}
