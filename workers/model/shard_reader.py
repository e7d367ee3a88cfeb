"""Reads a shard: the reads are planned piece by piece, then carried out in file order by several
threads, with the disk kept busy ahead of them."""

import threading
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from workers.model.mapped_files import Extent, MappedTensors
from workers.model.safetensors_files import StoredTensor

_PIECE_BYTES = 8 << 20
"""Bytes per piece of a dense tensor; about the size of an expert. Small enough to spread over the
threads, large enough that Python's overhead does not matter."""
_AHEAD_BYTES = 64 << 20
"""Bytes read ahead of the threads: keeps a fast disk busy and is a small part of any memory."""
_MAX_THREADS = 16
"""Maximum number of threads; more do not copy faster."""
_TORCH_GRAIN = 32768
"""Number of elements from which torch uses its own threads."""


@dataclass(frozen=True, slots=True)
class _Piece:
    extents: tuple[Extent, ...]
    move: Callable[[], None]

    @property
    def num_bytes(self) -> int:
        return sum(extent.num_bytes for extent in self.extents)


class ShardReader:
    """Plans and carries out the reading of a rank's slices. The caller that plans a piece owns its
    destination memory."""

    def __init__(
        self,
        tensors: Mapping[str, StoredTensor],
        see: Callable[[str, int, Tensor], None] = lambda name, first, rows: None,
    ) -> None:
        """Create a reader.

        Args:
            see: called with the rows that `read` and `copy` read, the tensor's name and the first
                row's number; on any thread.
        """
        self.files = MappedTensors(tensors)
        self._see = see
        self._tensors = tensors
        self._pieces: list[_Piece] = []

    @property
    def extents(self) -> list[Extent]:
        """Extents that will be read, in file order."""
        return sorted(
            (extent for piece in self._pieces for extent in piece.extents),
            key=lambda extent: (extent.tensor.file, extent.start),
        )

    def add(self, extents: Sequence[Extent], move: Callable[[], None]) -> None:
        """Plan a piece: `move` runs on any thread when the extents are in memory, and takes what it
        needs from `files`."""
        self._pieces.append(_Piece(tuple(extents), move))

    def copy(self, to: Tensor, name: str, first: int = 0, *, columns: slice | None = None) -> None:
        """Plan to copy a tensor's rows from `first` on into `to`, as many as it has; `columns` of
        each row."""

        def take(start: int, stored: Tensor) -> None:
            copy_values(to[start : start + len(stored)], stored if columns is None else stored[:, columns])

        self.read(name, first, to.shape[0], take)

    def read(self, name: str, first: int, num_rows: int, take: Callable[[int, Tensor], None]) -> None:
        """Plan to read a tensor's rows from `first` on; `take` gets them piece by piece, with the
        number of rows before each."""
        row_bytes = self.files.extent(name, 0, 1).num_bytes
        step = max(1, _PIECE_BYTES // max(row_bytes, 1))
        for start in range(0, num_rows, step):
            self._add_rows(name, first, start, min(start + step, num_rows), take)

    def _add_rows(
        self, name: str, first: int, start: int, end: int, take: Callable[[int, Tensor], None]
    ) -> None:
        def move() -> None:
            rows = self.files.view(name, first + start, first + end)
            self._see(name, first + start, rows)
            take(start, rows)

        self.add([self.files.extent(name, first + start, first + end)], move)

    def run(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Carry out the planned reads.

        Args:
            progress: called with (pieces done, pieces in all) after each piece, on this thread.
        Raises:
            CheckpointError: the first error; the remaining pieces are not read.
        """
        self._pieces.sort(key=lambda piece: (piece.extents[0].tensor.file, piece.extents[0].start))
        ahead = _ReadAhead(self.files, self._pieces)

        def do(index: int) -> None:
            piece = self._pieces[index]
            ahead.reach(index)
            for extent in piece.extents:
                self.files.fetch(extent)
            piece.move()
            for extent in piece.extents:
                self.files.release(extent)

        pool = ThreadPoolExecutor(
            min(_MAX_THREADS, torch.get_num_threads()), thread_name_prefix="cantata-load"
        )
        try:
            jobs = [pool.submit(do, index) for index in range(len(self._pieces))]
            for done, job in enumerate(jobs, start=1):
                job.result()
                if progress is not None:
                    progress(done, len(jobs))
        finally:
            pool.shutdown(cancel_futures=True)


class _ReadAhead:
    """Requests pieces from the kernel a bounded number of bytes before they are processed."""

    def __init__(self, files: MappedTensors, pieces: Sequence[_Piece]) -> None:
        self._files = files
        self._pieces = pieces
        self._ends = list(accumulate(piece.num_bytes for piece in pieces))
        self._next = 0
        self._lock = threading.Lock()

    def reach(self, index: int) -> None:
        """Record that piece `index` is being processed; request those that follow it."""
        if not self._lock.acquire(blocking=False):
            return  # another thread is requesting
        try:
            last = bisect_left(self._ends, self._ends[index] + _AHEAD_BYTES)
            for piece in self._pieces[max(self._next, index + 1) : last]:
                for extent in piece.extents:
                    self._files.read_ahead(extent)
            self._next = max(self._next, last)
        finally:
            self._lock.release()


def copy_values(to: Tensor, stored: Tensor) -> None:
    """Copy, converting the dtype if it differs, on this thread alone: the caller is one of
    several."""
    if to.device.type != "cpu" or stored.stride(-1) != 1:
        to.copy_(stored)  # a transposed matrix as a whole: torch then copies by tiles, on this thread
    elif to.dtype == stored.dtype and to.stride(-1) == 1:
        np.copyto(to.view(torch.uint8).numpy(), stored.view(torch.uint8).numpy())
    else:
        num_rows = max(1, (_TORCH_GRAIN - 1) // max(1, to[:1].numel()))
        for start in range(0, to.shape[0], num_rows):
            to[start : start + num_rows].copy_(stored[start : start + num_rows])
