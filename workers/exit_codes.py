"""How a child process ended, for people."""

import signal

TAKE_ANOTHER_ISA = (
    "set --cpu-isa or CANTATA_CPU_ISA to a smaller instruction set, such as portable, or to "
    "reference for torch's slow kernels"
)
"""What helps where the processor stops at an instruction of the C++ kernels."""


def ending(code: int) -> str:
    """What `returncode` of a process means, with what to do where that is known."""
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:  # a real-time signal
        name = str(-code)
    if -code == signal.SIGILL:
        return f"signal {name}, an instruction that this processor does not have: {TAKE_ANOTHER_ISA}"
    return f"signal {name}"
