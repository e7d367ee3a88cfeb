"""Where the time of an engine's steps goes, operation by operation, on a CPU."""

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
    """One operation's part of a step.

    Attributes:
        share: of the step's time.
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
    """What happened between two marks."""

    num_steps: int
    seconds: float
    work: dict[str, Work]

    @property
    def step_s(self) -> float:
        return self.seconds / max(self.num_steps, 1)

    def rows(self) -> tuple[OperationRow, ...]:
        """Operations by time, and last the rest of a step: Python, scheduler, small tensor
        operations, the reader of the tokens."""
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
    """Times an engine's operations while it runs. The marks are set by whoever reads the engine's
    tokens, so a step that is under way at a mark counts on both sides of it with what it has done
    on each.

    Args:
        engine: started, with one rank in this process.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._profile = Profile()
        self._marks: list[tuple[float, int, dict[str, Work]]] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Time operations until the context ends."""
        with self._profile.recording():
            yield

    def mark(self) -> None:
        """A phase ends here, and the next begins."""
        self._marks.append((time.perf_counter(), self._engine.num_steps, self._profile.snapshot()))

    def phases(self) -> list[Phase]:
        """What lies between the marks."""
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
