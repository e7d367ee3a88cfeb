"""Runs straight-line PTX on numpy arrays, so that inline assembly can be tested as it is
written."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def run_ptx(text: str, num_outputs: int, inputs: Sequence[Array]) -> list[Array]:
    """Execute the body of an inline assembly block.

    Args:
        text: statements ended by semicolons, in braces; operands $0 to $(num_outputs - 1) are
            written, those after them read.
        inputs: uint32, of one shape.
    Returns:
        The outputs, uint32.
    """
    body = re.sub(r"//.*", "", text).strip().strip("{}")
    registers = {f"${num_outputs + index}": value.astype(np.uint32) for index, value in enumerate(inputs)}
    for statement in filter(None, (part.strip() for part in body.split(";"))):
        if statement.startswith(".reg"):
            continue
        name, operands = statement.split(None, 1)
        target, *sources = (operand.strip() for operand in operands.split(","))
        values = [
            registers[source] if source in registers else np.uint32(int(source, 0)) for source in sources
        ]
        registers[target] = _INSTRUCTIONS[name](*values).astype(np.uint32)
    return [registers[f"${index}"] for index in range(num_outputs)]


def _halves(word: Array) -> Array:
    """Convert uint32 to [..., 2] float32: the two bf16 in it, low first."""
    bits = np.stack((word << np.uint32(16), word & np.uint32(0xFFFF0000)), axis=-1)
    return bits.view(np.float32)


def _pair(values: Array) -> Array:
    """Convert [..., 2] float32 to uint32: both as bf16, rounded to nearest even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return rounded[..., 0] | (rounded[..., 1] << np.uint32(16))


_INSTRUCTIONS: dict[str, Callable[..., Array]] = {
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "shl.b32": lambda a, b: a << b,
    "shr.b32": lambda a, b: a >> b,
    "shf.l.wrap.b32": lambda low, high, distance: (high << distance) | (low >> (np.uint32(32) - distance)),
    "mul.bf16x2": lambda a, b: _pair(_halves(a) * _halves(b)),
}
