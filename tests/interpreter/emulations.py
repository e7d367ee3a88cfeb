"""Emulations of the inline assembly in our kernels; importing this module registers them."""

from collections.abc import Sequence

from kernels.moe.matmul_wgmma import DECODE
from tests.interpreter.interpreter import Array, emulates_asm
from tests.support.ptx import run_ptx


@emulates_asm("mxfp4x8_bf16")
def run_decode(operands: Sequence[Array], pack: int) -> Sequence[Array]:
    """Run the assembly itself, on numpy arrays."""
    assert pack == 1
    return run_ptx(DECODE.value, 4, operands)
