"""Times on a device: of a copy, of a matrix product, of any work that a CUDA graph can hold.

Of a GPU, none of this has been measured yet.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kernels.cpu import roofline
from kernels.cpu.roofline import Gemm

WARM_UP_S = 0.3
"""Seconds of work after which a GPU's clocks have risen; an idle H100 runs at 345 MHz, a sixth of
its maximum."""
GRAPH_LAUNCHES = 20
"""Minimum number of launches in one graph: it takes the host longer to start a graph than the GPU
to run one small kernel."""
_GEMM_SIZE = 8192
"""Rows and columns of the matrices that a GPU multiplies."""
_WARM_S, _ROUND_S = 0.02, 0.002
"""Minimum seconds of work before timing, and of a timed round; a round is at least one run."""
_ROUNDS, _FEWEST_ROUNDS = 9, 3
_ENOUGH_S = 1.0
"""Seconds of rounds after which the fewest are enough."""

Work = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds that one call took over several rounds: in the best one, which was undisturbed, and
    in the median one. Where these are far apart, many rounds were disturbed."""

    best_s: float
    median_s: float

    @staticmethod
    def of(rounds: Sequence[float]) -> "Timing":
        return Timing(min(rounds), statistics.median(rounds))


def copy_bandwidth(device: torch.device, num_bytes: int) -> float:
    """Return the bytes a second read and written by a copy of `num_bytes`."""
    warm_up(device)
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / timed([lambda: target.copy_(source)], device, graph=False).best_s


def fastest_gemm(device: torch.device) -> Gemm:
    """Measure torch's product of square matrices: on a GPU in bf16, on a CPU in the faster of bf16
    and fp32."""
    if device.type == "cpu":
        return roofline.fastest_gemm()
    warm_up(device)
    left, right = (torch.randn(_GEMM_SIZE, _GEMM_SIZE, device=device).to(torch.bfloat16) for _ in range(2))
    return Gemm(
        "bf16", _GEMM_SIZE, 2 * _GEMM_SIZE**3 / timed([lambda: left @ right], device, graph=False).best_s
    )


def l2_cache_bytes(device: torch.device) -> int:
    """Return the size of a GPU's second-level cache in bytes; 0 for a CPU, whose caches are not
    looked at."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size) if device.type == "cuda" else 0


def warm_up(device: torch.device) -> None:
    """Multiply matrices for WARM_UP_S, so that the GPU's clocks are up; a CPU needs none of it.
    Where the host was busy for long since the last measurement, such as with making a batch, the
    clocks may be down again."""
    if device.type != "cuda":
        return
    square = torch.ones(4096, 4096, dtype=torch.bfloat16, device=device)
    started = time.perf_counter()
    while time.perf_counter() - started < WARM_UP_S:
        for _ in range(8):
            square @ square
        wait(device)


def replayed(work: Work, device: torch.device) -> Work:
    """Return the work as a CUDA graph, or itself on a CPU; it has run once."""
    work()
    if device.type != "cuda":
        return work
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def timed(works: Sequence[Work], device: torch.device, *, graph: bool = True) -> Timing:
    """Return the time of one of these works, which are run one after the other, over and over.

    Work after work on tensors of its own finds in the second-level cache only what the works
    together leave there: where they read more than that cache holds, each one reads from memory.

    Args:
        graph: on a GPU, time a CUDA graph of GRAPH_LAUNCHES of them or more, which leaves out their
            cost on the host.
    """
    in_graph = graph and device.type == "cuda"
    works = [*works] * (-(-GRAPH_LAUNCHES // len(works)) if in_graph else 1)

    def once() -> None:
        for work in works:
            work()

    run = replayed(once, device) if in_graph else once
    replays = max(1, math.ceil(_ROUND_S / max(_warmed(run, device), 1e-6)))
    started, rounds = time.perf_counter(), list[float]()
    while len(rounds) < (_ROUNDS if time.perf_counter() - started < _ENOUGH_S else _FEWEST_ROUNDS):
        rounds.append(_round(run, device, replays) / (replays * len(works)))
    return Timing.of(rounds)


def wait(device: torch.device) -> None:
    """Wait until the device has done the queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _warmed(run: Work, device: torch.device) -> float:
    """Return the seconds of a run, once it has been running for some time."""
    started = time.perf_counter()
    while True:
        took = _round(run, device, 1)
        if time.perf_counter() - started >= (_WARM_S if device.type == "cuda" else 0):
            return took


def _round(run: Work, device: torch.device, calls: int) -> float:
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
