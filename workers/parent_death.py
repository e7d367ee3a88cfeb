"""Processes that end with their parent, however it ends and whatever they are doing: the kernel
kills them."""

import ctypes
import logging
import os
import signal

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> bool:
    """Let the kernel kill this process (SIGKILL) when the thread that started it ends.

    The thread, not the process: start such a child from a thread that lives as long as the child is
    needed.

    Args:
        parent_pid: the process that started this one.
    Returns:
        Whether that process is alive; if not, this process should end by itself.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0) != 0:
        logger.warning(
            "this process will outlive its parent if that is killed: prctl failed with %s",
            os.strerror(ctypes.get_errno()),
        )
    # The parent may have died before the call.
    return os.getppid() == parent_pid
