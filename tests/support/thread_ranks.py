"""Ranks as threads of the test: collectives over a barrier, so that sharded models run without
processes."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
TIMEOUT_S = 60.0


class Meeting:
    """The meeting point of a replica's ranks. A rank that fails breaks the barrier, so that the
    others end too."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size, timeout=TIMEOUT_S)
        self._tensors: list[Tensor | None] = [None] * size

    def exchange(self, rank: int, tensor: Tensor) -> list[Tensor]:
        """Return every rank's tensor, by rank."""
        self._tensors[rank] = tensor.clone()
        self._barrier.wait()
        tensors = [entry for entry in self._tensors if entry is not None]
        self._barrier.wait()
        assert len({(entry.shape, entry.dtype) for entry in tensors}) == 1, (
            "the ranks brought tensors of different shapes"
        )
        return tensors

    def abort(self) -> None:
        self._barrier.abort()


class ThreadRank:
    """One rank's Collectives."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self._meeting = meeting
        self.rank = rank
        self.size = meeting.size
        self.num_all_reduces = 0

    def all_reduce(self, tensor: Tensor) -> Tensor:
        self.num_all_reduces += 1
        return tensor.copy_(torch.stack(self._meeting.exchange(self.rank, tensor)).sum(0))

    def gather(self, tensor: Tensor) -> list[Tensor] | None:
        tensors = self._meeting.exchange(self.rank, tensor)
        return tensors if self.rank == 0 else None

    def broadcast(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(self._meeting.exchange(self.rank, tensor)[0])

    def meet(self, place: str, timeout_s: float) -> None:
        self._meeting.exchange(self.rank, torch.zeros(0))


def on_ranks(size: int, work: Callable[[ThreadRank], T]) -> list[T]:
    """Run `work` on every rank at once; return the results, by rank. Raises the error of the first
    rank to fail."""
    meeting = Meeting(size)

    def run(rank: int) -> T:
        try:
            return work(ThreadRank(meeting, rank))
        except BaseException:
            meeting.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
    failures = [error for future in futures if (error := future.exception()) is not None]
    for error in failures:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    if failures:
        raise failures[0]
    return [future.result() for future in futures]
