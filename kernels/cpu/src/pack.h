// A checkpoint's MXFP4 weights into the layout `rows16`: 16 rows at a time, a column group of 32 after the other, so that both sides are
// read and written from first to last. 16-byte vectors do for every instruction set: memory is the limit.

typedef uint8_t Bytes16 __attribute__((vector_size(16)));
typedef uint32_t Words4 __attribute__((vector_size(16)));

template <typename Vector>
inline Vector load_vector(const uint8_t* from) {
  Vector value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

template <typename Vector>
inline void store_vector(uint8_t* to, Vector value) {
  __builtin_memcpy(to, &value, sizeof value);
}

// Lane r holds 8 columns of row r, a nibble each from the lowest up → the unit's 16 bytes: byte 2r + j the columns j (low) and j + 4,
// byte 8 + 2r + j the columns 2 + j and 6 + j.
inline Words4 pack_unit(Words4 columns) {
  const Words4 nibble = Words4{} + 0x0F0F0F0F;
  const Words4 even = columns & nibble, odd = columns >> 4 & nibble;
  // Bytes 0 and 1: columns (0, 4) and (2, 6); (1, 5) and (3, 7).
  const Words4 pairs = ((even | even >> 12) & 0xFFFF) | (odd | odd >> 12) << 16;
  const Bytes16 order = {0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15};
  return (Words4)__builtin_shuffle((Bytes16)pairs, order);
}

// 4 rows of 32 columns → four units of 8 columns, one in each of the group's four chunks of 64 bytes.
inline void pack_four_rows(const uint8_t* from, long row_stride, uint8_t* to) {
  const Words4 rows[4] = {load_vector<Words4>(from), load_vector<Words4>(from + row_stride), load_vector<Words4>(from + 2 * row_stride),
                          load_vector<Words4>(from + 3 * row_stride)};
  const Words4 low = {0, 4, 1, 5}, high = {2, 6, 3, 7};
  const Words4 a = __builtin_shuffle(rows[0], rows[1], low), b = __builtin_shuffle(rows[2], rows[3], low);
  const Words4 c = __builtin_shuffle(rows[0], rows[1], high), d = __builtin_shuffle(rows[2], rows[3], high);
  const Words4 front = {0, 1, 4, 5}, back = {2, 3, 6, 7};
  store_vector(to, pack_unit(__builtin_shuffle(a, b, front)));
  store_vector(to + 64, pack_unit(__builtin_shuffle(a, b, back)));
  store_vector(to + 128, pack_unit(__builtin_shuffle(c, d, front)));
  store_vector(to + 192, pack_unit(__builtin_shuffle(c, d, back)));
}

// 16 rows of 16 scales → 16 columns; returns lanes that are not 0 where a scale is NaN.
inline Bytes16 transpose_scales(const uint8_t* from, long row_stride, uint8_t* to) {
  Bytes16 values[16], nan = {};
  for (int row = 0; row < 16; ++row) {
    values[row] = load_vector<Bytes16>(from + row * row_stride);
    nan |= (Bytes16)(values[row] == 255);
  }
  const Bytes16 low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  const Bytes16 high = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  for (int round = 0; round < 4; ++round) {
    Bytes16 next[16];
    for (int pair = 0; pair < 8; ++pair) {
      next[2 * pair] = __builtin_shuffle(values[pair], values[pair + 8], low);
      next[2 * pair + 1] = __builtin_shuffle(values[pair], values[pair + 8], high);
    }
    for (int column = 0; column < 16; ++column) values[column] = next[column];
  }
  for (int column = 0; column < 16; ++column) store_vector(to + 16 * column, values[column]);
  return nan;
}

// Whether a scale is NaN.
inline bool pack_scales(const uint8_t* from, long row_stride, uint8_t* to, long num_groups) {
  Bytes16 nan = {};
  long group = 0;
  for (; group + 16 <= num_groups; group += 16) nan |= transpose_scales(from + group, row_stride, to + 16 * group);
  bool found = false;
  for (; group < num_groups; ++group) {
    for (long row = 0; row < 16; ++row) {
      to[16 * group + row] = from[row * row_stride + group];
      found |= from[row * row_stride + group] == 255;
    }
  }
  for (int lane = 0; lane < 16; ++lane) found |= nan[lane] != 0;
  return found;
}

// Fetches a quarter of the cache lines that the next 16 rows have at four groups from `group` on: all of them after four calls. The
// processor does not see so many streams ahead by itself; this is worth a tenth.
inline void prefetch_next_rows(const uint8_t* from, long row_stride, long group) {
  const uint8_t* next = from + (16 + 4 * (group % 4)) * row_stride + 16 * (group - group % 4);
  for (long row = 0; row < 4; ++row) __builtin_prefetch(next + row * row_stride);
}

bool pack(const PackArgs& args) {
  bool nan = false;
  for (long row = 0; row < args.num_rows; row += 16) {
    const uint8_t* from = args.blocks + row * args.blocks_stride;
    uint8_t* to = args.packed_blocks + row * 16 * args.packed_groups;
    for (long group = 0; group < args.num_groups; ++group) {
      prefetch_next_rows(from, args.blocks_stride, group);
      for (long unit = 0; unit < 4; ++unit) {
        pack_four_rows(from + 4 * unit * args.blocks_stride + 16 * group, args.blocks_stride, to + 256 * group + 16 * unit);
      }
    }
    nan |= pack_scales(args.scales + row * args.scales_stride, args.scales_stride, args.packed_scales + row * args.packed_groups,
                       args.num_groups);
  }
  return nan;
}
