"""How a child process ended: the exit codes of engines, which crashes count, and a text for
people."""

import signal

from workers.out_of_memory import WHAT_HELPS

TAKE_ANOTHER_ISA = (
    "set --cpu-isa or CANTATA_CPU_ISA to a smaller instruction set, such as portable, or to "
    "reference for torch's slow kernels"
)
"""What helps where the processor stops at an instruction of the C++ kernels."""
FAILED = 1
"""Exit code of an engine that cannot start or has died. It has written one sentence to stderr."""
_CRASHES = {signal.SIGILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGABRT}
"""Signals by which a program that is at fault itself ends."""
_RANK_CRASHED = 128
"""Added to the number of the signal, as shells do, in the exit code of an engine of which a rank
has crashed."""


def exit_code_of_crashed_rank(number: signal.Signals) -> int:
    """Return the exit code of an engine of which a rank ended with a signal that `crash` returned.
    It has written one sentence to stderr."""
    return _RANK_CRASHED + number


def crash(code: int) -> signal.Signals | None:
    """Return the signal if an engine, or one of its ranks, crashed; `code` is the `returncode` of
    the engine or of the rank."""
    return next((number for number in _CRASHES if code in (-number, _RANK_CRASHED + number)), None)


def is_explained(code: int) -> bool:
    """Whether an engine that ended with this code has written its reason to stderr, in one
    sentence."""
    return code == FAILED or (code > _RANK_CRASHED and crash(code) is not None)


def ending(code: int, *, out_of_memory: bool = False) -> str:
    """What `returncode` of a process means, with what to do where that is known.

    Args:
        out_of_memory: the kernel has probably killed it (`workers.out_of_memory`).
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
