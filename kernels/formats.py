"""Number formats, and the architectures that support them: plain facts, without torch."""

from typing import Literal

MX_BLOCK = 32
"""Number of values that share a scale, along the contraction axis K."""

MoeActivationDtype = Literal["auto", "mxfp8"]
"""Dtypes of the inputs of MXFP4 experts: `auto` for unconverted, `mxfp8` for rounded to MXFP8."""


def fp8_refusal(target: str) -> str | None:
    """Return why an architecture cannot have an fp8 KV cache, as a sentence; None if it can.

    Args:
        target: as `kernels.backend.architecture` names it; "cpu" runs the reference or Triton's
            interpreter.

    NVIDIA's convert e4m3 from sm_89 on, AMD's from gfx950 on. gfx942 has a different e4m3;
    converting this one in software takes ten times the instructions of the rest of the kernel.
    """
    if (
        target == "cpu"
        or (target.startswith("sm_") and int(target[3:]) >= 89)
        or target in ("gfx950", "gfx1200", "gfx1201")
    ):
        return None
    return (
        f"{target} has no instructions for float8_e4m3fn: an fp8 KV cache needs NVIDIA's sm_89 or "
        f"newer, or AMD's gfx950"
    )
