"""Threads for work on large texts: the event loop serves other requests meanwhile.

Small requests do not wait for large ones.
"""

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from workers.errors import Overloaded

T = TypeVar("T")

INLINE_CHARS = 8192
"""Longest text, in characters, that the event loop handles itself, which takes a millisecond or
two."""
LARGE_CHARS = 1 << 18
"""Length, in characters, above which texts share one thread and wait for each other; such a text
takes a second or more."""
MAX_WAITING_CHARS = 1 << 28
"""Maximum number of characters of all texts that threads work on or have queued."""
_NUM_MEDIUM_THREADS = 2


class TextThreads:
    """The threads of one event loop. Long work should release the GIL."""

    def __init__(self) -> None:
        self._medium = ThreadPoolExecutor(_NUM_MEDIUM_THREADS, thread_name_prefix="cantata-text")
        self._large = ThreadPoolExecutor(1, thread_name_prefix="cantata-large-text")
        self._waiting_chars = 0

    async def run(self, num_chars: int, work: Callable[[], T]) -> T:
        """Return the result of `work`, done on the thread for a text of `num_chars` characters.

        Raises:
            Overloaded: MAX_WAITING_CHARS are queued.
        """
        if num_chars <= INLINE_CHARS:
            return work()
        if self._waiting_chars and self._waiting_chars + num_chars > MAX_WAITING_CHARS:
            raise Overloaded("The server is at capacity for large prompts; retry after 1 s.")
        loop = asyncio.get_running_loop()

        def done(_: "Future[T]") -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._release, num_chars)

        # The thread's own future: work that has begun goes on after its client has left, and
        # counts.
        future = (self._medium if num_chars <= LARGE_CHARS else self._large).submit(work)
        self._waiting_chars += num_chars
        future.add_done_callback(done)
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Start no more work."""
        for executor in (self._medium, self._large):
            executor.shutdown(wait=False, cancel_futures=True)

    def _release(self, num_chars: int) -> None:
        self._waiting_chars -= num_chars
