"""The part of torch.cuda that capturing CUDA graphs needs, without a GPU: streams, graphs,
memory."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from workers.rank.recorded import cuda_graph
from workers.rank.recorded.cuda_graph import CaptureStreams

OTHERS_BYTES = 1 << 30
"""Bytes in torch's ordinary pool."""


@dataclass(frozen=True, slots=True)
class Taken:
    """Bytes that a capture takes of the graphs' pool and of the driver, and another process
    meanwhile."""

    pool: int
    driver: int = 0
    elsewhere: int = 0


class FakeCuda:
    """A GPU that does the work at once.

    Args:
        taken: the bytes taken by each capture, in order.
        num_streams: number of streams that torch has.
    Attributes:
        captured_on: the stream of each capture.
        living: the graphs that are not destroyed.
        current: the stream that work goes to; None: the default one.
    """

    def __init__(self, taken: list[Taken], num_streams: int = 32) -> None:
        self._taken = list(taken)
        self._num_streams = num_streams
        self._num_asked = 0
        self._pool = (0, 7)
        self._in_pool = 0
        self.reserved = OTHERS_BYTES
        self._used = 2 * OTHERS_BYTES
        self.captured_on: list[object] = []
        self.living: weakref.WeakSet[object] = weakref.WeakSet()
        self.current: object = None

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cuda_graph, "_streams", CaptureStreams())
        for name in ("graph", "stream"):
            monkeypatch.setattr(torch.cuda, name, contextmanager(getattr(self, f"_{name}")))
        for name, value in {
            "Stream": self._new_stream,
            "CUDAGraph": self._new_graph,
            "current_stream": lambda device: SimpleNamespace(wait_stream=lambda other: None),
            "synchronize": lambda device: None,
            "mem_get_info": lambda device: (1 << 40, (1 << 40) + self._used),
            "memory_reserved": lambda device: self.reserved,
            "memory_snapshot": self._snapshot,
            "graph_pool_handle": lambda: self._pool,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def _new_stream(self, device: torch.device) -> SimpleNamespace:
        """Return a stream as torch does: one of a fixed number, in turn, and a new object each
        time."""
        self._num_asked += 1
        return SimpleNamespace(
            cuda_stream=(self._num_asked - 1) % self._num_streams, wait_stream=lambda other: None
        )

    def _new_graph(self) -> object:
        graph = FakeGraph()
        self.living.add(graph)
        return graph

    def _graph(
        self, graph: object, *, pool: object, stream: object, capture_error_mode: str
    ) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        assert pool == self._pool
        assert graph in self.living
        self.captured_on.append(stream)
        yield
        taken = self._taken.pop(0)
        self._in_pool += taken.pool
        self.reserved += taken.pool
        self._used += taken.pool + taken.driver + taken.elsewhere

    def _stream(self, stream: object) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def _snapshot(self) -> list[dict[str, object]]:
        segments = [
            ((0, 0), OTHERS_BYTES),
            (self._pool, self._in_pool // 2),
            (self._pool, self._in_pool - self._in_pool // 2),
        ]
        return [{"segment_pool_id": pool, "total_size": num_bytes} for pool, num_bytes in segments]


class FakeGraph:
    """A graph, which a weak reference can watch."""
