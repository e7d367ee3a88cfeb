"""Emulations of the inline assembly in our kernels; importing this module registers them."""

from collections.abc import Sequence

import numpy as np

from kernels.moe.matmul_wgmma import DECODE
from tests.interpreter.interpreter import Array, emulates_asm
from tests.support.ptx import run_ptx


@emulates_asm("mxfp4x8_bf16")
def run_decode(operands: Sequence[Array], pack: int) -> Sequence[Array]:
    """The assembly itself, on numpy arrays."""
    words, scales = operands
    assert pack == 4
    word = np.ascontiguousarray(words).view(np.uint32)
    even, odd = np.moveaxis(np.ascontiguousarray(scales).view(np.uint32).reshape(*word.shape, 2), -1, 0)
    registers = run_ptx(DECODE.value, 4, (word, even, odd))
    return [np.stack(pair, axis=-1).view(np.uint16).reshape(words.shape) for pair in (registers[:2], registers[2:])]
