"""How an executor has its ranks started and ended, wherever they run."""

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from workers.rank.process import RankSpec

OnExit = Callable[[str, signal.Signals | None], None]
"""Callback with how a rank has ended, and the signal if it is known to have crashed."""


@dataclass(frozen=True, slots=True)
class Placement:
    """The place where a rank will run.

    Attributes:
        host: the node's address.
        local_rank: index of its GPU among those it sees; on a CPU its index among the ranks of its
            host.
        num_threads: compute threads on a CPU.
    """

    host: str
    local_rank: int
    ranks_on_host: int
    num_threads: int


class RankLauncher(Protocol):
    """Starts and ends the processes of ranks."""

    @property
    def host(self) -> str:
        """The engine's own address."""

    def place(self, num_ranks: int, device: str, num_threads: int, timeout_s: float) -> Sequence[Placement]:
        """Find room for all ranks.

        Args:
            num_threads: compute threads that the engine's own process may use.
        Raises:
            ConfigError: there is not enough room; names the resources free and needed.
        """

    def launch(self, spec: RankSpec, on_exit: OnExit) -> None:
        """Start a rank; `on_exit` is called once, from any thread, when it has ended."""

    def end(self, grace_s: float) -> None:
        """Wait for the ranks to end by themselves, then kill the rest; idempotent. On return no
        rank is left, and `on_exit` has been called for each."""
