// Memory that lasts from one operation to the next, so that a step allocates nothing.
#pragma once

namespace cantata {

// At least `bytes` bytes of the calling thread's own, aligned to 64; what was in them is lost with the next call on the same thread.
void* thread_scratch(long bytes);

}  // namespace cantata
