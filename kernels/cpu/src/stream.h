// Reads memory once as fast as it comes: what the kernels are measured against (benchmarks/cpu.py).

uint64_t read_through(const ReadArgs& args) {
  constexpr long kPiece = 1 << 16;
  std::atomic<uint64_t> total{0};
  auto body = [&](long begin, long end) {
    IntVec sums[4] = {};
    const long last = end * kPiece < args.num_bytes ? end * kPiece : args.num_bytes;
    for (long at = begin * kPiece; at + (long)sizeof sums <= last; at += sizeof sums) {
      for (long ahead = 4096; ahead < 4096 + (long)sizeof sums; ahead += 64) __builtin_prefetch(args.memory + at + ahead);
      IntVec values[4];
      __builtin_memcpy(values, args.memory + at, sizeof values);
      for (int i = 0; i < 4; ++i) sums[i] ^= values[i];
    }
    const IntVec all = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
    uint64_t folded = 0;
    for (int lane = 0; lane < kLanes; ++lane) folded ^= (uint32_t)all[lane];
    total.fetch_xor(folded);
  };
  const long pieces = (args.num_bytes + kPiece - 1) / kPiece;
  parallel_for(pieces, pieces / (16 * num_threads()), body);
  return total.load();
}
