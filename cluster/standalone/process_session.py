"""Processes of a session: a child that leads its own session, and all of its descendants."""

import asyncio
import contextlib
import os
import signal
from pathlib import Path

_POLL_S = 0.05


def live_members(session: int) -> list[int]:
    """Return the PIDs of a session's processes, without zombies."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # the process has ended meanwhile
            # The command's name, in brackets, may contain any character.
            state, _parent, _group, its_session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state not in "ZX":
                found.append(int(entry.name))
    return found


async def end_session(session: int, timeout_s: float) -> list[int]:
    """Kill the rest of a session whose leader has ended, and wait until no process is left.

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
