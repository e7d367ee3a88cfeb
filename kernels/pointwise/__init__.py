"""RMSNorm and rotary position embedding."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from kernels.cpu import pointwise as cpu
from kernels.cpu.native import DATA_TYPES
from kernels.implementation import Implementation, by_device
from kernels.pointwise import reference
from kernels.pointwise.reference import apply_rope, yarn_concentration

__all__ = [
    "PointwiseOperations",
    "add_rms_norm",
    "apply_rope",
    "rms_norm",
    "select",
    "yarn_concentration",
    "yarn_cos_sin",
    "yarn_frequencies",
]


@dataclass(frozen=True, slots=True)
class PointwiseOperations:
    """An implementation's functions, as `kernels.pointwise.reference` defines them."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    cos_sin: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]


def select(dtype: torch.dtype, device: torch.device) -> Implementation[PointwiseOperations]:
    """Select the implementation for activations and weights of this dtype."""
    return by_device(
        device,
        dtype,
        triton=_on_triton,
        cpp=PointwiseOperations(cpu.rms_norm, cpu.add_rms_norm, cpu.cos_sin),
        reference=PointwiseOperations(reference.rms_norm, reference.add_rms_norm, reference.cos_sin),
    )


def _on_triton() -> PointwiseOperations:
    from kernels.pointwise import norm, yarn

    return PointwiseOperations(norm.rms_norm, norm.add_rms_norm, yarn.cos_sin)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute `kernels.pointwise.reference.rms_norm` with the kernel for this device."""
    return select(_dtype(x, weight), x.device).run.rms_norm(x, weight, eps)


def add_rms_norm(residual: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute `kernels.pointwise.reference.add_rms_norm` with the kernel for this device."""
    operations = select(_dtype(residual, weight), residual.device).run
    return operations.add_rms_norm(residual, delta, weight, eps)


def yarn_cos_sin(
    positions: Tensor,
    head_dim: int,
    *,
    theta: float,
    factor: float,
    beta_fast: float,
    beta_slow: float,
    original_max_position_embeddings: int,
    truncate: bool,
) -> tuple[Tensor, Tensor]:
    """Compute `kernels.pointwise.reference.yarn_cos_sin` with the kernel for this device."""
    reference.check_positions(positions, head_dim)
    shape = (head_dim, theta, factor, beta_fast, beta_slow, original_max_position_embeddings, truncate)
    frequencies = yarn_frequencies(positions.device, *shape)
    return select(torch.float32, positions.device).run.cos_sin(
        positions, frequencies, yarn_concentration(factor)
    )


@cache
def yarn_frequencies(
    device: torch.device,
    head_dim: int,
    theta: float,
    factor: float,
    beta_fast: float,
    beta_slow: float,
    original_max_position_embeddings: int,
    truncate: bool,
) -> Tensor:
    """Return `reference.yarn_frequencies` on a device. They are computed once, on the CPU: no
    launch in a step, and the same bits everywhere."""
    return reference.yarn_frequencies(
        head_dim, theta, factor, beta_fast, beta_slow, original_max_position_embeddings, truncate
    ).to(device)


def _dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype of the first tensor, or of one that the C++ kernels do not take."""
    unknown = (tensor.dtype for tensor in tensors if tensor.dtype not in DATA_TYPES)
    return next(unknown, tensors[0].dtype)
