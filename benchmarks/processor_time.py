"""Processor time of other processes while something is measured."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.processes import process_tree

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(slots=True)
class OthersMeter:
    """A meter of the processor time that neither this process nor its descendants use, that of the
    host's other guests included (`steal`).

    What belongs to a descendant that ended before `share` and was waited for counts as ours; an
    orphan's counts as others'.
    """

    _busy_s: float = field(default_factory=lambda: machine_s())
    _total_s: float = field(default_factory=lambda: machine_s(with_idle=True))
    _ours_s: float = field(default_factory=lambda: tree_s(os.getpid()))

    def share(self) -> float:
        """Return other processes' processor time since this object was made, as a share of all
        cores'."""
        total = machine_s(with_idle=True) - self._total_s
        others = (machine_s() - self._busy_s) - (tree_s(os.getpid()) - self._ours_s)
        return max(0.0, others / total) if total > 0 else 0.0


def machine_s(with_idle: bool = False) -> float:
    """Return the processor seconds of all cores since boot: user, nice, system, interrupts and
    steal (proc_stat(5))."""
    fields = [int(ticks) for ticks in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - (0 if with_idle else fields[3] + fields[4])) / TICKS_PER_S


def tree_s(pid: int) -> float:
    """Return the processor seconds of a process and its living descendants, and of those that ended
    and were waited for."""
    return sum(process.cpu_s + process.waited_cpu_s for process in process_tree(pid))
