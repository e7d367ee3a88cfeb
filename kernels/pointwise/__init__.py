"""RMSNorm and rotary position embedding."""

from torch import Tensor

from kernels.cpu import pointwise as cpu
from kernels.pointwise import reference
from kernels.pointwise.reference import apply_rope, yarn_cos_sin

__all__ = ["add_rms_norm", "apply_rope", "rms_norm", "yarn_cos_sin"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`kernels.pointwise.reference.rms_norm`, which defines it, by the kernel for this device."""
    run = cpu.rms_norm if cpu.can_run(x, weight) else reference.rms_norm
    return run(x, weight, eps)


def add_rms_norm(residual: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`kernels.pointwise.reference.add_rms_norm`, which defines it, by the kernel for this device."""
    run = cpu.add_rms_norm if cpu.can_run(residual, weight) else reference.add_rms_norm
    return run(residual, delta, weight, eps)
