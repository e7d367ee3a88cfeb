"""A profile of an engine's steps, operation by operation, on a CPU."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

from kernels.cpu.profile import Profile, Work, difference
from kernels.cpu.roofline import Roofline, measure
from workers.engine.engine import Engine

OUTSIDE = "outside kernels"


@dataclass(frozen=True, slots=True)
class OperationRow:
    """One operation's share of a step.

    Attributes:
        share: fraction of the step's time.
        num_bytes, num_flops: see `kernels.cpu.profile.Work`.
    """

    name: str
    calls: float
    seconds: float
    share: float
    num_bytes: float
    num_flops: float


@dataclass(frozen=True, slots=True)
class Phase:
    """The measurements between two marks."""

    num_steps: int
    seconds: float
    work: dict[str, Work]

    @property
    def step_s(self) -> float:
        return self.seconds / max(self.num_steps, 1)

    def rows(self) -> tuple[OperationRow, ...]:
        """Return the operations by time, and last the rest of a step: Python, scheduler, small
        tensor operations, the reader of the tokens."""
        steps = max(self.num_steps, 1)
        rows = [
            OperationRow(
                name,
                work.calls / steps,
                work.seconds / steps,
                work.seconds / self.seconds,
                work.num_bytes / steps,
                work.num_flops / steps,
            )
            for name, work in self.work.items()
            if work.calls
        ]
        rows.sort(key=lambda row: -row.seconds)
        rest = self.seconds - sum(work.seconds for work in self.work.values())
        return (*rows, OperationRow(OUTSIDE, 0.0, rest / steps, rest / self.seconds, 0.0, 0.0))


class StepProfile:
    """Measures an engine's operations while it runs. The reader of the tokens sets the marks, so
    the operations of a step in progress at a mark count on whichever side of it they ran.

    Args:
        engine: started, with one rank in this process.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._profile = Profile()
        self._marks: list[tuple[float, int, dict[str, Work]]] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Measure operations until the context ends."""
        with self._profile.recording():
            yield

    def mark(self) -> None:
        """End a phase and begin the next."""
        self._marks.append((time.perf_counter(), self._engine.num_steps, self._profile.snapshot()))

    def phases(self) -> list[Phase]:
        """Return the phases between the marks."""
        return [
            Phase(end_steps - steps, ended - started, difference(after, before))
            for (started, steps, before), (ended, end_steps, after) in pairwise(self._marks)
        ]

    def roofline(self) -> Roofline:
        """Measure what the machine can do now, in about two seconds."""
        return measure()


def profile_table(
    rows: Sequence[OperationRow], read_bytes_per_s: float, gemm_flops_per_s: float, gemm_dtype: str
) -> str:
    """Return a table in Markdown."""
    lines = [
        f"| operation | calls | ms | share | MB | GB/s | of reading | GFLOP/s | of {gemm_dtype} GEMM |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        cells = [
            row.name,
            f"{row.calls:.0f}" if row.calls else "",
            f"{row.seconds * 1e3:.3f}",
            f"{row.share:.1%}",
        ]
        if row.num_bytes and row.seconds:
            rate = row.num_bytes / row.seconds
            cells += [f"{row.num_bytes / 1e6:.2f}", f"{rate / 1e9:.1f}", f"{rate / read_bytes_per_s:.0%}"]
        else:
            cells += ["", "", ""]
        if row.num_flops and row.seconds:
            rate = row.num_flops / row.seconds
            cells += [f"{rate / 1e9:.1f}", f"{rate / gemm_flops_per_s:.0%}"]
        else:
            cells += ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    total = sum(row.seconds for row in rows)
    num_bytes = sum(row.num_bytes for row in rows)
    lines.append(
        f"| a step | | {total * 1e3:.3f} | 100.0% | {num_bytes / 1e6:.2f} | {num_bytes / total / 1e9:.1f} | "
        f"{num_bytes / total / read_bytes_per_s:.0%} | | |"
    )
    return "\n".join(lines)
