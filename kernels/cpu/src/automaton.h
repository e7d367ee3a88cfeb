// Token automata as kernels/automaton/reference.py defines them; layout: kernels/automaton/layout.py.
#pragma once

#include <stdint.h>

#include "ops.h"
#include "pool.h"

namespace cantata {
namespace {

enum StateWord { kFlags, kOverflow, kSet, kSetSize, kNext, kNextSize, kStateWords };
enum RowVector { kRow, kSlot, kBase, kState, kNumCounted, kPosition, kMaxCounted, kMaxLength, kNumDrafts, kDraft };
constexpr int32_t kForbids = 1, kCounted = 2, kNoState = -1, kOnDevice = -1;

struct Place {
  int32_t state, num_counted;
};

struct AutomatonRow {
  const AutomatonArgs& args;
  const long index;

  int32_t get(RowVector vector, long before = 0) const { return args.rows[vector * args.num_rows + index - before]; }
  const int32_t* automaton() const { return args.words + get(kBase); }
  const int32_t* state(int32_t number) const { return automaton() + (long)number * kStateWords; }

  Place after(Place place, int32_t token, long num_tokens) const {
    const int32_t* here = state(place.state);
    place.num_counted += (here[kFlags] & kCounted) != 0;
    const int32_t* tokens = automaton() + here[kNext];
    const long size = here[kNextSize];
    long low = 0;
    for (long left = size; left > 0;) {
      const long half = left / 2;
      const bool is_below = tokens[low + half] < token;
      low = is_below ? low + half + 1 : low;
      left = is_below ? left - half - 1 : half;
    }
    if (low < size && tokens[low] == token) place.state = tokens[size + low];
    const int32_t overflow = state(place.state)[kOverflow];
    if (overflow != kNoState && (place.num_counted >= get(kMaxCounted) || num_tokens >= get(kMaxLength))) place.state = overflow;
    return place;
  }

  Place place() const {
    const int32_t* stored = args.places + 2L * get(kSlot);
    Place place = get(kState) == kOnDevice ? Place{stored[0], stored[1]} : Place{get(kState), get(kNumCounted)};
    for (long before = get(kNumDrafts); before > 0; --before) {
      place = after(place, get(kDraft, before), (long)get(kPosition, before) + 1);
    }
    return place;
  }
};

// Tokens [begin, end) may not come.
inline void forbid(float* logits, long begin, long end) {
  for (long id = begin; id < end; ++id) logits[id] = -__builtin_inff();
}

void automaton_mask(const AutomatonArgs& args) {
  auto mask = [&](long begin, long end) {
    for (long index = begin; index < end; ++index) {
      const AutomatonRow row{args, index};
      const int32_t* state = row.state(row.place().state);
      float* logits = args.logits + row.get(kRow) * args.row_stride;
      const int32_t* words = row.automaton() + state[kSet];
      const long size = state[kSetSize];
      const bool forbids = (state[kFlags] & kForbids) != 0;
      long next = 0;
      for (long i = 0; i < size; ++i) {
        const long first = 32L * words[i];
        if (!forbids) forbid(logits, next, first < args.vocab ? first : args.vocab);
        next = first + 32;
        for (uint32_t banned = forbids ? words[size + i] : ~words[size + i]; banned != 0; banned &= banned - 1) {
          const long id = first + __builtin_ctz(banned);
          if (id < args.vocab) logits[id] = -__builtin_inff();
        }
      }
      if (!forbids) forbid(logits, next, args.vocab);
    }
  };
  parallel_for(args.num_rows, 1, mask);
}

// Of the rows of a sequence only the one whose token is its newest reads and writes its place.
void automaton_advance(const AutomatonArgs& args) {
  for (long index = 0; index < args.num_rows; ++index) {
    const AutomatonRow row{args, index};
    const auto sampled = [&](long before) { return (int32_t)args.token_ids[row.get(kRow, before)]; };
    bool is_newest = sampled(0) != row.get(kDraft);
    for (long before = row.get(kNumDrafts); before > 0; --before) is_newest &= sampled(before) == row.get(kDraft, before);
    if (!is_newest) continue;
    const Place place = row.after(row.place(), sampled(0), (long)row.get(kPosition) + 1);
    int32_t* stored = args.places + 2L * row.get(kSlot);
    stored[0] = place.state;
    stored[1] = place.num_counted;
  }
}

}  // namespace
}  // namespace cantata
