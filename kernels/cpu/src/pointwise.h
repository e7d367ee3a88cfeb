// Embedding, RMSNorm, rotary embedding with the KV store, the choice of experts, and conversions between fp32 and bf16. A row's result does not depend on the other rows.
#pragma once

#include <stdint.h>

#include "activations.h"
#include "ops.h"
#include "pool.h"
#include "simd.h"

namespace cantata {
namespace {

// Adds delta to a row of the residual stream, rounded to its type, and returns the sum of its squares: kLanes sums over the row, then the rest.
template <typename Element>
float add_row(Element* row, const Element* delta, long width) {
  Vec squares = {};
  long h = 0;
  for (; h + kLanes <= width; h += kLanes) {
    if (delta != nullptr) store_rounded(row + h, load_wide(row + h) + load_wide(delta + h));
    const Vec value = load_wide(row + h);
    squares += value * value;
  }
  float total = sum(squares);
  for (; h < width; ++h) {
    if (delta != nullptr) store_rounded(row + h, widen(row[h]) + widen(delta[h]));
    total += widen(row[h]) * widen(row[h]);
  }
  return total;
}

template <typename Element, typename Weight>
void norm_rows(const NormArgs& args) {
  const long width = args.width;
  auto body = [&](long begin, long end) {
    for (long r = begin; r < end; ++r) {
      Element* row = static_cast<Element*>(args.x) + r * width;
      const Element* delta = args.delta == nullptr ? nullptr : static_cast<const Element*>(args.delta) + r * width;
      const Weight* weight = static_cast<const Weight*>(args.weight);
      Element* out = static_cast<Element*>(args.out) + r * width;
      const float factor = 1.0f / __builtin_sqrtf(add_row(row, delta, width) / (float)width + args.eps);
      long h = 0;
      for (; h + kLanes <= width; h += kLanes) store_rounded(out + h, load_weights(weight + h) * (load_wide(row + h) * factor));
      for (; h < width; ++h) store_rounded(out + h, widen(weight[h]) * (widen(row[h]) * factor));
    }
  };
  // Waking threads costs more than a few thousand elements.
  parallel_for(args.num_rows, 1 + 32768 / (width + 1), body);
}

void norm(const NormArgs& args) {
  if (args.type == kBfloat16) {
    args.weight_type == kBfloat16 ? norm_rows<uint16_t, uint16_t>(args) : norm_rows<uint16_t, float>(args);
  } else {
    args.weight_type == kBfloat16 ? norm_rows<float, uint16_t>(args) : norm_rows<float, float>(args);
  }
}

// Rotates the pairs (first half, second half) of a head; `to` may be `from`.
template <typename Element>
void rotate(const Element* from, const float* cos, const float* sin, long half, Element* to) {
  long d = 0;
  for (; d + kLanes <= half; d += kLanes) {
    const Vec first = load_wide(from + d), second = load_wide(from + half + d), c = load(cos + d), s = load(sin + d);
    store_rounded(to + d, first * c - second * s);
    store_rounded(to + half + d, second * c + first * s);
  }
  for (; d < half; ++d) {
    const float first = widen(from[d]), second = widen(from[half + d]);
    store_rounded(to + d, first * cos[d] - second * sin[d]);
    store_rounded(to + half + d, second * cos[d] + first * sin[d]);
  }
}

template <typename Element>
int rope_and_store_rows(const RopeStoreArgs& args) {
  for (long token = 0; token < args.num_tokens; ++token) {
    if (args.slot_mapping[token] < 0 || args.slot_mapping[token] >= args.num_slots) return kBadSlot;
  }
  const long head_dim = args.head_dim, half = head_dim / 2, row = args.num_kv_heads * head_dim;
  auto body = [&](long begin, long end) {
    for (long token = begin; token < end; ++token) {
      Element* heads = static_cast<Element*>(args.qkv) + token * (args.num_heads + 2 * args.num_kv_heads) * head_dim;
      const float *cos = args.cos + token * half, *sin = args.sin + token * half;
      for (long head = 0; head < args.num_heads; ++head, heads += head_dim) rotate(heads, cos, sin, half, heads);
      Element* key = static_cast<Element*>(args.keys) + args.slot_mapping[token] * row;
      for (long head = 0; head < args.num_kv_heads; ++head, heads += head_dim) rotate(heads, cos, sin, half, key + head * head_dim);
      __builtin_memcpy(static_cast<Element*>(args.values) + args.slot_mapping[token] * row, heads, sizeof(Element) * row);
    }
  };
  parallel_for(args.num_tokens, 8, body);
  return kDone;
}

int rope_and_store(const RopeStoreArgs& args) {
  return args.type == kBfloat16 ? rope_and_store_rows<uint16_t>(args) : rope_and_store_rows<float>(args);
}

// The k largest logits of each row, of equals the lower id first, NaN before all others as torch sorts; softmax over them.
void gate_topk(const GateTopkArgs& args) {
  auto body = [&](long begin, long end) {
    for (long token = begin; token < end; ++token) {
      const float* logits = args.logits + token * args.num_experts;
      int32_t* ids = args.topk_ids + token * args.k;
      float* weights = args.topk_weights + token * args.k;
      long count = 0;
      for (long expert = 0; expert < args.num_experts; ++expert) {
        const float logit = logits[expert];
        long place = count < args.k ? count++ : args.k;
        const auto beats = [&](float other) { return logit != logit ? other == other : logit > other; };
        if (place == args.k && !beats(weights[--place])) continue;
        for (; place > 0 && beats(weights[place - 1]); --place) {
          weights[place] = weights[place - 1];
          ids[place] = ids[place - 1];
        }
        weights[place] = logit;
        ids[place] = (int32_t)expert;
      }
      float total = 0.0f;
      const float highest = weights[0];
      for (long slot = 0; slot < args.k; ++slot) total += weights[slot] = exponential_or_zero(weights[slot] - highest);
      for (long slot = 0; slot < args.k; ++slot) weights[slot] /= total;
    }
  };
  parallel_for(args.num_tokens, 64, body);
}

// Rows of tokens that the table does not hold are zeros.
void embed(const EmbedArgs& args) {
  const long row_bytes = args.width * (args.type == kBfloat16 ? 2 : 4);
  auto body = [&](long begin, long end) {
    for (long token = begin; token < end; ++token) {
      const long row = args.token_ids[token] - args.first_id;
      char* to = static_cast<char*>(args.out) + token * row_bytes;
      if (row >= 0 && row < args.num_rows) {
        __builtin_memcpy(to, static_cast<const char*>(args.weight) + row * row_bytes, row_bytes);
      } else {
        __builtin_memset(to, 0, row_bytes);
      }
    }
  };
  parallel_for(args.num_tokens, 16, body);
}

void yarn(const YarnArgs& args) {
  auto body = [&](long begin, long end) {
    for (long i = begin * args.half; i < end * args.half; ++i) {
      const float angle = (float)args.positions[i / args.half] * args.frequencies[i % args.half];
      args.cos[i] = __builtin_cosf(angle) * args.concentration;
      args.sin[i] = __builtin_sinf(angle) * args.concentration;
    }
  };
  parallel_for(args.num_tokens, 32, body);
}

template <typename From, typename To>
void convert_values(const ConvertArgs& args) {
  const From* from = static_cast<const From*>(args.from);
  To* to = static_cast<To*>(args.to);
  auto body = [&](long begin, long end) {
    long i = begin;
    for (; i + kLanes <= end; i += kLanes) store_rounded(to + i, load_wide(from + i));
    for (; i < end; ++i) store_rounded(to + i, widen(from[i]));
  };
  parallel_for(args.count, 65536, body);
}

void convert(const ConvertArgs& args) {
  if (args.to_type == kBfloat16) {
    convert_values<float, uint16_t>(args);
  } else {
    convert_values<uint16_t, float>(args);
  }
}

}  // namespace
}  // namespace cantata
