"""Dense layers on packed weights: bf16 activations, bf16 or int8 weights in groups of 16 rows, fp32
sums, one rounding to bf16 at the end.

values [N/16, …], N and K padded with zeros to multiples of 16 and 32: bf16 [N/16, K/2, 16, 2],
pairs of neighbouring columns, row by row; int8 [N/16, K/4, 64]: in the 16 bytes of rows 4u to 4u +
3, byte 8h + 2r + j is column 2h + j of row 4u + r; a row's values times its scale, which is the
largest magnitude of the row over 127.
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kernels.cpu import native, structures
from kernels.cpu.memory import zeros

ROWS = 16
_COLUMNS = 32


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A dense weight [N, K] in the order of the CPU kernels.

    Attributes:
        values: bf16 or int8.
        scales: [N] fp32 for int8, None for bf16.
        shape: (N, K), without padding.
    """

    values: Tensor
    scales: Tensor | None
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales, without the padding of odd shapes."""
        return self.shape[0] * self.shape[1] * self.values.itemsize + (
            0 if self.scales is None else self.scales.nbytes
        )


def can_run(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether weights for activations of this dtype are packed here: bf16 on a CPU, with the
    library."""
    return device.type == "cpu" and dtype == torch.bfloat16 and native.shared_library() is not None


def allocate(num_rows: int, width: int, dtype: torch.dtype) -> PackedWeight:
    """Return a packed weight [num_rows, width] of zeros.

    Raises:
        ValueError: dtype is neither torch.bfloat16 nor torch.int8.
    """
    groups, columns = -(-num_rows // ROWS), _padded(width)
    if dtype == torch.bfloat16:
        return PackedWeight(zeros((groups, columns // 2, ROWS, 2), dtype), None, (num_rows, width))
    if dtype == torch.int8:
        return PackedWeight(
            zeros((groups, columns // 4, 64), dtype), torch.zeros(num_rows), (num_rows, width)
        )
    raise ValueError(f"dtype must be torch.bfloat16 or torch.int8, got {dtype}")


def write_rows(packed: PackedWeight, first: int, rows: Tensor) -> None:
    """Set the rows from `first` on, on the caller's thread; other threads may write other rows
    meanwhile.

    Args:
        rows: [n, K] bf16.
    Raises:
        ValueError: names the argument.
    """
    num_rows, width = packed.shape
    if rows.ndim != 2 or rows.shape[1] != width:
        raise ValueError(f"rows must be [n, {width}], got shape {list(rows.shape)}")
    if not 0 <= first <= num_rows - rows.shape[0]:
        raise ValueError(f"first must leave room for {rows.shape[0]} of {num_rows} rows, got {first}")
    if rows.dtype != torch.bfloat16:
        raise ValueError(f"rows must be torch.bfloat16, got {rows.dtype}")
    rows = rows.contiguous()
    arguments = structures.PackDenseArgs(
        weight=native.pointer(rows),
        packed=native.pointer(packed.values),
        scales=native.pointer(packed.scales),
        first_row=first,
        num_rows=rows.shape[0],
        width=width,
        packed_width=_padded(width),
    )
    library = native.shared_library()
    assert library is not None, "called without the library"
    library.cantata_pack_dense(ctypes.byref(arguments))


def pack(weight: Tensor, dtype: torch.dtype = torch.bfloat16) -> PackedWeight:
    """Return a weight [N, K] bf16 in packed form.

    Raises:
        ValueError: names the argument.
    """
    if weight.ndim != 2:
        raise ValueError(f"weight must be [N, K], got shape {list(weight.shape)}")
    packed = allocate(weight.shape[0], weight.shape[1], dtype)
    write_rows(packed, 0, weight)
    return packed


def unpack(packed: PackedWeight) -> Tensor:
    """Return the represented values, [N, K] fp32."""
    num_rows, width = packed.shape
    if packed.scales is None:
        rows = packed.values.transpose(1, 2).flatten(2).flatten(0, 1)
        return rows[:num_rows, :width].float()
    groups = packed.values.shape[0]
    # [group, quad, unit, h, r, j]
    rows = packed.values.view(groups, -1, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(groups * ROWS, -1)
    return rows[:num_rows, :width].float() * packed.scales[:, None]


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """Return `x @ weight.T + bias`. A row's result is the same, bit for bit, whatever the other
    rows and the number of threads.

    Args:
        x: [T, K] bf16.
        bias: [N] bf16.
    Returns:
        [T, N] bf16.
    Raises:
        ValueError: names the argument of a wrong shape or dtype.
    """
    num_outputs, width = weight.shape
    if x.ndim != 2 or x.shape[1] != width:
        raise ValueError(f"x must be [T, {width}], got shape {list(x.shape)}")
    if bias is not None and bias.shape != (num_outputs,):
        raise ValueError(f"bias must be [{num_outputs}], got shape {list(bias.shape)}")
    for name, tensor in (("x", x), ("bias", bias)):
        if tensor is not None and tensor.dtype != torch.bfloat16:
            raise ValueError(f"{name} must be torch.bfloat16, got {tensor.dtype}")
    num_rows = x.shape[0]
    x = (x if width == _padded(width) else functional.pad(x, (0, _padded(width) - width))).contiguous()
    bias = bias if bias is None else bias.contiguous()
    out = torch.empty(num_rows, num_outputs, dtype=torch.bfloat16)
    arguments = structures.DenseArgs(
        x=native.pointer(x),
        weight=native.pointer(weight.values),
        scales=native.pointer(weight.scales),
        bias=native.pointer(bias),
        out=native.pointer(out),
        num_rows=num_rows,
        width=x.shape[1],
        num_outputs=num_outputs,
    )
    native.ready().cantata_dense(ctypes.byref(arguments))
    return out


def _padded(width: int) -> int:
    return -(-width // _COLUMNS) * _COLUMNS
