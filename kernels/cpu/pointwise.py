"""RMSNorm, alone and with the residual add before it."""

import ctypes

import torch
from torch import Tensor

from kernels.cpu import native
from kernels.pointwise import reference


class _NormArgs(ctypes.Structure):
    """src/ops.h"""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "delta", "weight", "out")),
        ("num_rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("type", ctypes.c_int32),
        ("weight_type", ctypes.c_int32),
    )


def can_run(x: Tensor, weight: Tensor) -> bool:
    """Whether the norms take these: fp32 or bf16 on a CPU."""
    return x.device.type == "cpu" and x.dtype in native.DATA_TYPES and weight.dtype in native.DATA_TYPES and native.library() is not None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `kernels.pointwise.reference.rms_norm`, which see. A row's result is the same whatever the other rows and threads."""
    reference.check_rms_norm(x, weight)
    x = x.contiguous()
    return _run(x, None, weight, eps)


def add_rms_norm(residual: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `kernels.pointwise.reference.add_rms_norm`, which see; `residual` is overwritten if it is contiguous."""
    reference.check_add_rms_norm(residual, delta, weight)
    residual, delta = residual.contiguous(), delta.contiguous()
    return residual, _run(residual, delta, weight, eps)


def _run(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    weight = weight.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    arguments = _NormArgs(
        native.pointer(x),
        native.pointer(delta),
        native.pointer(weight),
        native.pointer(out),
        x.numel() // width if width else 0,
        width,
        eps,
        native.DATA_TYPES[x.dtype],
        native.DATA_TYPES[weight.dtype],
    )
    native.ready().cantata_norm(ctypes.byref(arguments))
    return out
