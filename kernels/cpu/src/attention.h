// Sink attention over the paged KV cache (FlashAttention-2, arXiv 2307.08691).
//
// A task is a tile of a sequence's queries and one KV head; a row of it is a query and one of the head's group of query heads. Keys come in
// tiles that start at multiples of kKeyTile. A key tile is reduced by itself, to its maximum, its sum and its weighted values, and then
// merged into the row's running softmax, in ascending order and beginning with the sink. Inside a tile a row's sums run over the keys in
// their order, or over lanes that are fixed by the keys' positions, and keys that a row does not see add exact zeros. So a query's result
// does not depend on the other queries, on the batch, or on which threads reduce which tiles.

constexpr long kKeyTile = 256;
constexpr long kQueryRows = 128;  // of a task at most, unless one query has more heads
constexpr int kScoreRows = kLanes == 16 ? 8 : 4;
constexpr int kValueRows = 4;
constexpr int kValueVectors = kLanes == 16 ? 4 : 2;
constexpr long kKeyGroup = 2 * kLanes;  // keys whose dimensions are transposed together
constexpr long kValueGroup = 32;        // keys whose values are widened together
constexpr float kNothing = -__builtin_inff();

struct Span {
  long first, last;  // in a key tile, last excluded
  bool empty() const { return first >= last; }
};

struct QueryTile {
  long seq, row, position, num_queries;
};

inline long round_up(long number, long multiple) { return (number + multiple - 1) / multiple * multiple; }

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

// keys[lane][...] → panel[dimension][lane], kLanes keys of a panel that is kKeyGroup wide.
inline void transpose_keys(const float* const* keys, long head_dim, float* panel) {
  long d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) {
    IntVec rows[kLanes];
#pragma GCC unroll 16
    for (int lane = 0; lane < kLanes; ++lane) rows[lane] = (IntVec)load(keys[lane] + d);
    transpose(rows);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store(panel + (d + i) * kKeyGroup, (Vec)rows[i]);
  }
  for (; d < head_dim; ++d) {
    for (int lane = 0; lane < kLanes; ++lane) panel[d * kKeyGroup + lane] = keys[lane][d];
  }
}

inline void transpose_keys(const uint16_t* const* keys, long head_dim, float* panel) {
  const IntVec upper = IntVec{} + (int)0xFFFF0000;
  long d = 0;
  for (; d + 2 * kLanes <= head_dim; d += 2 * kLanes) {
    IntVec rows[kLanes];  // pairs of dimensions, the even one below
#pragma GCC unroll 16
    for (int lane = 0; lane < kLanes; ++lane) __builtin_memcpy(&rows[lane], keys[lane] + d, sizeof rows[lane]);
    transpose(rows);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      store(panel + (d + 2 * i) * kKeyGroup, (Vec)(rows[i] << 16));
      store(panel + (d + 2 * i + 1) * kKeyGroup, (Vec)(rows[i] & upper));
    }
  }
  for (; d < head_dim; ++d) {
    for (int lane = 0; lane < kLanes; ++lane) panel[d * kKeyGroup + lane] = widen(keys[lane][d]);
  }
}

// kScoreRows queries times a panel of kKeyGroup keys; a score is one sum over the dimensions in their order.
inline void score(const float* queries, const float* panel, long head_dim, float* scores) {
  Vec total[kScoreRows][2] = {};
  for (long d = 0; d < head_dim; ++d) {
    const Vec low = load(panel + d * kKeyGroup), high = load(panel + d * kKeyGroup + kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kScoreRows; ++r) {
      const Vec query = broadcast(queries[r * head_dim + d]);
      total[r][0] += query * low;
      total[r][1] += query * high;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kScoreRows; ++r) {
    store(scores + r * kKeyTile, total[r][0]);
    store(scores + r * kKeyTile + kLanes, total[r][1]);
  }
}

// sums[kValueRows][width] += weights of num_keys keys times their values [num_keys][width].
inline void add_values(const float* weights, const float* values, long num_keys, long width, float* sums) {
  for (long column = 0; column < width; column += kValueVectors * kLanes) {
    Vec total[kValueRows][kValueVectors];
#pragma GCC unroll 4
    for (int r = 0; r < kValueRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kValueVectors; ++v) total[r][v] = load(sums + r * width + column + v * kLanes);
    }
    for (long key = 0; key < num_keys; ++key) {
      Vec value[kValueVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kValueVectors; ++v) value[v] = load(values + key * width + column + v * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < kValueRows; ++r) {
        const Vec weight = broadcast(weights[r * kKeyTile + key]);
#pragma GCC unroll 4
        for (int v = 0; v < kValueVectors; ++v) total[r][v] += weight * value[v];
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kValueRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kValueVectors; ++v) store(sums + r * width + column + v * kLanes, total[r][v]);
    }
  }
}

// A row of scores → weights relative to the maximum of the row's span; zeros in the rest of `all`. Returns (maximum, sum of weights).
struct Reduced {
  float maximum, total;
};

inline Reduced soften(float* scores, Span span, Span all) {
  IntVec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  const long begin = span.first / kLanes * kLanes;
  Vec highest = broadcast(kNothing);
  for (long k = begin; k < span.last; k += kLanes) {
    const IntVec key = lane + (int)k;
    const Vec here = (key >= (int)span.first) & (key < (int)span.last) ? load(scores + k) : broadcast(kNothing);
    store(scores + k, here);
    highest = here > highest ? here : highest;
  }
  float maximum = kNothing;
  for (int i = 0; i < kLanes; ++i) maximum = highest[i] > maximum ? highest[i] : maximum;
  // Without a number among them there is no maximum; NaN must come through, minus infinity as zero.
  const Vec shift = broadcast(maximum == kNothing ? 0.0f : maximum);
  Vec total = {};
  for (long k = begin; k < span.last; k += kLanes) {
    const Vec weight = exponential_or_zero(load(scores + k) - shift);
    store(scores + k, weight);
    total += weight;
  }
  for (long k = all.first / kLanes * kLanes; k < begin; k += kLanes) store(scores + k, Vec{});
  for (long k = round_up(span.last, kLanes); k < all.last; k += kLanes) store(scores + k, Vec{});
  return {maximum, sum(total)};
}

template <typename Element>
class Attention {
 public:
  explicit Attention(const AttentionArgs& args)
      : args_(args),
        group_(args.num_heads / args.num_kv_heads),
        width_(round_up(args.head_dim, kValueVectors * kLanes)),
        queries_per_tile_(group_ < kQueryRows ? kQueryRows / group_ : 1) {}

  // kDone, or what is wrong with the values of the arguments.
  int run() {
    const int status = check();
    if (status != kDone) return status;
    long num_tiles = 0;
    for (long seq = 0; seq < args_.num_seqs; ++seq) num_tiles += (num_queries(seq) + queries_per_tile_ - 1) / queries_per_tile_;
    if (num_tiles == 0) return kDone;
    QueryTile* tiles = static_cast<QueryTile*>(__builtin_malloc(sizeof(QueryTile) * num_tiles));
    long count = 0, num_rows = 0;
    for (long seq = 0; seq < args_.num_seqs; ++seq) {
      for (long first = 0; first < num_queries(seq); first += queries_per_tile_) {
        const long left = num_queries(seq) - first;
        const QueryTile tile{seq, args_.cu_seqlens_q[seq] + first, args_.context_lens[seq] - left,
                             left < queries_per_tile_ ? left : queries_per_tile_};
        tiles[count++] = tile;
        if (tile_rows(tile) > num_rows) num_rows = tile_rows(tile);
      }
    }
    if (num_tiles * args_.num_kv_heads >= 2 * num_threads() || num_rows > kSplitRows) {
      whole(tiles, num_tiles);
    } else {
      split(tiles, num_tiles, num_rows);
    }
    __builtin_free(tiles);
    return kDone;
  }

 private:
  static constexpr long kSplitRows = 32;  // more rows than this keep a thread busy enough

  // Of one task; all rows padded to kScoreRows.
  struct Workspace {
    float* queries;   // [rows, head_dim], scaled
    float* scores;    // [rows, kKeyTile]
    float* panel;     // [head_dim, kKeyGroup]
    float* values;    // [kValueGroup, width]
    float* sums;      // [rows, width] of a key tile
    float* maxima;    // [rows] of a key tile
    float* totals;    // [rows] of a key tile
    float* running;   // [rows, width], of all key tiles so far, as the next two
    float* running_maxima;
    float* running_totals;
    float* nothing;   // [head_dim] zeros

    static long size(long rows, long head_dim, long width) {
      return rows * (head_dim + kKeyTile + 2 * width + 4) + head_dim * kKeyGroup + kValueGroup * width + head_dim + 10 * 16;
    }

    Workspace(long rows, long head_dim, long width) {
      float* next = static_cast<float*>(thread_scratch(size(rows, head_dim, width) * sizeof(float)));
      const auto take = [&](long count) {
        float* taken = next;
        next += round_up(count, 16);
        return taken;
      };
      scores = take(rows * kKeyTile);
      panel = take(head_dim * kKeyGroup);
      values = take(kValueGroup * width);
      sums = take(rows * width);
      running = take(rows * width);
      queries = take(rows * head_dim);
      maxima = take(rows);
      totals = take(rows);
      running_maxima = take(rows);
      running_totals = take(rows);
      nothing = take(head_dim);
      __builtin_memset(nothing, 0, sizeof(float) * head_dim);
    }
  };

  long num_queries(long seq) const { return args_.cu_seqlens_q[seq + 1] - args_.cu_seqlens_q[seq]; }
  long tile_rows(const QueryTile& tile) const { return round_up(tile.num_queries * group_, kScoreRows); }
  long first_key(const QueryTile& tile) const {
    return args_.window > 0 && tile.position >= args_.window ? tile.position - args_.window + 1 : 0;
  }
  long end_key(const QueryTile& tile) const { return tile.position + tile.num_queries; }

  int check() const {
    if (args_.cu_seqlens_q[0] != 0 || args_.cu_seqlens_q[args_.num_seqs] != args_.num_tokens) return kBadLengths;
    for (long seq = 0; seq < args_.num_seqs; ++seq) {
      const long queries = num_queries(seq), context = args_.context_lens[seq];
      if (queries < 0 || queries > context) return kBadLengths;
      if (queries == 0) continue;
      if (context > args_.max_blocks * args_.block_size) return kBadLengths;
      const QueryTile all{seq, 0, context - queries, queries};
      for (long block = first_key(all) / args_.block_size; block <= (context - 1) / args_.block_size; ++block) {
        const long id = args_.block_table[seq * args_.max_blocks + block];
        if (id < 0 || id >= args_.num_blocks) return kBadSlot;
      }
    }
    return kDone;
  }

  // The keys of a tile that a query sees, or that any of a task's queries see.
  Span visible(long position, long tile) const {
    const long start = tile * kKeyTile;
    const long first = args_.window > 0 ? position - args_.window + 1 - start : 0, last = position + 1 - start;
    return {first > 0 ? first : 0, last < kKeyTile ? last : kKeyTile};
  }
  Span visible(const QueryTile& tile, long key_tile) const {
    return {visible(tile.position, key_tile).first, visible(tile.position + tile.num_queries - 1, key_tile).last};
  }

  const Element* slot(const void* half, long seq, long head, long position) const {
    const long block = args_.block_table[seq * args_.max_blocks + position / args_.block_size];
    const long token = block * args_.block_size + position % args_.block_size;
    return static_cast<const Element*>(half) + (token * args_.num_kv_heads + head) * args_.head_dim;
  }

  void load_queries(const QueryTile& tile, long head, Workspace& work) const {
    const long head_dim = args_.head_dim, rows = tile_rows(tile);
    float* to = work.queries;
    for (long query = 0; query < tile.num_queries; ++query) {
      const Element* from = static_cast<const Element*>(args_.q) + (tile.row + query) * args_.q_stride + head * group_ * head_dim;
      for (long i = 0; i < group_ * head_dim; ++i) *to++ = widen(from[i]) * args_.scale;
    }
    for (float* end = work.queries + rows * head_dim; to < end;) *to++ = 0.0f;
  }

  // Reduces one key tile for all rows of a task: work.maxima, totals and sums.
  void reduce(const QueryTile& tile, long head, long key_tile, Workspace& work) const {
    const long head_dim = args_.head_dim, rows = tile_rows(tile), real_rows = tile.num_queries * group_;
    const Span all = visible(tile, key_tile);
    const long start = key_tile * kKeyTile;
    for (long k = all.first / kKeyGroup * kKeyGroup; k < all.last; k += kKeyGroup) {
      for (long half = 0; half < 2; ++half) {
        const Element* keys[kLanes];
        for (long lane = 0; lane < kLanes; ++lane) {
          const long key = k + half * kLanes + lane;
          const bool there = key >= all.first && key < all.last;
          keys[lane] = there ? slot(args_.keys, tile.seq, head, start + key) : reinterpret_cast<const Element*>(work.nothing);
        }
        transpose_keys(keys, head_dim, work.panel + half * kLanes);
      }
      for (long row = 0; row < rows; row += kScoreRows) {
        const long last_query = (row + kScoreRows < real_rows ? row + kScoreRows : real_rows) - 1;
        if (visible(tile.position + last_query / group_, key_tile).last <= k) continue;
        score(work.queries + row * head_dim, work.panel, head_dim, work.scores + row * kKeyTile + k);
      }
    }
    for (long row = 0; row < rows; ++row) {
      const Span span = row < real_rows ? visible(tile.position + row / group_, key_tile) : Span{0, 0};
      const Reduced reduced = span.empty() ? Reduced{kNothing, 0.0f} : soften(work.scores + row * kKeyTile, span, all);
      if (span.empty()) {
        for (long k = all.first / kLanes * kLanes; k < all.last; k += kLanes) store(work.scores + row * kKeyTile + k, Vec{});
      }
      work.maxima[row] = reduced.maximum;
      work.totals[row] = reduced.total;
    }
    __builtin_memset(work.sums, 0, sizeof(float) * rows * width_);
    for (long k = all.first; k < all.last; k += kValueGroup) {
      const long num_keys = all.last - k < kValueGroup ? all.last - k : kValueGroup;
      for (long key = 0; key < num_keys; ++key) {
        const Element* from = slot(args_.values, tile.seq, head, start + k + key);
        float* to = work.values + key * width_;
        long d = 0;
        for (; d + kLanes <= head_dim; d += kLanes) store(to + d, load_wide(from + d));
        for (; d < head_dim; ++d) to[d] = widen(from[d]);
        for (; d < width_; ++d) to[d] = 0.0f;
      }
      for (long row = 0; row < real_rows; row += kValueRows) {
        add_values(work.scores + row * kKeyTile + k, work.values, num_keys, width_, work.sums + row * width_);
      }
    }
  }

  // A row's running softmax takes in one key tile of which it sees something.
  void merge(float& maximum, float& total, float* running, float tile_maximum, float tile_total, const float* sums) const {
    const float highest = tile_maximum > maximum ? tile_maximum : maximum;
    const float old_factor = exponential_or_zero(maximum - highest), new_factor = exponential_or_zero(tile_maximum - highest);
    maximum = highest;
    total = total * old_factor + tile_total * new_factor;
    for (long d = 0; d < width_; d += kLanes) store(running + d, load(running + d) * old_factor + load(sums + d) * new_factor);
  }

  void finish(const QueryTile& tile, long head, long row, float total, const float* running) const {
    const long head_dim = args_.head_dim;
    Element* to = static_cast<Element*>(args_.out) +
                  ((tile.row + row / group_) * args_.num_heads + head * group_ + row % group_) * head_dim;
    long d = 0;
    for (; d + kLanes <= head_dim; d += kLanes) store_rounded(to + d, load(running + d) / total);
    for (; d < head_dim; ++d) store_rounded(to + d, running[d] / total);
  }

  // Enough tasks for all threads: each reduces and merges its key tiles one after the other.
  void whole(const QueryTile* tiles, long num_tiles) const {
    auto body = [&](long begin, long end) {
      for (long task = begin; task < end; ++task) {
        // The last queries see the most keys: they come first.
        const QueryTile& tile = tiles[num_tiles - 1 - task / args_.num_kv_heads];
        const long head = task % args_.num_kv_heads, real_rows = tile.num_queries * group_, rows = tile_rows(tile);
        Workspace work(rows, args_.head_dim, width_);
        load_queries(tile, head, work);
        for (long row = 0; row < real_rows; ++row) {
          // The sink is the first maximum, with weight 1 and no value.
          work.running_maxima[row] = args_.sinks[head * group_ + row % group_];
          work.running_totals[row] = 1.0f;
        }
        __builtin_memset(work.running, 0, sizeof(float) * rows * width_);
        for (long key_tile = first_key(tile) / kKeyTile; key_tile * kKeyTile < end_key(tile); ++key_tile) {
          reduce(tile, head, key_tile, work);
          for (long row = 0; row < real_rows; ++row) {
            if (visible(tile.position + row / group_, key_tile).empty()) continue;
            merge(work.running_maxima[row], work.running_totals[row], work.running + row * width_, work.maxima[row], work.totals[row],
                  work.sums + row * width_);
          }
        }
        for (long row = 0; row < real_rows; ++row) finish(tile, head, row, work.running_totals[row], work.running + row * width_);
      }
    };
    parallel_for(num_tiles * args_.num_kv_heads, 1, body);
  }

  // Few queries with long contexts: all key tiles are reduced in parallel, then merged in their order.
  void split(const QueryTile* tiles, long num_tiles, long num_rows) const {
    const long stride = num_rows * (width_ + 2);  // of a reduced key tile
    long num_tasks = 0;
    for (long i = 0; i < num_tiles; ++i) num_tasks += num_key_tiles(tiles[i]) * args_.num_kv_heads;
    float* reduced = static_cast<float*>(__builtin_malloc(sizeof(float) * stride * num_tasks));
    auto reduce_some = [&](long begin, long end) {
      for (long task = begin; task < end; ++task) {
        long index = task, i = 0;
        for (; index >= num_key_tiles(tiles[i]) * args_.num_kv_heads; ++i) index -= num_key_tiles(tiles[i]) * args_.num_kv_heads;
        const QueryTile& tile = tiles[i];
        const long head = index / num_key_tiles(tile), key_tile = first_key(tile) / kKeyTile + index % num_key_tiles(tile);
        Workspace work(num_rows, args_.head_dim, width_);
        load_queries(tile, head, work);
        reduce(tile, head, key_tile, work);
        float* to = reduced + task * stride;
        __builtin_memcpy(to, work.maxima, sizeof(float) * num_rows);
        __builtin_memcpy(to + num_rows, work.totals, sizeof(float) * num_rows);
        __builtin_memcpy(to + 2 * num_rows, work.sums, sizeof(float) * tile_rows(tile) * width_);
      }
    };
    parallel_for(num_tasks, 1, reduce_some);
    auto merge_some = [&](long begin, long end) {
      for (long task = begin; task < end; ++task) {
        const long head = task % args_.num_kv_heads, i = task / args_.num_kv_heads;
        const QueryTile& tile = tiles[i];
        const float* from = reduced;
        for (long before = 0; before < i; ++before) from += num_key_tiles(tiles[before]) * args_.num_kv_heads * stride;
        from += head * num_key_tiles(tile) * stride;
        float* running = static_cast<float*>(thread_scratch(sizeof(float) * width_));
        for (long row = 0; row < tile.num_queries * group_; ++row) {
          float maximum = args_.sinks[head * group_ + row % group_], total = 1.0f;
          __builtin_memset(running, 0, sizeof(float) * width_);
          for (long k = 0; k < num_key_tiles(tile); ++k) {
            if (visible(tile.position + row / group_, first_key(tile) / kKeyTile + k).empty()) continue;
            const float* part = from + k * stride;
            merge(maximum, total, running, part[row], part[num_rows + row], part + 2 * num_rows + row * width_);
          }
          finish(tile, head, row, total, running);
        }
      }
    };
    parallel_for(num_tiles * args_.num_kv_heads, 1, merge_some);
    __builtin_free(reduced);
  }

  long num_key_tiles(const QueryTile& tile) const { return (end_key(tile) - 1) / kKeyTile + 1 - first_key(tile) / kKeyTile; }

  const AttentionArgs& args_;
  const long group_, width_, queries_per_tile_;
};

int attention(const AttentionArgs& args) {
  return args.type == kBfloat16 ? Attention<uint16_t>(args).run() : Attention<float>(args).run();
}
