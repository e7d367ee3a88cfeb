"""Detection of memory exhaustion, and advice about it. Imports nothing large."""

import contextlib
import signal
from pathlib import Path

WHAT_HELPS = (
    "make the KV cache smaller (--kv-cache-memory, engine.cache.memory_bytes; on a GPU "
    "--gpu-memory-utilization), or give this machine or container more memory"
)
"""Advice for error messages."""
_SIGNS = ("can't allocate memory", "can't start new thread")
_VMSTAT = Path("/proc/vmstat")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the error is a failed allocation, by Python, or by torch on a GPU or a CPU, or
    a thread for which there is no memory or no room in the process limit."""
    # torch's allocator for CPUs and Python's threads raise a plain RuntimeError.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS))
    )


class OomKills:
    """The kernel's count of processes that it has killed on this machine for lack of memory.

    The count rises before the killed process ends.
    """

    def __init__(self) -> None:
        self._count = _count()

    def explain(self, code: int) -> bool:
        """Return whether a process with this `returncode` was probably killed for lack of memory:
        it was killed by SIGKILL and the count has risen since this object was created."""
        return code == -signal.SIGKILL and _count() > self._count


def _count() -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in _VMSTAT.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
    return 0
