"""The speed at which this machine reads memory and multiplies matrices, measured with as many
threads as torch uses: the reference for the speed of the kernels."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cpu import memory, native

_READ_BYTES = 1 << 29
"""Bytes of memory that are read: more than the caches of most machines."""
_REPEATS = 7
GEMM_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Data types of torch's product. Which is faster depends on the processor: bf16 several times with
AMX, fp32 up to a hundred times where the processor has no instructions for bf16."""
GEMM_SIZES = (128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
"""Numbers of rows and columns of the matrices. The first product is small enough for any machine;
each has at most 3.4 times the work of the one before, so that its time can be estimated."""
_READ_SECONDS = 1.0
"""Maximum seconds of reading, not counting the first run."""
GEMM_SECONDS = 1.5
"""Seconds for the products of all data types together."""
LONGEST_CALL = 0.25
"""Longest product that is tried, by its estimated time, as a fraction of the remaining time."""
_WARM_UP_RUNS = 2


@dataclass(frozen=True, slots=True)
class Gemm:
    """torch's product of square matrices in its faster data type.

    Attributes:
        dtype: a key of GEMM_DTYPES.
        size: rows and columns of the largest matrices for which there was time.
        flops_per_s: speed of the best run of any size.
    """

    dtype: str
    size: int
    flops_per_s: float


@dataclass(frozen=True, slots=True)
class Roofline:
    """The best of several runs of each measurement.

    Attributes:
        read_bytes_per_s: the library's threads reading memory in order.
    """

    read_bytes_per_s: float
    gemm: Gemm


def measure() -> Roofline:
    """Measure reading and multiplication, in about two seconds. Needs the C++ library."""
    area = memory.zeros((_READ_BYTES,), torch.uint8)
    area.fill_(1)  # pages that were never written to are all the same one
    return Roofline(_READ_BYTES / _best_seconds(lambda: native.read_through(area)), fastest_gemm())


def fastest_gemm(
    product: Callable[[Tensor, Tensor], object] = torch.matmul, clock: Callable[[], float] = time.perf_counter
) -> Gemm:
    """Measure torch's product in each data type within GEMM_SECONDS, and return the fastest.

    On one thread the data types take turns with ever larger matrices, and each stops when its next
    product would take too long. The fastest continues with all threads, then repeats its product in
    the remaining time. They do not start with all threads because threads wait for each other on a
    busy machine, sometimes for hundreds of milliseconds in a product that takes one millisecond
    alone, and the slower data type could win. Each data type runs at least once, however long it
    takes.

    Args:
        product, clock: replaced by tests.
    """
    end = clock() + GEMM_SECONDS
    found = [_Product(dtype, product, clock) for dtype in GEMM_DTYPES]
    with _one_thread():
        climbing = list(found)
        for size in GEMM_SIZES:
            climbing = [each for each in climbing if each.fits(size, end - GEMM_SECONDS / 2)]
            for each in climbing:
                each.run(size, _WARM_UP_RUNS, end)
    best = max(found, key=lambda each: each.flops_per_s)
    for size in GEMM_SIZES[GEMM_SIZES.index(best.size) :]:
        if not best.fits(size, end):
            break
        best.run(size, _WARM_UP_RUNS, end)
    if clock() < end:
        best.run(best.size, _REPEATS, end)
    return Gemm(best.dtype, best.size, best.flops_per_s)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch compute on the caller's thread alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Product:
    """The runs of one data type."""

    def __init__(
        self, dtype: str, product: Callable[[Tensor, Tensor], object], clock: Callable[[], float]
    ) -> None:
        self.dtype = dtype
        self.size = 0
        self.flops_per_s = 0.0
        self._last_s = math.inf
        self._product, self._clock = product, clock

    def fits(self, size: int, end: float) -> bool:
        """Return whether a run with these matrices takes no more than its share of the time until
        `end`, by the best run of the previous size; True before the first run."""
        if self.size == 0:
            return True
        return self._last_s * (size / self.size) ** 3 <= LONGEST_CALL * (end - self._clock())

    def run(self, size: int, times: int, end: float) -> None:
        """Multiply `times` times, fewer if the clock reaches `end`."""
        left, right = (torch.ones(size, size, dtype=GEMM_DTYPES[self.dtype]) for _ in range(2))
        self.size, self._last_s = size, math.inf
        for _ in range(times):
            started = self._clock()
            self._product(left, right)
            ended = self._clock()
            self._last_s = min(self._last_s, ended - started)
            if ended >= end:
                break
        self.flops_per_s = max(self.flops_per_s, 2 * size**3 / self._last_s)


def _best_seconds(operation: Callable[[], object]) -> float:
    operation()
    times: list[float] = []
    while len(times) < _REPEATS and sum(times) < _READ_SECONDS:
        started = time.perf_counter()
        operation()
        times.append(time.perf_counter() - started)
    return min(times)
