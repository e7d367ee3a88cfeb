"""A process that a benchmark starts and all its descendants: their processor time and memory."""

import os
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Process:
    """One of these processes; all values of a process that has ended are zero."""

    pid: int
    command: str

    @property
    def cpu_s(self) -> float:
        """Seconds of processor time of all its threads, in user mode and in the kernel."""
        return self._seconds(11)

    @property
    def waited_cpu_s(self) -> float:
        """Seconds of processor time of its children that ended and for which it waited, and of
        theirs."""
        return self._seconds(13)

    @property
    def private_bytes(self) -> int:
        """Bytes of anonymous and shared pages in memory: all but those of mapped files."""
        return self._sum(Path(f"/proc/{self.pid}/status"), "RssAnon", "RssShmem")

    @property
    def file_bytes(self) -> int:
        """Bytes of pages of mapped files in memory, libraries among them."""
        return self._sum(Path(f"/proc/{self.pid}/status"), "RssFile")

    def _seconds(self, first: int) -> float:
        with suppress(OSError):
            fields = _stat(self.pid)
            return (int(fields[first]) + int(fields[first + 1])) / _TICKS_PER_S
        return 0.0

    def _sum(self, file: Path, *names: str) -> int:
        with suppress(OSError):
            fields = dict(line.split(":", 1) for line in file.read_text().splitlines())
            return sum(int(fields[name].split()[0]) for name in names if name in fields) * 1024
        return 0


def process_tree(root: int) -> list[Process]:
    """Return a process and all its descendants, as they are now."""
    children: dict[int, list[int]] = defaultdict(list)
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):  # gone, or not a process
            children[int(_stat(pid := int(entry.name))[1])].append(pid)
    found, left = [], [root]
    while left:
        pid = left.pop()
        left += children[pid]
        with suppress(OSError):
            command = (
                Path(f"/proc/{pid}/cmdline")
                .read_bytes()
                .replace(b"\0", b" ")
                .decode(errors="replace")
                .strip()
            )
            found.append(Process(pid, command))
    return found


def _stat(pid: int) -> list[str]:
    """Return the fields of a process's status from its state on; its parent comes next."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
