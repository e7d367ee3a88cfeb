// The one thread pool of the extension: the caller's thread and num_threads - 1 workers.
#pragma once

namespace cantata {

using Task = void (*)(void* context, long begin, long end);

// Calls task over [0, count) in pieces of `chunk`, handed out as threads get free; returns when all are done. Which thread runs a piece
// never shows in a result. A call while another thread uses the pool runs on the caller's thread alone. A forked child has a pool of its own.
void run(Task task, void* context, long count, long chunk);

template <typename Body>
void parallel_for(long count, long chunk, Body& body) {
  run([](void* context, long begin, long end) { (*static_cast<Body*>(context))(begin, end); }, &body, count, chunk);
}

int num_threads();

}  // namespace cantata
