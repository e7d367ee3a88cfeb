"""Threads for the work on large texts, so that the event loop serves others meanwhile, and small requests do not wait behind large ones."""

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from workers.errors import Overloaded

T = TypeVar("T")

INLINE_CHARS = 8192
"""Texts up to this long are worked on by the event loop itself: under a millisecond or two."""
LARGE_CHARS = 1 << 18
"""Of what has a thread of its own: a second and more. Many such requests wait for each other, and nothing else waits for them."""
MAX_WAITING_CHARS = 1 << 28
"""Of all texts that threads have or wait for."""
_NUM_MEDIUM_THREADS = 2


class TextThreads:
    """Belongs to one event loop. The work is on immutable texts and releases the GIL where it takes long."""

    def __init__(self) -> None:
        self._medium = ThreadPoolExecutor(_NUM_MEDIUM_THREADS, thread_name_prefix="cantata-text")
        self._large = ThreadPoolExecutor(1, thread_name_prefix="cantata-large-text")
        self._waiting_chars = 0

    async def run(self, num_chars: int, work: Callable[[], T]) -> T:
        """The result of work on a text of so many characters.

        Raises:
            Overloaded: too much waits already.
        """
        if num_chars <= INLINE_CHARS:
            return work()
        if self._waiting_chars and self._waiting_chars + num_chars > MAX_WAITING_CHARS:
            raise Overloaded("The server has as many large requests to read as it takes on; try again in a moment.")
        loop = asyncio.get_running_loop()
        self._waiting_chars += num_chars

        def done(_: "Future[T]") -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._release, num_chars)

        # The thread's own future: where the client leaves, work that has begun goes on, and counts.
        future = (self._medium if num_chars <= LARGE_CHARS else self._large).submit(work)
        future.add_done_callback(done)
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Begin nothing more."""
        for executor in (self._medium, self._large):
            executor.shutdown(wait=False, cancel_futures=True)

    def _release(self, num_chars: int) -> None:
        self._waiting_chars -= num_chars
