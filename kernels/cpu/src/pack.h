// A checkpoint's MXFP4 weights into the layout `rows16`: four rows of a group of 32 columns at a time, which is four units.

typedef uint8_t Bytes16 __attribute__((vector_size(16)));
typedef uint32_t Words4 __attribute__((vector_size(16)));

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

inline Words4 load_words(const uint8_t* from) {
  Words4 words;
  __builtin_memcpy(&words, from, sizeof words);
  return words;
}

void pack_group(const PackArgs& args, long group) {
  const long row_bytes = args.num_groups * 16;
  for (long unit = 0; unit < 4; ++unit) {
    const uint8_t* from = args.blocks + (16 * group + 4 * unit) * row_bytes;
    uint8_t* to = args.packed_blocks + group * 16 * row_bytes + 16 * unit;
    for (long columns = 0; columns < args.num_groups; ++columns, from += 16, to += 256) {
      const Words4 rows[4] = {load_words(from), load_words(from + row_bytes), load_words(from + 2 * row_bytes), load_words(from + 3 * row_bytes)};
      const Words4 low = {0, 4, 1, 5}, high = {2, 6, 3, 7};
      const Words4 a = __builtin_shuffle(rows[0], rows[1], low), b = __builtin_shuffle(rows[2], rows[3], low);
      const Words4 c = __builtin_shuffle(rows[0], rows[1], high), d = __builtin_shuffle(rows[2], rows[3], high);
      const Words4 front = {0, 1, 4, 5}, back = {2, 3, 6, 7};
      const Words4 chunks[4] = {__builtin_shuffle(a, b, front), __builtin_shuffle(a, b, back), __builtin_shuffle(c, d, front),
                                __builtin_shuffle(c, d, back)};
      for (int chunk = 0; chunk < 4; ++chunk) {
        const Words4 packed = pack_unit(chunks[chunk]);
        __builtin_memcpy(to + 64 * chunk, &packed, sizeof packed);
      }
    }
  }
  for (long row = 0; row < 16; ++row) {
    const uint8_t* from = args.scales + (16 * group + row) * args.num_groups;
    uint8_t* to = args.packed_scales + group * 16 * args.num_groups + row;
    for (long scale = 0; scale < args.num_groups; ++scale) to[16 * scale] = from[scale];
  }
}

void pack(const PackArgs& args) {
  auto body = [&](long begin, long end) {
    for (long group = begin; group < end; ++group) pack_group(args, group);
  };
  parallel_for(args.num_rows / 16, 4, body);
}
