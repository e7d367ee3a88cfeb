"""How a child process ended: the exit codes of engines, the signals that count as crashes, and a
description for users."""

import signal

from workers.out_of_memory import WHAT_HELPS

TAKE_ANOTHER_ISA = (
    "set --cpu-isa or CANTATA_CPU_ISA to a smaller instruction set, such as portable, or to "
    "reference for torch's slow kernels"
)
"""Advice for a processor that stops at an instruction of the C++ kernels."""
MAX_SAME_CRASHES = 5
"""Consecutive crashes by the same signal, of an engine or one of its ranks, after which it is not
restarted."""
STABLE_AFTER_S = 60.0
"""Lifetime in seconds after which a process counts as well started, and earlier crashes no
more."""
FAILED = 1
"""Exit code of an engine that cannot start or has died. It has written one sentence to stderr."""
_CRASHES = {signal.SIGILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGABRT}
"""Signals that end a faulty program."""
_RANK_CRASHED = 128
"""Offset of the signal's number, as in shells, in the exit code of an engine whose rank crashed."""


def exit_code_of_crashed_rank(number: signal.Signals) -> int:
    """Return the exit code of an engine whose rank ended with a signal that `crash` returned. The
    engine has written one sentence to stderr."""
    return _RANK_CRASHED + number


def crash(code: int) -> signal.Signals | None:
    """Return the signal if an engine or one of its ranks crashed; `code` is the `returncode` of the
    engine or of the rank."""
    return next((number for number in _CRASHES if code in (-number, _RANK_CRASHED + number)), None)


def is_explained(code: int) -> bool:
    """Return whether an engine that ended with this code has written its reason to stderr, in one
    sentence."""
    return code == FAILED or (code > _RANK_CRASHED and crash(code) is not None)


def ending(code: int, *, out_of_memory: bool = False) -> str:
    """Describe a process's `returncode`, with advice where there is any.

    Args:
        out_of_memory: whether the kernel has probably killed it (`workers.out_of_memory`).
    """
    if out_of_memory:
        return f"signal SIGKILL, from the kernel, which was out of memory: {WHAT_HELPS}"
    crashed = crash(code)
    if code >= 0 and crashed is None:
        return f"exit code {code}"
    whose = "signal" if code < 0 else "a rank's signal"
    try:
        name = signal.Signals(crashed or -code).name
    except ValueError:  # a real-time signal
        name = str(-code)
    if crashed == signal.SIGILL:
        return f"{whose} {name}, an instruction that this processor lacks: {TAKE_ANOTHER_ISA}"
    return f"{whose} {name}"
