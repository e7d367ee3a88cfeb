// A checkpoint's MXFP4 weights into the layout `rows16`: 16 rows at a time, a column group of 32 after the other, so that both sides are
// read and written from first to last. 16-byte vectors do for every instruction set: memory is the limit.
#pragma once

#include <stdint.h>

#include "ops.h"
#include "shuffle.h"
#include "simd.h"

namespace cantata {
namespace {

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

// Lane r holds 8 columns of row r, a nibble each from the lowest up → the even columns in its lower half, the odd ones in its upper half.
inline Words4 pack_unit(Words4 columns) {
  const Words4 nibble = Words4{} + 0x0F0F0F0F, byte = Words4{} + 0x00FF00FF;
  Words4 even = columns & nibble, odd = columns >> 4 & nibble;
  even = (even | even >> 4) & byte;
  odd = (odd | odd >> 4) & byte;
  return ((even | even >> 8) & 0xFFFF) | (odd | odd >> 8) << 16;
}

// 4 rows of 4 words → 4 columns of them.
inline void transpose_words(const uint8_t* from, long row_stride, Words4 columns[4]) {
  const Words4 rows[4] = {load_vector<Words4>(from), load_vector<Words4>(from + row_stride), load_vector<Words4>(from + 2 * row_stride),
                          load_vector<Words4>(from + 3 * row_stride)};
  const Words4 low = {0, 4, 1, 5}, high = {2, 6, 3, 7};
  const Words4 a = __builtin_shuffle(rows[0], rows[1], low), b = __builtin_shuffle(rows[2], rows[3], low);
  const Words4 c = __builtin_shuffle(rows[0], rows[1], high), d = __builtin_shuffle(rows[2], rows[3], high);
  const Words4 front = {0, 1, 4, 5}, back = {2, 3, 6, 7};
  columns[0] = __builtin_shuffle(a, b, front);
  columns[1] = __builtin_shuffle(a, b, back);
  columns[2] = __builtin_shuffle(c, d, front);
  columns[3] = __builtin_shuffle(c, d, back);
}

// 4 rows of 32 columns → four units of 8 columns, one in each of the group's four chunks of 64 bytes.
inline void pack_four_rows(const uint8_t* from, long row_stride, uint8_t* to) {
  Words4 units[4];
  transpose_words(from, row_stride, units);
  for (long unit = 0; unit < 4; ++unit) store_vector(to + 64 * unit, pack_unit(units[unit]));
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

// Dense bf16 rows into the layouts of kernels/cpu/dense.py, 16 pairs of columns of a group's rows at a time. Nothing is written where the
// layout has more rows or columns.
inline void pack_bf16_rows(const PackDenseArgs& args, long row, long rows) {
  uint16_t* to = static_cast<uint16_t*>(args.packed) + (args.first_row + row) / 16 * args.packed_width * 16;
  const uint16_t* from = args.weight + row * args.width;
  const long lane = (args.first_row + row) % 16;
  for (long column = 0; column < args.width; column += 32) {
    const long columns = args.width - column < 32 ? args.width - column : 32;
    if (rows == 16 && columns == 32) {
      for (long r = 0; r < 16; r += 4) {
        for (long pair = 0; pair < 16; pair += 4) {
          Words4 pairs[4];
          transpose_words((const uint8_t*)(from + r * args.width + column + 2 * pair), 2 * args.width, pairs);
          for (long i = 0; i < 4; ++i) store_vector((uint8_t*)(to + column * 16 + 32 * (pair + i) + 2 * r), pairs[i]);
        }
      }
      continue;
    }
    for (long r = 0; r < rows; ++r) {
      uint16_t* pairs = to + column * 16 + (lane + r) * 2;
      const uint16_t* values = from + r * args.width + column;
      for (long pair = 0; pair < columns / 2; ++pair) __builtin_memcpy(pairs + 32 * pair, values + 2 * pair, 4);
      if (columns % 2) pairs[32 * (columns / 2)] = values[columns - 1];
    }
  }
}

// A row by its largest magnitude over 127.
inline void pack_int8_row(const PackDenseArgs& args, long row) {
  const long to_row = args.first_row + row;
  int8_t* to = static_cast<int8_t*>(args.packed) + to_row / 16 * args.packed_width * 16 + to_row % 16 / 4 * 16 + to_row % 4 * 2;
  const uint16_t* from = args.weight + row * args.width;
  uint16_t largest = 0;  // magnitudes compare as their bits do
  for (long column = 0; column < args.width; ++column) {
    const uint16_t magnitude = from[column] & 0x7FFF;
    largest = magnitude > largest ? magnitude : largest;
  }
  const float inverse = largest == 0 ? 0.0f : 127.0f / widen(largest);
  args.scales[to_row] = widen(largest) / 127.0f;
  for (long column = 0; column < args.width; column += 32) {
    const long columns = args.width - column < 32 ? args.width - column : 32;
    int8_t values[32] = {};
    for (long i = 0; i < columns; ++i) {
      const float value = widen(from[column + i]) * inverse;
      values[i] = (int8_t)(int32_t)(value < 0 ? value - 0.5f : value + 0.5f);
    }
    for (long pair = 0; pair < 16; ++pair) __builtin_memcpy(to + (column / 4 + pair / 2) * 64 + pair % 2 * 8, values + 2 * pair, 2);
  }
}

void pack_dense(const PackDenseArgs& args) {
  for (long row = 0; row < args.num_rows;) {
    const long in_group = 16 - (args.first_row + row) % 16, left = args.num_rows - row, rows = left < in_group ? left : in_group;
    if (args.scales == nullptr) {
      pack_bf16_rows(args, row, rows);
    } else {
      for (long r = row; r < row + rows; ++r) pack_int8_row(args, r);
    }
    row += rows;
  }
}

}  // namespace
}  // namespace cantata
