"""Times on a device: of a copy, of a matrix product, of any work that a CUDA graph can hold."""

import math
import time
from collections.abc import Callable

import torch

from kernels.cpu import roofline
from kernels.cpu.roofline import Gemm

_GEMM_SIZE = 8192
"""Rows and columns of the matrices that a GPU multiplies."""
ROUNDS = 5
"""Of which the best counts: what disturbs a measurement makes it longer."""


def copy_bandwidth(device: torch.device, num_bytes: int) -> float:
    """Bytes a second read and written by a copy of `num_bytes`."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / seconds(lambda: target.copy_(source), device, graph=False)


def fastest_gemm(device: torch.device) -> Gemm:
    """Measure torch's product of square matrices: on a GPU in bf16, on a CPU in the faster of bf16 and fp32."""
    if device.type == "cpu":
        return roofline.fastest_gemm()
    left, right = (torch.randn(_GEMM_SIZE, _GEMM_SIZE, device=device).to(torch.bfloat16) for _ in range(2))
    return Gemm("bf16", _GEMM_SIZE, 2 * _GEMM_SIZE**3 / seconds(lambda: left @ right, device, graph=False))


def replayed(work: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The work as a CUDA graph, or itself on a CPU; it has run once."""
    work()
    if device.type != "cuda":
        return work
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def seconds(work: Callable[[], object], device: torch.device, *, calls: int = 10, graph: bool = True) -> float:
    """Of one call, of so many in a row.

    Args:
        graph: on a GPU, replay the work as a CUDA graph, which leaves out what it costs the host.
    """
    run = replayed(work, device) if graph else work
    run()
    return min(_round(run, device, calls) for _ in range(ROUNDS)) / calls


def wait(device: torch.device) -> None:
    """Until the device has done what is queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _round(run: Callable[[], object], device: torch.device, calls: int) -> float:
    wait(device)
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(calls):
            run()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    elapsed_s = start.elapsed_time(end) / 1e3
    return elapsed_s if elapsed_s > 0 else math.inf
