"""Dense layers with bf16 weights: fp32 activations and sums, weights widened in registers."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from kernels.cpu import native


@cache
def _torch_is_slow() -> bool:
    """torch multiplies bf16 matrices quickly only where oneDNN has instructions for it (AVX-512 and up); elsewhere, on an EPYC of the first
    generation, at 0.2 GFLOP/s instead of 38."""
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def can_run(x: Tensor) -> bool:
    """Whether `linear` takes x, and is the better choice on this processor."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and native.library() is not None and _torch_is_slow()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `kernels.linear.reference.linear`, which see; arguments have been checked there. Rounded to bf16 once, at the end.

    A row's result is the same, bit for bit, whatever the other rows and the number of threads.
    """
    wide = x.float().contiguous()
    weight = weight.contiguous()
    bias = bias if bias is None else bias.contiguous()
    out = torch.empty(x.shape[0], weight.shape[0])
    arguments = native.LinearArgs(
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
    return out.to(x.dtype)
