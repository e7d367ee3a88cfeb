// Sink attention over the paged KV cache (FlashAttention-2, arXiv 2307.08691).
//
// A task is a tile of a sequence's queries and one KV head; a row of it is a query and one of the head's group of query heads. Keys come in
// tiles that start at multiples of kKeyTile. A reducer (attention_fp32.h, attention_bf16.h) reduces a key tile by itself, to its maximum,
// its sum and its weighted values, and then it is merged into the row's running softmax, in ascending order and beginning with the sink.
// Inside a tile a row's sums run over the keys in their order, or over lanes that are fixed by the keys' positions, and keys that a row does
// not see add exact zeros. So a query's result does not depend on the other queries, on the batch, or on which threads reduce which tiles.
//
// Zero times what is not finite is not zero. Values that are not finite are therefore left out of the products and added afterwards, to the
// rows that see their keys.
#pragma once

#include <stdint.h>

#include "activations.h"
#include "ops.h"
#include "pool.h"
#include "scratch.h"
#include "shuffle.h"
#include "simd.h"
#include "workspace.h"

namespace cantata {
namespace {

constexpr long kKeyTile = 256;
constexpr long kQueryRows = 128;  // of a task at most, unless one query has more heads
constexpr float kNothing = -__builtin_inff();

struct Span {
  long first, last;  // in a key tile, last excluded
  bool empty() const { return first >= last; }
};

struct QueryTile {
  long seq, row, position, num_queries;
};

// Of the rows of a task over some keys. Weights are relative to the maximum; where a row sees no key, the maximum is kNothing, the rest zero.
struct Softmax {
  float* maxima;  // [rows] of logits
  float* totals;  // [rows] of weights
  float* sums;    // [rows, width] of weights times values

  static long size(long rows, long width) { return rows * (width + 2); }
  Softmax(float* memory, long rows) : maxima(memory), totals(memory + rows), sums(memory + 2 * rows) {}
};

// The maximum and the total of one row.
struct Reduced {
  float maximum, total;
};

// kLanes vectors, transposed: interleaving the first half with the second, log2(kLanes) times.
inline void transpose(IntVec (&rows)[kLanes]) {
#if CANTATA_ISA == 2
  const IntVec low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23}, high = low + 8;
#elif CANTATA_ISA == 1
  const IntVec low = {0, 8, 1, 9, 2, 10, 3, 11}, high = low + 4;
#else
  const IntVec low = {0, 4, 1, 5}, high = low + 2;
#endif
#pragma GCC unroll 4
  for (int stage = 1; stage < kLanes; stage *= 2) {
    IntVec next[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + kLanes / 2], low);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + kLanes / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

// The arguments, and which keys a query sees.
template <typename Element>
struct Sequences {
  const AttentionArgs& args;
  const long group;  // query heads of a KV head

  explicit Sequences(const AttentionArgs& args) : args(args), group(args.num_heads / args.num_kv_heads) {}

  long num_queries(long seq) const { return args.cu_seqlens_q[seq + 1] - args.cu_seqlens_q[seq]; }
  long first_key(const QueryTile& tile) const {
    return args.window > 0 && tile.position >= args.window ? tile.position - args.window + 1 : 0;
  }
  long end_key(const QueryTile& tile) const { return tile.position + tile.num_queries; }

  // The keys of a tile that a query sees, or that any of a task's queries see.
  Span visible(long position, long key_tile) const {
    const long start = key_tile * kKeyTile;
    const long first = args.window > 0 ? position - args.window + 1 - start : 0, last = position + 1 - start;
    return {first > 0 ? first : 0, last < kKeyTile ? last : kKeyTile};
  }
  Span visible(const QueryTile& tile, long key_tile) const {
    return {visible(tile.position, key_tile).first, visible(tile.position + tile.num_queries - 1, key_tile).last};
  }

  // Where the cache has the keys of a span and their values: elements from the start of its halves.
  void find(const QueryTile& tile, long head, long key_tile, Span span, long* offsets) const {
    const long position = key_tile * kKeyTile + span.first, stride = args.num_kv_heads * args.head_dim;
    const int32_t* block = args.block_table + tile.seq * args.max_blocks + position / args.block_size;
    long token = position % args.block_size;
    for (long key = span.first; key < span.last; ++key, ++token) {
      if (token == args.block_size) token = 0, ++block;
      offsets[key] = (*block * args.block_size + token) * stride + head * args.head_dim;
    }
  }

  // The group's queries of a row of q.
  const Element* queries(long row, long head) const {
    return static_cast<const Element*>(args.q) + row * args.q_stride + head * group * args.head_dim;
  }
};

// The keys of a tile whose values are not all finite.
class OddKeys {
 public:
  bool any() const { return (bits_[0] | bits_[1] | bits_[2] | bits_[3]) != 0; }
  void add(long key) { bits_[key / 64] |= 1ull << key % 64; }

  // Adds what was left out. `offsets` are those of the tile's keys; `weights` has rows first_row to end_row of the task, kKeyTile apart; so has
  // `sums`, `width` apart.
  template <typename Element, typename Weight>
  void add_values(const Sequences<Element>& of, const QueryTile& tile, long key_tile, const long* offsets, const Weight* weights, long first_row,
                  long end_row, float* sums, long width) const {
    for (long key = 0; key < kKeyTile; ++key) {
      if ((bits_[key / 64] >> key % 64 & 1) == 0) continue;
      const Element* values = static_cast<const Element*>(of.args.values) + offsets[key];
      for (long row = first_row; row < end_row; ++row) {
        const Span span = of.visible(tile.position + row / of.group, key_tile);
        if (key < span.first || key >= span.last) continue;
        const float weight = widen(weights[(row - first_row) * kKeyTile + key]);
        for (long d = 0; d < of.args.head_dim; ++d) {
          const float value = widen(values[d]);
          if (!__builtin_isfinite(value)) sums[(row - first_row) * width + d] += weight * value;
        }
      }
    }
  }

 private:
  static_assert(kKeyTile == 256, "as `any` has it");
  uint64_t bits_[4] = {};
};

// Brings a key tile of all heads to the second-level cache while the one before is computed, a little at a time and in the order in which it
// lies in memory, which is read faster than pieces of it.
class Ahead {
 public:
  // In `num_steps` steps; the tile has any keys.
  template <typename Element>
  void start(const Sequences<Element>& of, const QueryTile& tile, long key_tile, long num_steps) {
    const Span span = of.visible(tile, key_tile);
    const long start = key_tile * kKeyTile, block_size = of.args.block_size;
    block_ = of.args.block_table + tile.seq * of.args.max_blocks + (start + span.first) / block_size;
    const long num_blocks = (start + span.last - 1) / block_size + 1 - (start + span.first) / block_size;
    halves_[0] = static_cast<const char*>(of.args.keys);
    halves_[1] = static_cast<const char*>(of.args.values);
    block_bytes_ = block_size * of.args.num_kv_heads * of.args.head_dim * (long)sizeof(Element);
    left_ = num_blocks * 2 * block_bytes_;
    step_bytes_ = round_up(left_ / num_steps + 1, kLine);
    half_ = 0;
    enter_half();
  }

  bool has_started() const { return block_ != nullptr; }

  void step() {
    long wanted = step_bytes_ < left_ ? step_bytes_ : left_;
    left_ -= wanted;
    while (wanted > 0) {
      const char* end = wanted < end_ - at_ ? at_ + wanted : end_;
      wanted -= end - at_;
      for (const char* line = at_; line < end; line += kLine) __builtin_prefetch(line, 0, 2);
      at_ = end;
      if (at_ == end_ && left_ + wanted > 0) {
        if (half_ == 1) ++block_;
        half_ ^= 1;
        enter_half();
      }
    }
  }

 private:
  static constexpr long kLine = 64;

  void enter_half() {
    at_ = halves_[half_] + *block_ * block_bytes_;
    end_ = at_ + block_bytes_;
  }

  const int32_t* block_ = nullptr;
  const char* halves_[2] = {};
  int half_ = 0;
  const char *at_ = nullptr, *end_ = nullptr;  // what is left of the half of a block
  long block_bytes_ = 0, left_ = 0, step_bytes_ = 0;
};

template <typename Reducer>
class Attention {
 public:
  explicit Attention(const AttentionArgs& args)
      : of_(args),
        args_(args),
        width_(Reducer::width(args.head_dim)),
        queries_per_tile_(of_.group < kQueryRows ? kQueryRows / of_.group : 1) {}

  // kDone, or what is wrong with the values of the arguments.
  int run() {
    const int status = check();
    if (status != kDone) return status;
    each_tile([&](const QueryTile& tile) {
      if (is_small(tile)) small_key_tiles_ += num_key_tiles(tile);
    });
    long num_tasks = 0, num_splits = 0, num_reduced = 0;
    each_tile([&](const QueryTile& tile) {
      each_task(tile, nullptr, [&](const Task&) { ++num_tasks; });
      if (!is_split(tile)) return;
      ++num_splits;
      num_reduced += reduced_size(tile);
    });
    Task* tasks = nullptr;
    Split* splits = nullptr;
    float* reduced = nullptr;
    const auto lay_out = [&](Layout layout) {
      tasks = layout.take<Task>(num_tasks);
      splits = layout.take<Split>(num_splits);
      reduced = layout.take<float>(num_reduced);
      return layout.size();
    };
    lay_out(Layout(operation_scratch(lay_out(Layout(nullptr)))));
    num_tasks = num_splits = 0;
    each_tile([&](const QueryTile& tile) {
      each_task(tile, reduced, [&](const Task& task) { tasks[num_tasks++] = task; });
      if (!is_split(tile)) return;
      splits[num_splits++] = {tile, reduced};
      reduced += reduced_size(tile);
    });
    // The last queries of a prompt see the most keys: they come first.
    auto compute = [&](long begin, long end) {
      for (long task = begin; task < end; ++task) run_task(tasks[num_tasks - 1 - task]);
    };
    parallel_for(num_tasks, 1, compute);
    auto merge_splits = [&](long begin, long end) {
      for (long task = begin; task < end; ++task) merge_split(splits[task / args_.num_kv_heads], task % args_.num_kv_heads);
    };
    parallel_for(num_splits * args_.num_kv_heads, 1, merge_splits);
    return kDone;
  }

 private:
  typedef typename Reducer::Element Element;
  static constexpr long kSmallRows = 32;  // fewer rows than this take longer to bring their keys than to compute

  // Some key tiles of some heads.
  struct Task {
    QueryTile tile;
    long first_head, end_head, first_key_tile, end_key_tile;
    float* reduced;  // where they are left for the query tile's other tasks; null: it has no others for these heads
  };

  // A query tile whose key tiles are reduced by many tasks, then merged.
  struct Split {
    QueryTile tile;
    float* reduced;
  };

  template <typename Use>
  void each_tile(Use&& use) const {
    for (long seq = 0; seq < args_.num_seqs; ++seq) {
      for (long first = 0; first < of_.num_queries(seq); first += queries_per_tile_) {
        const long left = of_.num_queries(seq) - first;
        use(QueryTile{seq, args_.cu_seqlens_q[seq] + first, args_.context_lens[seq] - left, left < queries_per_tile_ ? left : queries_per_tile_});
      }
    }
  }

  // Large tiles are a task for each head. Small ones, which are decodes, are bound by memory: a task takes all heads, so that the cache is read
  // in its order. Those that would keep a thread busy for long are split, by head too if there is little to do.
  template <typename Use>
  void each_task(const QueryTile& tile, float* reduced, Use&& use) const {
    const long first = first_key_tile(tile), end = first + num_key_tiles(tile);
    const long key_tiles = is_split(tile) ? at_least_one(small_key_tiles_ / (4 * num_threads())) : end - first;
    const long heads = is_small(tile) && !(is_split(tile) && small_key_tiles_ < 2 * num_threads()) ? args_.num_kv_heads : 1;
    for (long key_tile = first; key_tile < end; key_tile += key_tiles) {
      for (long head = 0; head < args_.num_kv_heads; head += heads) {
        use(Task{tile, head, head + heads, key_tile, key_tile + key_tiles < end ? key_tile + key_tiles : end, is_split(tile) ? reduced : nullptr});
      }
    }
  }

  static long at_least_one(long number) { return number < 1 ? 1 : number; }
  bool is_small(const QueryTile& tile) const { return tile.num_queries * of_.group <= kSmallRows; }
  bool is_split(const QueryTile& tile) const {
    return is_small(tile) && num_threads() > 1 && num_key_tiles(tile) * 2 * num_threads() > small_key_tiles_;
  }
  long tile_rows(const QueryTile& tile) const { return round_up(tile.num_queries * of_.group, kLanes); }
  long first_key_tile(const QueryTile& tile) const { return of_.first_key(tile) / kKeyTile; }
  long num_key_tiles(const QueryTile& tile) const { return (of_.end_key(tile) - 1) / kKeyTile + 1 - first_key_tile(tile); }

  // Of a tile's heads and key tiles: where the results of one are.
  long softmax_size(const QueryTile& tile) const { return round_up(Softmax::size(tile_rows(tile), width_), 16); }
  long reduced_size(const QueryTile& tile) const { return num_key_tiles(tile) * args_.num_kv_heads * softmax_size(tile); }
  Softmax reduced_at(const QueryTile& tile, float* reduced, long key_tile, long head) const {
    return Softmax(reduced + ((key_tile - first_key_tile(tile)) * args_.num_kv_heads + head) * softmax_size(tile), tile_rows(tile));
  }

  int check() const {
    if (args_.cu_seqlens_q[0] != 0 || args_.cu_seqlens_q[args_.num_seqs] != args_.num_tokens) return kBadLengths;
    for (long seq = 0; seq < args_.num_seqs; ++seq) {
      const long queries = of_.num_queries(seq), context = args_.context_lens[seq];
      if (queries < 0 || queries > context) return kBadLengths;
      if (queries == 0) continue;
      if (context > args_.max_blocks * args_.block_size) return kBadLengths;
      const QueryTile all{seq, 0, context - queries, queries};
      for (long block = of_.first_key(all) / args_.block_size; block <= (context - 1) / args_.block_size; ++block) {
        const long id = args_.block_table[seq * args_.max_blocks + block];
        if (id < 0 || id >= args_.num_blocks) return kBadSlot;
      }
    }
    return kDone;
  }

  void run_task(const Task& task) const {
    const QueryTile& tile = task.tile;
    const long rows = tile_rows(tile), num_heads = task.end_head - task.first_head, size = softmax_size(tile);
    const auto lay_out = [&](Layout& layout) {
      float* softmaxes = layout.take<float>(task.reduced == nullptr ? (num_heads + 1) * size : 0);
      return Memory{softmaxes, typename Reducer::Workspace(layout, rows, args_.head_dim)};
    };
    Layout room(nullptr);
    lay_out(room);
    Layout layout(thread_scratch(room.size()));
    const Memory memory = lay_out(layout);
    const auto running = [&](long head) { return Softmax(memory.softmaxes + (head - task.first_head + 1) * size, rows); };
    if (task.reduced == nullptr) {
      for (long head = task.first_head; head < task.end_head; ++head) start(tile, head, running(head));
    }
    Reducer reducer(of_, tile, memory.work);
    if (num_heads > 1) {
      Ahead first;
      first.start(of_, tile, task.first_key_tile, 1);
      first.step();
    }
    for (long key_tile = task.first_key_tile; key_tile < task.end_key_tile; ++key_tile) {
      Ahead ahead;
      if (num_heads > 1 && key_tile + 1 < task.end_key_tile) ahead.start(of_, tile, key_tile + 1, num_heads * Reducer::kSteps);
      for (long head = task.first_head; head < task.end_head; ++head) {
        if (num_heads > 1 || key_tile == task.first_key_tile) reducer.load_queries(head);
        if (task.reduced != nullptr) {
          reducer.reduce(key_tile, ahead, reduced_at(tile, task.reduced, key_tile, head));
        } else {
          const Softmax part(memory.softmaxes, rows);
          reducer.reduce(key_tile, ahead, part);
          merge(tile, part, running(head));
        }
      }
    }
    if (task.reduced == nullptr) {
      for (long head = task.first_head; head < task.end_head; ++head) finish(tile, head, running(head));
    }
  }

  // Of one task.
  struct Memory {
    float* softmaxes;  // of a key tile, and the running ones of the heads
    typename Reducer::Workspace work;
  };

  void merge_split(const Split& split, long head) const {
    const QueryTile& tile = split.tile;
    const Softmax running(static_cast<float*>(thread_scratch(sizeof(float) * softmax_size(tile))), tile_rows(tile));
    start(tile, head, running);
    for (long i = 0; i < num_key_tiles(tile); ++i) merge(tile, reduced_at(tile, split.reduced, first_key_tile(tile) + i, head), running);
    finish(tile, head, running);
  }

  // The sink is the first maximum, with weight 1 and no value.
  void start(const QueryTile& tile, long head, const Softmax& running) const {
    const long rows = tile_rows(tile), real_rows = tile.num_queries * of_.group;
    for (long row = 0; row < rows; ++row) {
      running.maxima[row] = row < real_rows ? args_.sinks[head * of_.group + row % of_.group] : 0.0f;
      running.totals[row] = 1.0f;
    }
    __builtin_memset(running.sums, 0, sizeof(float) * rows * width_);
  }

  // A running softmax takes in one key tile.
  void merge(const QueryTile& tile, const Softmax& part, const Softmax& running) const {
    const long real_rows = tile.num_queries * of_.group;
    for (long row = 0; row < real_rows; row += kLanes) {
      const Vec maximum = load(running.maxima + row), tile_maximum = load(part.maxima + row);
      const Vec highest = tile_maximum > maximum ? tile_maximum : maximum;
      const Vec old_factors = exponential_or_zero(maximum - highest), new_factors = exponential_or_zero(tile_maximum - highest);
      store(running.maxima + row, highest);
      store(running.totals + row, load(running.totals + row) * old_factors + load(part.totals + row) * new_factors);
      for (long i = 0; i < kLanes && row + i < real_rows; ++i) {
        const float old_factor = old_factors[i], new_factor = new_factors[i];
        float* to = running.sums + (row + i) * width_;
        const float* from = part.sums + (row + i) * width_;
        for (long d = 0; d < width_; d += kLanes) store(to + d, load(to + d) * old_factor + load(from + d) * new_factor);
      }
    }
  }

  void finish(const QueryTile& tile, long head, const Softmax& running) const {
    const long head_dim = args_.head_dim;
    for (long row = 0; row < tile.num_queries * of_.group; ++row) {
      Element* to = static_cast<Element*>(args_.out) +
                    ((tile.row + row / of_.group) * args_.num_heads + head * of_.group + row % of_.group) * head_dim;
      const float* from = running.sums + row * width_;
      const float total = running.totals[row];
      long d = 0;
      for (; d + kLanes <= head_dim; d += kLanes) store_rounded(to + d, load(from + d) / total);
      for (; d < head_dim; ++d) store_rounded(to + d, from[d] / total);
    }
  }

  const Sequences<Element> of_;
  const AttentionArgs& args_;
  const long width_, queries_per_tile_;
  long small_key_tiles_ = 0;  // of all small query tiles
};

}  // namespace
}  // namespace cantata
