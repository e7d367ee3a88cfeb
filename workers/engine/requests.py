"""Requests between the submitting threads and the engine's thread: inbox, live set, deadlines.

Any thread may submit, abort and wait; the engine's thread takes the inbox and releases what has
ended. One lock guards both sides, and is notified on every change that a thread may wait for.
"""

import heapq
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from workers.constraint.compiler import PreparedConstraint
from workers.engine.stream import Notifier, OutputStream
from workers.errors import EngineDead, Overloaded
from workers.request import EngineRequest

_SPARE_DEADLINES = 64
"""Number of ended requests' deadlines that may stay in the heap before it is rebuilt."""


@dataclass(slots=True)
class LiveRequest:
    """A request that has not ended. `waits` is true until its first step."""

    request: EngineRequest
    stream: OutputStream
    submitted_s: float
    deadline_s: float | None
    prepared: PreparedConstraint | None = None
    waits: bool = True


@dataclass(frozen=True, slots=True)
class Abort:
    """A request to end a sequence."""

    seq_id: int
    reason: str


class Deadlines:
    """The deadlines of requests, soonest first. Belongs to the engine's thread."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int]] = []

    def add(self, deadline_s: float, seq_id: int) -> None:
        """Add the deadline of a sequence, in monotonic seconds."""
        heapq.heappush(self._heap, (deadline_s, seq_id))

    def expired(self, now: float) -> list[int]:
        """Return the sequences whose deadline has passed, each once; some of them may have
        ended."""
        seq_ids = []
        while self._heap and self._heap[0][0] <= now:
            seq_ids.append(heapq.heappop(self._heap)[1])
        return seq_ids

    def prune(self, num_live: int, is_live: Callable[[int], bool]) -> None:
        """Drop the deadlines of ended sequences once they are the majority."""
        if len(self._heap) > 2 * num_live + _SPARE_DEADLINES:
            self._heap = [entry for entry in self._heap if is_live(entry[1])]
            heapq.heapify(self._heap)


class RequestBook:
    """All requests of an engine, from submission to their end.

    Args:
        max_waiting: maximum number of requests waiting for their first step.
    Attributes:
        num_running: number of sequences that the scheduler runs, as of the last `let_go`.
    """

    def __init__(self, max_waiting: int) -> None:
        self.num_running = 0
        self._max_waiting = max_waiting
        self._changed = threading.Condition()
        self._inbox: deque[LiveRequest] = deque()
        self._aborts: deque[Abort] = deque()
        self._live: dict[int, LiveRequest] = {}
        self._next_seq_id = 0
        self._refusal: str | None = "the engine has not started"
        self._stopping = False
        self._failure: str | None = None

    @property
    def refusal(self) -> str | None:
        """Reason for refusing all requests; None while they are accepted."""
        return self._refusal

    @property
    def num_live(self) -> int:
        """Number of requests that have not ended."""
        return len(self._live)

    @property
    def num_waiting(self) -> int:
        """Number of requests that the scheduler does not run."""
        return max(len(self._live) - self.num_running, 0)

    def open(self) -> None:
        """Accept requests from now on."""
        self._refusal = None

    def close(self, sentence: str, *, instead: bool = False) -> None:
        """Refuse requests from now on.

        Args:
            instead: whether this reason replaces an earlier one.
        """
        with self._changed:
            if instead or self._refusal is None:
                self._refusal = sentence

    def submit(
        self, request: EngineRequest, notifier: Notifier, prepared: PreparedConstraint | None = None
    ) -> OutputStream:
        """Put a request into the inbox.

        Args:
            prepared: its constraint, ready to run.
        Raises:
            Overloaded: the maximum number of requests is waiting.
            EngineDead: requests are refused.
        """
        now = time.monotonic()
        with self._changed:
            if self._refusal is not None:
                raise EngineDead(self._refusal)
            if len(self._live) - self.num_running >= self._max_waiting:
                raise Overloaded(
                    f"{self._max_waiting} requests are waiting (engine.scheduler.max_waiting_requests); "
                    f"retry after 1 s"
                )
            stream = OutputStream(request.request_id, self._next_seq_id, notifier)
            self._next_seq_id += 1
            deadline_s = None if request.deadline_s is None else now + request.deadline_s
            live = LiveRequest(request, stream, now, deadline_s, prepared)
            self._live[stream.seq_id] = live
            self._inbox.append(live)
            self._changed.notify_all()
        return stream

    def abort(self, seq_id: int, reason: str) -> None:
        """Request the end of a sequence; do nothing if it has ended."""
        with self._changed:
            if seq_id in self._live:
                self._aborts.append(Abort(seq_id, reason))
                self._changed.notify_all()

    def abort_all(self, reason: str) -> int:
        """Request the end of all live sequences; return their number."""
        with self._changed:
            self._aborts.extend(Abort(seq_id, reason) for seq_id in self._live)
            self._changed.notify_all()
            return len(self._live)

    def wait_until_none(self, timeout_s: float) -> None:
        """Block until no request is live, or until the timeout."""
        with self._changed:
            self._changed.wait_for(lambda: not self._live, timeout=timeout_s)

    def end_wait(self, failure: str | None = None) -> None:
        """End `wait_for_work` for good.

        Args:
            failure: the executor's failure, as a sentence; None if the engine is to stop.
        """
        with self._changed:
            if failure is None:
                self._stopping = True
            else:
                self._failure = failure
            self._changed.notify_all()

    def wait_for_work(self, has_work: Callable[[], bool]) -> bool:
        """Block until there is work for the engine's thread; return False if it is to stop.

        Args:
            has_work: returns whether there is work besides the inbox; called under the lock.
        Raises:
            EngineDead: the executor has failed.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopping or self._failure or self._inbox or self._aborts or has_work()
            )
            if self._failure is not None and not self._stopping:
                raise EngineDead(self._failure)
            return not self._stopping

    def take(self) -> tuple[list[LiveRequest], list[Abort]]:
        """Empty the inbox; return the submitted requests, and then the aborts."""
        with self._changed:
            submitted, aborts = list(self._inbox), list(self._aborts)
            self._inbox.clear()
            self._aborts.clear()
        return submitted, aborts

    def get(self, seq_id: int) -> LiveRequest | None:
        """Return the request of a sequence; None if it has ended."""
        return self._live.get(seq_id)

    def let_go(self, streams: Iterable[OutputStream], num_running: int) -> None:
        """Forget those of these streams that have ended, and record the number of running
        sequences."""
        with self._changed:
            for stream in streams:
                if stream.ended:
                    self._live.pop(stream.seq_id, None)
            self.num_running = num_running
            self._changed.notify_all()

    def take_all(self) -> list[OutputStream]:
        """Forget all requests; return the streams of those that were live."""
        with self._changed:
            left = [live.stream for live in self._live.values()]
            self._live.clear()
            self._inbox.clear()
            self.num_running = 0
            self._changed.notify_all()
        return left
