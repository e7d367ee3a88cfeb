"""The check that a grammar compiles within bounds, before an engine sees it.

Grammars are tried in worker processes, which do not cost the gateway more than they may. What
compiles quickly is never queued after what does not: a grammar that has not compiled after
QUICK_CPU_S is tried once more, by the other process.
"""

import asyncio
import contextlib
import hashlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import orjson

from cluster.grammars.process import WorkerProcess, overloaded
from cluster.grammars.wire import MAX_BYTES, MAX_CPU_S, QUICK_CPU_S, Job, Verdict
from workers.errors import InvalidRequest
from workers.grammars.grammar import Grammar

MAX_CACHED_BYTES = 4 * 2**20
"""Maximum size of the cached verdicts."""
MAX_WAITING_BYTES = 64 * 2**20
"""Maximum size of the grammars that are being checked or queued."""
MAX_WAITING = 128
"""Maximum number of these."""
MAX_WAIT_S = 30.0
"""Seconds after which a request stops waiting for a check."""

_VERDICT_BYTES = 400
"""Size of a cached verdict without its texts."""
_SIMPLER = "use fewer or shorter patterns, choices and optional properties, and less nesting"
_ENDS = {
    "cpu": f"it takes more than {MAX_CPU_S:.0f} s to compile; {_SIMPLER}",
    "memory": f"it takes more than {MAX_BYTES >> 20} MiB to compile; {_SIMPLER}",
    "crash": f"the compiler fails at it; {_SIMPLER}",
}


class GrammarChecker:
    """The checks of one gateway and their worker processes. Belongs to one event loop; the owner
    calls `close`."""

    def __init__(self) -> None:
        self._quick, self._thorough = _Lane("quick"), _Lane("thorough")
        self._verdicts: OrderedDict[bytes, Verdict] = OrderedDict()
        self._cached_bytes = 0
        self._running: dict[bytes, asyncio.Task[Verdict]] = {}
        self._waiting_bytes = 0

    async def check(self, grammar: Grammar, param: str) -> None:
        """Return if the grammar compiles.

        Args:
            param: path in the request of what the grammar was made from.
        Raises:
            InvalidRequest: it does not, or not within the limits; names the path and the reason.
            Overloaded: too many checks are waiting.
        """
        key = hashlib.sha256(grammar.text.encode()).digest()
        verdict = self._verdicts.get(key)
        if verdict is not None:
            self._verdicts.move_to_end(key)
        else:
            verdict = await self._tried(key, grammar)
        if verdict.ended is not None:
            raise InvalidRequest(f"{param} cannot be enforced: {_ENDS[verdict.ended]}.", param)
        if verdict.reason:
            path = f"{param}{verdict.place}"
            raise InvalidRequest(f"{path} cannot be enforced: {verdict.reason}.", path)

    async def check_beginning(self, grammar: Grammar, text: str, param: str, name: str) -> None:
        """Return if texts of a grammar that compiles can begin with this one.

        Args:
            param, name: paths in the request of what the grammar was made from, and of what asks
                for the beginning.
        Raises:
            InvalidRequest: none can, or that was not found out within the limits.
            Overloaded: too many checks are waiting.
        """
        if not text:
            return
        verdict = await self._tried(
            hashlib.sha256(orjson.dumps((grammar.text, text))).digest(), grammar, text
        )
        if verdict.ended is not None:
            raise InvalidRequest(f"{name}: the last message is too long for {param} to be enforced.", name)
        if verdict.reason:
            raise InvalidRequest(
                f"{name}: the last message is no beginning of what {param} asks for; change one of them.",
                name,
            )

    def close(self) -> None:
        """End the worker processes. Checks under way raise `Overloaded`."""
        for lane in (self._quick, self._thorough):
            lane.close()

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the running workers."""
        return [pid for lane in (self._quick, self._thorough) if (pid := lane.worker.pid) is not None]

    async def _tried(self, key: bytes, grammar: Grammar, beginning: str = "") -> Verdict:
        """Return the verdict of the workers. Requests with the same grammar share one trial, which
        goes on when one of them leaves."""
        task = self._running.get(key)
        if task is None:
            size = len(grammar.text) + len(beginning)
            full = len(self._running) >= MAX_WAITING or self._waiting_bytes + size > MAX_WAITING_BYTES
            if full and self._running:
                raise overloaded()
            self._waiting_bytes += size
            task = self._running[key] = asyncio.create_task(self._try(grammar, beginning))
            task.add_done_callback(lambda done: self._finish(key, size, done))
        try:
            async with asyncio.timeout(MAX_WAIT_S):
                return await asyncio.shield(task)
        except TimeoutError:
            raise overloaded() from None

    async def _try(self, grammar: Grammar, beginning: str) -> Verdict:
        verdict = await self._quick.tried(Job(grammar.text, QUICK_CPU_S, MAX_BYTES, beginning))
        if verdict.ended == "cpu":
            verdict = await self._thorough.tried(Job(grammar.text, MAX_CPU_S, MAX_BYTES, beginning))
        return verdict

    def _finish(self, key: bytes, size: int, task: "asyncio.Task[Verdict]") -> None:
        del self._running[key]
        self._waiting_bytes -= size
        if task.cancelled() or task.exception() is not None:
            return
        self._verdicts[key] = task.result()
        self._cached_bytes += _size(task.result())
        while self._cached_bytes > MAX_CACHED_BYTES:
            _, forgotten = self._verdicts.popitem(last=False)
            self._cached_bytes -= _size(forgotten)


class _Lane:
    """A worker process with the thread that talks to it."""

    def __init__(self, name: str) -> None:
        self.worker = WorkerProcess()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"cantata-grammars-{name}")

    async def tried(self, job: Job) -> Verdict:
        try:
            tried = self._thread.submit(self.worker.tried, job)
        except RuntimeError:  # closed
            raise overloaded() from None
        try:
            return await asyncio.wrap_future(tried)
        except asyncio.CancelledError:
            if tried.cancelled():  # by `close`
                raise overloaded() from None
            raise

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        with contextlib.suppress(OSError):
            self.worker.close()


def _size(verdict: Verdict) -> int:
    return _VERDICT_BYTES + len(verdict.reason) + len(verdict.place)
