"""`python -m kernels.cpu.trial LIBRARY ISA`: run kernels of an instruction set once, in a process
that may die of it. Needs no torch and takes about 0.1 s. `kernels.cpu.native.runs` starts it.

Dense layers in fp32 and bf16 are enough: their inner loops contain the instructions in which the
sets differ, including products of bf16 and tiles.
"""

import ctypes
import sys

from kernels.cpu import structures

_ALIGNMENT = 64
_WIDTH = _NUM_OUTPUTS = 64
_NUM_ROWS = (1, 33)
"""Numbers of tokens: one, and more than any tile holds."""


def main(file: str, name: str) -> int:
    """Run the kernels and return the exit code: 2 if the library does not support this instruction
    set here."""
    library = ctypes.CDLL(file)
    if not library.cantata_use_isa(name.encode()):
        return 2
    weight, packed = _zeros(4 * _WIDTH * _NUM_OUTPUTS), _zeros(2 * _WIDTH * _NUM_OUTPUTS)
    rows = structures.PackDenseArgs(
        weight=weight,
        packed=packed,
        scales=None,
        first_row=0,
        num_rows=_NUM_OUTPUTS,
        width=_WIDTH,
        packed_width=_WIDTH,
    )
    library.cantata_pack_dense(ctypes.byref(rows))
    for num_rows in _NUM_ROWS:
        x, out = _zeros(4 * num_rows * _WIDTH), _zeros(4 * num_rows * _NUM_OUTPUTS)
        shape = {"num_rows": num_rows, "width": _WIDTH, "num_outputs": _NUM_OUTPUTS}
        library.cantata_linear(
            ctypes.byref(
                structures.LinearArgs(x=x, weight=weight, bias=None, out=out, weight_type=0, **shape)
            )
        )
        library.cantata_dense(
            ctypes.byref(structures.DenseArgs(x=x, weight=packed, scales=None, bias=None, out=out, **shape))
        )
    return 0


_buffers: list[ctypes.Array[ctypes.c_char]] = []
"""Buffers that must stay alive: the library gets only their addresses."""


def _zeros(num_bytes: int) -> int:
    """Return the address of `num_bytes` zero bytes, aligned as tensors are."""
    buffer = ctypes.create_string_buffer(num_bytes + _ALIGNMENT)
    _buffers.append(buffer)
    return -(-ctypes.addressof(buffer) // _ALIGNMENT) * _ALIGNMENT


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
