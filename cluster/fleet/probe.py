"""Probes replicas that have sequences from this gateway. A stopped process or a host that is cut
off keeps its connections open for a long time, and neither new nor running sequences should wait
for it."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from workers.errors import CantataError, DeadlineExceeded

PROBE_PERIOD_S = 1.0
"""Seconds from an answer to the next probe."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a replica may be silent.

    Attributes:
        suspect_s: seconds without an answer after which it gets no new sequences while there are
            other replicas.
        lost_s: seconds without an answer after which its sequences continue elsewhere.
    """

    suspect_s: float = 2.0
    lost_s: float = 10.0


class Call(Protocol):
    """A call that is cancelled when its replica is lost."""

    def cancel(self) -> bool:
        """Cancel the call; its reader is notified."""


class ReplicaWatch:
    """Probes one replica while it has calls from here, and while it is silent.

    Args:
        ask: (seconds) → any answer; raises DeadlineExceeded if none came within this time.
        on_silence: called with True when the replica has become suspect, with False when it answers
            again.
    """

    def __init__(
        self,
        ask: Callable[[float], Awaitable[object]],
        on_silence: Callable[[bool], object],
        patience: Patience,
    ) -> None:
        self._ask = ask
        self._on_silence = on_silence
        self._patience = patience
        self._calls: set[Call] = set()
        self._task: asyncio.Task[None] | None = None

    def add(self, call: Call) -> None:
        """Add a call that has begun; `discard` follows when it ends."""
        self._calls.add(call)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())

    def discard(self, call: Call) -> None:
        """Remove a call that has ended."""
        self._calls.discard(call)

    def stop(self) -> None:
        """Stop probing."""
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        # Counted in probes, not by the clock: if this process was stopped, the replica is not to
        # blame.
        num_unanswered, most = 0, max(1, round(self._patience.lost_s / self._patience.suspect_s))
        await asyncio.sleep(PROBE_PERIOD_S)
        while self._calls or num_unanswered:
            try:
                await self._ask(self._patience.suspect_s)
            except DeadlineExceeded:
                num_unanswered += 1
                if num_unanswered == 1:
                    self._on_silence(True)
                if num_unanswered >= most:
                    for call in list(self._calls):
                        call.cancel()
                continue
            except CantataError:
                pass  # The replica is gone; its calls end too.
            if num_unanswered:
                num_unanswered = 0
                self._on_silence(False)
            await asyncio.sleep(PROBE_PERIOD_S)
