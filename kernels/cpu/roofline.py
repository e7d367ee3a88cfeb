"""What this machine can do: the speed of reading memory and of multiplying matrices, measured with as many threads as torch uses."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kernels.cpu import memory, native

_READ_BYTES = 1 << 29
"""Well beyond every cache."""
_GEMM_SIZE = 1536
_REPEATS = 7


@dataclass(frozen=True, slots=True)
class Roofline:
    """Best of a few tries each.

    Attributes:
        read_bytes_per_s: the library's threads reading memory in order.
        gemm_flops_per_s: torch's product of square bf16 matrices.
    """

    read_bytes_per_s: float
    gemm_flops_per_s: float


def measure() -> Roofline:
    """Takes about a second. Needs the C++ library."""
    area = memory.zeros((_READ_BYTES,), torch.uint8)
    area.fill_(1)  # pages that were never written to are all the same one
    left, right = (torch.randn(_GEMM_SIZE, _GEMM_SIZE).bfloat16() for _ in range(2))
    return Roofline(_READ_BYTES / _best_seconds(lambda: native.read_through(area)), 2 * _GEMM_SIZE**3 / _best_seconds(lambda: left @ right))


def _best_seconds(operation: Callable[[], object]) -> float:
    operation()
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        operation()
        times.append(time.perf_counter() - started)
    return min(times)
