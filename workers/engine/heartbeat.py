"""Whether an engine hangs, and how it says that it does not.

The heartbeat of an engine is said once each BEAT_S by the event loop of its process, as long as the
step loop, another thread, does not stall. A step may take as long as it does: while the step loop
waits for the executor, the heartbeat goes on beside it. What counts as a hang:

- The process is stopped, or its event loop is stuck: there is no heartbeat.
- The step loop is stuck between two steps (scheduling, publishing): it stalls, and the heartbeat
  stops.
- A step does not end: ranks in processes of their own are watched by their executor
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
"""Between two heartbeats, and what the step loop may take between two steps without missing one."""


class StepLoopWatch:
    """What the step loop does, said by its thread and read by others.

    Args:
        step_limit_s: after which a step stalls; None: never.
        clock: monotonic seconds.
    """

    def __init__(
        self, step_limit_s: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._step_limit_s = step_limit_s
        self._clock = clock
        self._stalls_at_s: float | None = None

    def idle(self) -> None:
        """It waits for requests, or has ended."""
        self._stalls_at_s = None

    def busy(self) -> None:
        """It has something to do, and has just done some of it."""
        self._stalls_at_s = self._clock()

    @contextmanager
    def step(self) -> Iterator[None]:
        """It waits for the executor."""
        self._stalls_at_s = None if self._step_limit_s is None else self._clock() + self._step_limit_s
        yield
        self.busy()

    @property
    def stalled_s(self) -> float:
        """Seconds without a sign of life where one was due; 0: all is well."""
        since_s = self._stalls_at_s
        return 0.0 if since_s is None else max(self._clock() - since_s, 0.0)


async def beat(watch: StepLoopWatch, say: Callable[[], object]) -> None:
    """Call `say` each BEAT_S while the step loop does not stall. Runs until it is cancelled."""
    while True:
        if watch.stalled_s <= BEAT_S:
            say()
        await asyncio.sleep(BEAT_S)


def say_to(descriptor: int, line: bytes) -> Callable[[], object]:
    """A `say` that writes a line to a pipe of ours alone, and drops it where nobody reads: saying
    must not hang, either."""
    os.set_blocking(descriptor, False)

    def say() -> None:
        with contextlib.suppress(OSError):
            os.write(descriptor, line)

    return say
