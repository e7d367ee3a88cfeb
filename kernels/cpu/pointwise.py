"""Embedding, RMSNorm, alone and after a residual add, rotary angles, and conversions between fp32
and bf16."""

import ctypes

import torch
from torch import Tensor

from kernels.cpu import native, structures
from kernels.pointwise import reference


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute `kernels.pointwise.reference.rms_norm`. A row's result is the same whatever the other
    rows and threads."""
    reference.check_rms_norm(x, weight)
    x = x.contiguous()
    return _run(x, None, weight, eps)


def add_rms_norm(residual: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute `kernels.pointwise.reference.add_rms_norm`; `residual` is overwritten if it is
    contiguous."""
    reference.check_add_rms_norm(residual, delta, weight)
    residual, delta = residual.contiguous(), delta.contiguous()
    return residual, _run(residual, delta, weight, eps)


def _run(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    weight = weight.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    arguments = structures.NormArgs(
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


def embed(token_ids: Tensor, weight: Tensor, first_id: int) -> Tensor:
    """Compute `kernels.embedding.reference.embed`; arguments have been checked there."""
    token_ids, weight = token_ids.contiguous(), weight.contiguous()
    num_rows, width = weight.shape
    out = torch.empty(len(token_ids), width, dtype=weight.dtype)
    arguments = structures.EmbedArgs(
        native.pointer(token_ids),
        native.pointer(weight),
        native.pointer(out),
        len(token_ids),
        num_rows,
        width,
        first_id,
        native.DATA_TYPES[weight.dtype],
    )
    native.ready().cantata_embed(ctypes.byref(arguments))
    return out


def cos_sin(positions: Tensor, frequencies: Tensor, concentration: float) -> tuple[Tensor, Tensor]:
    """Compute `kernels.pointwise.reference.cos_sin`."""
    positions, frequencies = positions.long().contiguous(), frequencies.contiguous()
    shape = (len(positions), len(frequencies))
    cos, sin = torch.empty(shape), torch.empty(shape)
    arguments = structures.YarnArgs(
        native.pointer(positions),
        native.pointer(frequencies),
        native.pointer(cos),
        native.pointer(sin),
        *shape,
        concentration,
    )
    native.ready().cantata_yarn(ctypes.byref(arguments))
    return cos, sin


def converted(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `x.to(dtype)` for fp32 and bf16 on a CPU; x itself if it has that dtype."""
    if x.dtype == dtype:
        return x
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=dtype)
    arguments = structures.ConvertArgs(
        native.pointer(x), native.pointer(out), x.numel(), native.DATA_TYPES[dtype]
    )
    native.ready().cantata_convert(ctypes.byref(arguments))
    return out
