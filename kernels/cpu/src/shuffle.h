// `__builtin_shuffle`, which is GCC's, for the clang that editors and analysers run.
#pragma once

#if defined(__clang__)
namespace cantata {
namespace {

template <typename Vector, typename Lanes>
inline Vector __builtin_shuffle(Vector first, Vector second, Lanes lanes) {
  constexpr int kCount = sizeof(lanes) / sizeof(lanes[0]);
  Vector result = first;
  for (int i = 0; i < kCount; ++i) {
    const int lane = lanes[i] % (2 * kCount);
    result[i] = lane < kCount ? first[lane] : second[lane - kCount];
  }
  return result;
}

}  // namespace
}  // namespace cantata
#endif
