"""Dense layers: fp32 activations and sums, bf16 weights widened in registers."""

import ctypes

import torch
from torch import Tensor

from kernels.cpu import native, structures
from kernels.cpu.pointwise import converted


def can_run(x: Tensor) -> bool:
    """Return whether `linear` takes x: fp32 or bf16 on the CPU. A BLAS may be faster for many rows,
    but its results depend on their number."""
    return x.is_cpu and x.dtype in native.DATA_TYPES and native.shared_library() is not None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `kernels.linear.reference.linear`; arguments have been checked there. Rounded to bf16
    once, at the end.

    A row's result is the same, bit for bit, whatever the other rows and the number of threads.
    """
    wide = converted(x, torch.float32).contiguous()
    weight = weight.contiguous()
    bias = bias if bias is None else bias.contiguous()
    out = torch.empty(x.shape[0], weight.shape[0])
    arguments = structures.LinearArgs(
        x=native.pointer(wide),
        weight=native.pointer(weight),
        bias=native.pointer(bias),
        out=native.pointer(out),
        num_rows=x.shape[0],
        width=x.shape[1],
        num_outputs=weight.shape[0],
        weight_type=native.DATA_TYPES[weight.dtype],
    )
    native.ready().cantata_linear(ctypes.byref(arguments))
    return converted(out, x.dtype)
