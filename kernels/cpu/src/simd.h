// Vectors of the instruction set at hand, and how MXFP4 becomes one. Included by each isa_*.cpp after its target pragma, inside an unnamed
// namespace: no inline function may leak into code for lesser processors.

#if CANTATA_ISA == 2
constexpr int kLanes = 16;
#elif CANTATA_ISA == 1
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HalfVec __attribute__((vector_size(kLanes * 2)));

inline Vec load(const float* from) {
  Vec value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

inline void store(float* to, Vec value) { __builtin_memcpy(to, &value, sizeof value); }

inline Vec broadcast(float value) { return value - Vec{}; }  // minus keeps the sign of zero

inline Vec load_weights(const float* from) { return load(from); }

// bf16 is the upper half of an fp32.
inline Vec load_weights(const uint16_t* from) {
  HalfVec halves;
  __builtin_memcpy(&halves, from, sizeof halves);
  return (Vec)(__builtin_convertvector(halves, IntVec) << 16);
}

inline float widen(float value) { return value; }

inline float widen(uint16_t value) {
  const uint32_t bits = (uint32_t)value << 16;
  float wide;
  __builtin_memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// The lanes from first to last: the order of a sum is part of the result.
inline float sum(Vec value) {
  float total = value[0];
  for (int lane = 1; lane < kLanes; ++lane) total += value[lane];
  return total;
}

// 2^(code - 127) for kLanes scale codes; code 0 is the subnormal 2^-127.
inline Vec scales(const uint8_t* codes) {
  typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
  Bytes bytes;
  __builtin_memcpy(&bytes, codes, sizeof bytes);
  const IntVec bits = __builtin_convertvector(bytes, IntVec) << 23;
  const IntVec least = IntVec{} + 0x00400000;
  return (Vec)(bits > least ? bits : least);
}

// e2m1 values as bf16, upper and lower byte, by code.
constexpr uint8_t kUpper[16] = {0x00, 0x3F, 0x3F, 0x3F, 0x40, 0x40, 0x40, 0x40, 0x80, 0xBF, 0xBF, 0xBF, 0xC0, 0xC0, 0xC0, 0xC0};
constexpr uint8_t kLower[16] = {0x00, 0x00, 0x80, 0xC0, 0x00, 0x40, 0x80, 0xC0, 0x00, 0x00, 0x80, 0xC0, 0x00, 0x40, 0x80, 0xC0};

// kLanes rows times 8 columns of the layout `rows16` → a vector for each column. A unit of 16 bytes holds 4 rows: the low nibble of byte
// 8h + 2r + j is column 2h + j of row r, the high nibble column 4 + 2h + j. So two table lookups and one byte interleave give bf16 pairs,
// the lower half of each 32-bit lane the even column.
#if CANTATA_ISA == 2
inline void decode(const uint8_t* from, Vec columns[8]) {
  const __m512i upper = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)kUpper));
  const __m512i lower = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)kLower));
  const __m512i nibble = _mm512_set1_epi8(15), odd = _mm512_set1_epi32((int)0xFFFF0000);
  const __m512i packed = _mm512_loadu_si512(from);
  const __m512i codes[2] = {_mm512_and_si512(packed, nibble), _mm512_and_si512(_mm512_srli_epi16(packed, 4), nibble)};
  for (int half = 0; half < 2; ++half) {
    const __m512i high = _mm512_shuffle_epi8(upper, codes[half]), low = _mm512_shuffle_epi8(lower, codes[half]);
    const __m512i pairs[2] = {_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};
    for (int pair = 0; pair < 2; ++pair) {
      columns[4 * half + 2 * pair] = (Vec)_mm512_slli_epi32(pairs[pair], 16);
      columns[4 * half + 2 * pair + 1] = (Vec)_mm512_and_si512(pairs[pair], odd);
    }
  }
}
#elif CANTATA_ISA == 1
inline void decode(const uint8_t* from, Vec columns[8]) {
  const __m256i upper = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)kUpper));
  const __m256i lower = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)kLower));
  const __m256i nibble = _mm256_set1_epi8(15), odd = _mm256_set1_epi32((int)0xFFFF0000);
  const __m256i packed = _mm256_loadu_si256((const __m256i*)from);
  const __m256i codes[2] = {_mm256_and_si256(packed, nibble), _mm256_and_si256(_mm256_srli_epi16(packed, 4), nibble)};
  for (int half = 0; half < 2; ++half) {
    const __m256i high = _mm256_shuffle_epi8(upper, codes[half]), low = _mm256_shuffle_epi8(lower, codes[half]);
    const __m256i pairs[2] = {_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)};
    for (int pair = 0; pair < 2; ++pair) {
      columns[4 * half + 2 * pair] = (Vec)_mm256_slli_epi32(pairs[pair], 16);
      columns[4 * half + 2 * pair + 1] = (Vec)_mm256_and_si256(pairs[pair], odd);
    }
  }
}
#else
inline void decode(const uint8_t* from, Vec columns[8]) {
  static_assert(kLanes == 4, "one unit");
  for (int byte = 0; byte < 16; ++byte) {
    const int column = 2 * (byte / 8) + byte % 2, row = byte % 8 / 2, low = from[byte] & 15, high = from[byte] >> 4;
    columns[column][row] = widen((uint16_t)(kUpper[low] << 8 | kLower[low]));
    columns[4 + column][row] = widen((uint16_t)(kUpper[high] << 8 | kLower[high]));
  }
}
#endif

// e^x by the Cephes polynomial, relative error below 2e-7; every lane by the same operations.
inline Vec exponential(Vec x) {
  const Vec lowest = broadcast(-87.0f), highest = broadcast(88.0f);
  x = x < lowest ? lowest : x;
  x = x > highest ? highest : x;
  const Vec half = broadcast(0.5f);
  const Vec scaled = x * 1.44269504088896341f;
  const IntVec exponent = __builtin_convertvector(scaled < 0.0f ? scaled - half : scaled + half, IntVec);
  const Vec whole = __builtin_convertvector(exponent, Vec);
  x = x - whole * 0.693359375f;
  x = x - whole * -2.12194440e-4f;
  Vec value = broadcast(1.9875691500e-4f);
  value = value * x + 1.3981999507e-3f;
  value = value * x + 8.3334519073e-3f;
  value = value * x + 4.1665795894e-2f;
  value = value * x + 1.6666665459e-1f;
  value = value * x + 5.0000001201e-1f;
  value = value * (x * x) + x + 1.0f;
  return value * (Vec)((exponent + 127) << 23);
}
