"""The processes of a session: a child with a session of its own, and all that it started."""

import asyncio
import contextlib
import os
import signal
from pathlib import Path

_POLL_S = 0.05


def live_members(session: int) -> list[int]:
    """PIDs of a session's processes, without those that have ended and wait for their parent to
    notice."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # it has ended meanwhile
            # The command's name, in brackets, may hold anything.
            state, _parent, _group, its_session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state not in "ZX":
                found.append(int(entry.name))
    return found


async def end_session(session: int, timeout_s: float) -> list[int]:
    """Kill what is left of a session whose leader has ended, and wait until nothing is.

    Returns:
        PIDs of those that have not ended within timeout_s: they hang in the kernel, perhaps in a
        driver.
    """
    for pid in live_members(session):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    try:
        async with asyncio.timeout(timeout_s):
            while live_members(session):  # noqa: ASYNC110 - the kernel does not tell who is no parent
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        return live_members(session)
    return []
