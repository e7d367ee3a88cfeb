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

inline long round_up(long number, long multiple) { return (number + multiple - 1) / multiple * multiple; }

// Parts of one piece of memory, each aligned to 64 bytes: laid out once without memory, to learn the size, and then in it.
class Layout {
 public:
  explicit Layout(void* memory) : start_(reinterpret_cast<uintptr_t>(memory)), next_(start_) {}

  template <typename Item>
  Item* take(long count) {
    const uintptr_t taken = next_;
    next_ += round_up(count * (long)sizeof(Item), 64);
    return reinterpret_cast<Item*>(taken);
  }
  long size() const { return (long)(next_ - start_); }

 private:
  const uintptr_t start_;
  uintptr_t next_;
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

  // Adds what was left out. `offsets` are those of the tile's keys; `weights` has rows first_row to end_row of the task, kKeyTile apart; so has `sums`, `width` apart.
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

template <typename Reducer>
class Attention {
 public:
  explicit Attention(const AttentionArgs& args) : of_(args), args_(args), width_(Reducer::width(args.head_dim)) {}

  // kDone, or what is wrong with the values of the arguments.
  int run() {
    const int status = check();
    if (status != kDone) return status;
    const long queries_per_tile = of_.group < kQueryRows ? kQueryRows / of_.group : 1;
    long num_tiles = 0;
    for (long seq = 0; seq < args_.num_seqs; ++seq) num_tiles += (of_.num_queries(seq) + queries_per_tile - 1) / queries_per_tile;
    if (num_tiles == 0) return kDone;
    const auto each_tile = [&](auto&& use) {
      for (long seq = 0; seq < args_.num_seqs; ++seq) {
        for (long first = 0; first < of_.num_queries(seq); first += queries_per_tile) {
          const long left = of_.num_queries(seq) - first;
          use(QueryTile{seq, args_.cu_seqlens_q[seq] + first, args_.context_lens[seq] - left, left < queries_per_tile ? left : queries_per_tile});
        }
      }
    };
    long num_rows = 0, num_key_tiles = 0;
    each_tile([&](const QueryTile& tile) {
      if (tile_rows(tile) > num_rows) num_rows = tile_rows(tile);
      num_key_tiles += this->num_key_tiles(tile);
    });
    const bool enough = num_tiles * args_.num_kv_heads >= 2 * num_threads() || num_rows > kSplitRows;
    const long stride = round_up(Softmax::size(num_rows, width_), 16);  // of a reduced key tile
    const auto lay_out = [&](Layout layout) {
      QueryTile* tiles = layout.take<QueryTile>(num_tiles);
      float* reduced = layout.take<float>(enough ? 0 : num_key_tiles * args_.num_kv_heads * stride);
      return Plan{tiles, num_tiles, num_rows, num_key_tiles, reduced, stride, layout.size()};
    };
    const Plan plan = lay_out(Layout(operation_scratch(lay_out(Layout(nullptr)).num_bytes)));
    long count = 0;
    each_tile([&](const QueryTile& tile) { plan.tiles[count++] = tile; });
    if (enough) {
      whole(plan);
    } else {
      split(plan);
    }
    return kDone;
  }

 private:
  typedef typename Reducer::Element Element;
  static constexpr long kSplitRows = 32;  // more rows than this keep a thread busy enough

  struct Plan {
    QueryTile* tiles;
    long num_tiles, num_rows, num_key_tiles;  // rows of a tile at most; key tiles of all query tiles
    float* reduced;
    long stride, num_bytes;
  };

  long tile_rows(const QueryTile& tile) const { return round_up(tile.num_queries * of_.group, kLanes); }
  long num_key_tiles(const QueryTile& tile) const { return (of_.end_key(tile) - 1) / kKeyTile + 1 - of_.first_key(tile) / kKeyTile; }

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

  // The sink is the first maximum, with weight 1 and no value.
  void start(const QueryTile& tile, long head, Softmax& running) const {
    const long rows = tile_rows(tile), real_rows = tile.num_queries * of_.group;
    for (long row = 0; row < rows; ++row) {
      running.maxima[row] = row < real_rows ? args_.sinks[head * of_.group + row % of_.group] : 0.0f;
      running.totals[row] = 1.0f;
    }
    __builtin_memset(running.sums, 0, sizeof(float) * rows * width_);
  }

  // A task's running softmax takes in one key tile.
  void merge(const QueryTile& tile, const Softmax& part, Softmax& running) const {
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

  // Enough tasks for all threads: each reduces and merges its key tiles one after the other.
  void whole(const Plan& plan) const {
    auto body = [&](long begin, long end) {
      for (long task = begin; task < end; ++task) {
        // The last queries see the most keys: they come first.
        const QueryTile& tile = plan.tiles[plan.num_tiles - 1 - task / args_.num_kv_heads];
        const long head = task % args_.num_kv_heads, rows = tile_rows(tile);
        const auto lay_out = [&](Layout& layout) {
          const auto softmax = [&] { return Softmax(layout.take<float>(Softmax::size(rows, width_)), rows); };
          const Softmax part = softmax(), running = softmax();
          return Parts{part, running, typename Reducer::Workspace(layout, rows, args_.head_dim)};
        };
        Layout size(nullptr);
        lay_out(size);
        Layout memory(thread_scratch(size.size()));
        Parts parts = lay_out(memory);
        const Reducer reducer(of_, tile, head, parts.work);
        start(tile, head, parts.running);
        for (long key_tile = of_.first_key(tile) / kKeyTile; key_tile * kKeyTile < of_.end_key(tile); ++key_tile) {
          reducer.reduce(key_tile, parts.part);
          merge(tile, parts.part, parts.running);
        }
        finish(tile, head, parts.running);
      }
    };
    parallel_for(plan.num_tiles * args_.num_kv_heads, 1, body);
  }

  struct Parts {
    Softmax part, running;
    typename Reducer::Workspace work;
  };

  // Few queries with long contexts: all key tiles are reduced in parallel, then merged in their order.
  void split(const Plan& plan) const {
    // A tile's key tiles by position and then by head, as they lie in the cache.
    auto reduce_some = [&](long begin, long end) {
      for (long task = begin; task < end; ++task) {
        long index = task / args_.num_kv_heads, i = 0;
        for (; index >= num_key_tiles(plan.tiles[i]); ++i) index -= num_key_tiles(plan.tiles[i]);
        const QueryTile& tile = plan.tiles[i];
        const long rows = tile_rows(tile);
        Layout size(nullptr);
        (void)typename Reducer::Workspace(size, rows, args_.head_dim);
        Layout memory(thread_scratch(size.size()));
        typename Reducer::Workspace work(memory, rows, args_.head_dim);
        const Reducer reducer(of_, tile, task % args_.num_kv_heads, work);
        reducer.reduce(of_.first_key(tile) / kKeyTile + index, Softmax(plan.reduced + task * plan.stride, rows));
      }
    };
    parallel_for(plan.num_key_tiles * args_.num_kv_heads, 1, reduce_some);
    auto merge_some = [&](long begin, long end) {
      for (long task = begin; task < end; ++task) {
        const long head = task % args_.num_kv_heads, i = task / args_.num_kv_heads;
        const QueryTile& tile = plan.tiles[i];
        const long rows = tile_rows(tile);
        long first = 0;
        for (long before = 0; before < i; ++before) first += num_key_tiles(plan.tiles[before]);
        Softmax running(static_cast<float*>(thread_scratch(sizeof(float) * Softmax::size(rows, width_))), rows);
        start(tile, head, running);
        for (long k = first; k < first + num_key_tiles(tile); ++k) {
          merge(tile, Softmax(plan.reduced + (k * args_.num_kv_heads + head) * plan.stride, rows), running);
        }
        finish(tile, head, running);
      }
    };
    parallel_for(plan.num_tiles * args_.num_kv_heads, 1, merge_some);
  }

  const Sequences<Element> of_;
  const AttentionArgs& args_;
  const long width_;
};
