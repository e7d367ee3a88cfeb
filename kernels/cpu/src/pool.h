// The one thread pool of the extension: the caller's thread and num_threads - 1 workers.
#pragma once

#include <atomic>
#include <limits>

namespace cantata {

// The pieces of [0, count) that are left, shared by the threads of a job: each of `least`, or of a share of what is left if that is more.
class Pieces {
 public:
  Pieces(std::atomic<long>& next, long count, long least, long shares);

  // The next piece, for the caller alone; false if none is left.
  bool take(long& begin, long& end);

 private:
  std::atomic<long>& next_;
  const long count_, least_, shares_;
};

using Task = void (*)(void* context, Pieces& pieces);

// Calls task on the caller's thread and once on each worker that wakes up in time, to take pieces of [0, count) until none is left; returns
// when all are done. Which thread runs a piece never shows in a result. A call while another thread uses the pool runs on the caller's thread
// alone. A forked child has a pool of its own.
void run(Task task, void* context, long count, long least, long shares);

int num_threads();

// body(begin, end) for pieces of `chunk`.
template <typename Body>
void parallel_for(long count, long chunk, Body& body) {
  const auto task = [](void* context, Pieces& pieces) {
    for (long begin, end; pieces.take(begin, end);) (*static_cast<Body*>(context))(begin, end);
  };
  run(task, &body, count, chunk < 1 ? 1 : chunk, std::numeric_limits<long>::max());
}

// body(pieces) once on each of these threads, for what needs preparation or loses at the borders of pieces: large ones first, then smaller
// and smaller ones, so that threads end together.
template <typename Body>
void parallel_pieces(long count, Body& body) {
  const auto task = [](void* context, Pieces& pieces) { (*static_cast<Body*>(context))(pieces); };
  run(task, &body, count, 1, 2L * num_threads());
}

}  // namespace cantata
