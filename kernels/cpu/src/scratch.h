// Memory that lasts from one operation to the next, so that a step allocates nothing.
#pragma once

namespace cantata {

// At least `bytes` bytes of the calling thread's own, aligned to 64; what was in them is lost with the next call on the same thread. Where
// there is no memory the process ends and says so.
void* thread_scratch(long bytes);

// The same, other memory: for what an operation keeps while its tasks use theirs.
void* operation_scratch(long bytes);

}  // namespace cantata
