"""Detection of a hung engine, and the heartbeat that reports that it does not hang.

The event loop of the engine's process emits a heartbeat every BEAT_S, as long as the step loop
(another thread) does not stall. A step may take any time: while the step loop waits for the
executor, heartbeats continue. What counts as a hang:

- The process is stopped, or its event loop is stuck: there is no heartbeat.
- The step loop is stuck between two steps (scheduling, publishing): it stalls, and the heartbeat
  stops.
- A step does not end: ranks in their own processes are watched by their executor
  (parallel.step_timeout_s), which ends the engine. In the engine's own process a step on a GPU
  stalls after that time; one on a CPU never does, since a long prompt may take minutes there.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

BEAT_S = 1.0
"""Seconds between two heartbeats, and the time that the step loop may take between two steps
without missing one."""


class StepLoopWatch:
    """The state of the step loop, set by its thread and read by others.

    Args:
        step_limit_s: seconds after which a step counts as stalled; None for no limit.
        clock: returns monotonic seconds.
    """

    def __init__(
        self, step_limit_s: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._step_limit_s = step_limit_s
        self._clock = clock
        self._stalls_at_s: float | None = None

    def idle(self) -> None:
        """Record that the loop waits for requests or has ended."""
        self._stalls_at_s = None

    def busy(self) -> None:
        """Record that the loop has work and has just made progress."""
        self._stalls_at_s = self._clock()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Record that the loop waits for the executor."""
        self._stalls_at_s = None if self._step_limit_s is None else self._clock() + self._step_limit_s
        yield
        self.busy()

    @property
    def stalled_s(self) -> float:
        """Seconds without a due sign of life; 0 if none is overdue."""
        since_s = self._stalls_at_s
        return 0.0 if since_s is None else max(self._clock() - since_s, 0.0)


async def beat(watch: StepLoopWatch, say: Callable[[], object]) -> None:
    """Call `say` every BEAT_S while the step loop does not stall. Runs until cancelled."""
    while True:
        if watch.stalled_s <= BEAT_S:
            say()
        await asyncio.sleep(BEAT_S)


def say_to(descriptor: int, line: bytes) -> Callable[[], object]:
    """Return a `say` that writes a line to a pipe that only we write to. It drops the line if the
    pipe is full, so that it cannot hang."""
    os.set_blocking(descriptor, False)

    def say() -> None:
        with contextlib.suppress(OSError):
            os.write(descriptor, line)

    return say
