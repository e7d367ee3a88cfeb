"""Finding the processes that a test started, however deep: by a variable in their environment,
which children inherit."""

import contextlib
import os
import signal
import time
import uuid
from pathlib import Path

VARIABLE = "CANTATA_TEST_MARK"


def new_mark() -> dict[str, str]:
    """Return a new mark, to be added to the environment of processes."""
    return {VARIABLE: uuid.uuid4().hex}


def marked(mark: dict[str, str]) -> list[str]:
    """Return PID and command line of every live process with the mark."""
    wanted = f"{VARIABLE}={mark[VARIABLE]}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # gone, or another user's
            if entry.name.isdigit() and wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(
                    f"{entry.name} "
                    + (entry / "cmdline").read_bytes().replace(bytes(1), b" ").decode(errors="replace")[:120]
                )
    return found


def none_left(mark: dict[str, str], timeout_s: float) -> list[str]:
    """Wait until no process has the mark; return those that still do after timeout_s."""
    deadline = time.monotonic() + timeout_s
    while left := marked(mark):
        if time.monotonic() > deadline:
            return left
        time.sleep(0.05)
    return []


def kill_marked(mark: dict[str, str]) -> None:
    """Kill every process that has the mark."""
    for line in marked(mark):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(line.split()[0]), signal.SIGKILL)
