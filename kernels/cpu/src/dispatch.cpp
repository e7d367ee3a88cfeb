// What Python calls. The instruction set is chosen once, from what the processor and the operating system offer.
#include <string.h>
#include <time.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "ops.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace cantata {
namespace {

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi"); }

// The tiles' registers are large: Linux gives them to a process that asks, before its first use of them.
bool has_amx() {
  if (!has_avx512_bf16() || !__builtin_cpu_supports("avx512vbmi2")) return false;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  if ((d & kBf16) == 0 || (d & kTile) == 0) return false;
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

bool always() { return true; }

struct Isa {
  const char* name;
  bool (*supported)();
  const Ops* const* ops;       // which may not have been compiled in
  const Bf16Ops* const* bf16;  // instead of those in ops, likewise; or null
};

// The best first.
constexpr Isa kIsas[] = {
#if defined(__x86_64__)
    {"amx", has_amx, &avx512_ops, &amx_ops},
    {"avx512_bf16", has_avx512_bf16, &avx512_ops, &avx512_bf16_ops},
    {"avx512", has_avx512, &avx512_ops, nullptr},
    {"avx2", has_avx2, &avx2_ops, nullptr},
#endif
    {"neon", always, &neon_ops, nullptr},
    {"portable", always, &portable_ops, nullptr},
};

// The operations in use, and what they are called.
Ops chosen;
const char* chosen_name = nullptr;

// Takes the best instruction set of this processor, or the named one; false if it does not have that.
bool choose(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  for (const Isa& isa : kIsas) {
    if (name != nullptr && strcmp(isa.name, name) != 0) continue;
    if (*isa.ops == nullptr || (isa.bf16 != nullptr && *isa.bf16 == nullptr) || !isa.supported()) continue;
    chosen = **isa.ops;
    if (isa.bf16 != nullptr) {
      chosen.experts = (*isa.bf16)->experts;
      chosen.dense = (*isa.bf16)->dense;
      chosen.step.attention = (*isa.bf16)->attention;
    }
    chosen_name = isa.name;
    return true;
  }
  return false;
}

const bool chosen_at_load = choose(nullptr);

}  // namespace
}  // namespace cantata

// Of the operations and their arguments (kernels/cpu/structures.py); setup.py defines it.
EXPORT int cantata_version() { return CANTATA_INTERFACE_VERSION; }

EXPORT const char* cantata_isa() { return cantata::chosen_name; }

// Another instruction set, by name (for tests and comparisons); 0 if this processor does not have it.
EXPORT int cantata_use_isa(const char* name) { return cantata::choose(name); }

EXPORT void cantata_linear(const cantata::LinearArgs* args) { cantata::chosen.linear(*args); }

EXPORT void cantata_experts(const cantata::ExpertsArgs* args) { cantata::chosen.experts(*args); }

EXPORT void cantata_dense(const cantata::DenseArgs* args) { cantata::chosen.dense(*args); }

EXPORT void cantata_pack_dense(const cantata::PackDenseArgs* args) { cantata::chosen.pack_dense(*args); }

EXPORT uint64_t cantata_read_through(const cantata::ReadArgs* args) { return cantata::chosen.read_through(*args); }

EXPORT int cantata_pack_rows16(const cantata::PackArgs* args) { return cantata::chosen.pack(*args); }

EXPORT int cantata_attention(const cantata::AttentionArgs* args) { return cantata::chosen.step.attention(*args); }

EXPORT void cantata_norm(const cantata::NormArgs* args) { cantata::chosen.step.norm(*args); }

EXPORT int cantata_rope_and_store(const cantata::RopeStoreArgs* args) { return cantata::chosen.step.rope_and_store(*args); }

EXPORT void cantata_gate_topk(const cantata::GateTopkArgs* args) { cantata::chosen.step.gate_topk(*args); }

EXPORT void cantata_sample(const cantata::SampleArgs* args) { cantata::chosen.step.sample(*args); }

EXPORT void cantata_logprobs(const cantata::LogprobArgs* args) { cantata::chosen.step.logprobs(*args); }

EXPORT void cantata_automaton_mask(const cantata::AutomatonArgs* args) { cantata::chosen.step.automaton_mask(*args); }

EXPORT void cantata_automaton_advance(const cantata::AutomatonArgs* args) { cantata::chosen.step.automaton_advance(*args); }

EXPORT void cantata_embed(const cantata::EmbedArgs* args) { cantata::chosen.step.embed(*args); }

EXPORT void cantata_yarn(const cantata::YarnArgs* args) { cantata::chosen.step.yarn(*args); }

EXPORT void cantata_convert(const cantata::ConvertArgs* args) { cantata::chosen.step.convert(*args); }

// Calls the operations one after the other; stops at the first that returns another status than kDone. Returns its index, or the count.
EXPORT int64_t cantata_run_program(const cantata::Call* calls, int64_t count) {
  const auto now = [] {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
  };
  for (int64_t i = 0; i < count; ++i) {
    const double started = calls[i].seconds == nullptr ? 0.0 : now();
    int status = cantata::kDone;
    if (calls[i].returns_status) {
      status = reinterpret_cast<int (*)(const void*)>(calls[i].function)(calls[i].arguments);
    } else {
      reinterpret_cast<void (*)(const void*)>(calls[i].function)(calls[i].arguments);
    }
    if (calls[i].seconds != nullptr) *calls[i].seconds = now() - started;
    if (status != cantata::kDone) return i;
  }
  return count;
}
