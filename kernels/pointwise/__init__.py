"""RMSNorm and rotary position embedding."""

from torch import Tensor

from kernels.backend import runs_triton
from kernels.cpu import pointwise as cpu
from kernels.pointwise import reference
from kernels.pointwise.reference import apply_rope

__all__ = ["add_rms_norm", "apply_rope", "rms_norm", "yarn_cos_sin"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`kernels.pointwise.reference.rms_norm`, which defines it, by the kernel for this device."""
    if runs_triton(x):
        from kernels.pointwise import norm

        reference.check_rms_norm(x, weight)
        return norm.rms_norm(x, weight, eps)
    run = cpu.rms_norm if cpu.can_run(x, weight) else reference.rms_norm
    return run(x, weight, eps)


def add_rms_norm(residual: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`kernels.pointwise.reference.add_rms_norm`, which defines it, by the kernel for this
    device."""
    if runs_triton(residual):
        from kernels.pointwise import norm

        reference.check_add_rms_norm(residual, delta, weight)
        return norm.add_rms_norm(residual, delta, weight, eps)
    run = cpu.add_rms_norm if cpu.can_run(residual, weight) else reference.add_rms_norm
    return run(residual, delta, weight, eps)


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
    """`kernels.pointwise.reference.yarn_cos_sin`, which defines it, by the kernel for this
    device."""
    reference.check_positions(positions, head_dim)
    shape = (head_dim, theta, factor, beta_fast, beta_slow, original_max_position_embeddings, truncate)
    concentration = reference.yarn_concentration(factor)
    if runs_triton(positions):
        from kernels.pointwise import yarn

        return yarn.yarn_cos_sin(positions, yarn.frequencies(positions.device, *shape), concentration)
    if cpu.can_rotate(positions):
        return cpu.yarn_cos_sin(positions, cpu.frequencies(*shape), concentration)
    return reference.yarn_cos_sin(
        positions,
        head_dim,
        theta=theta,
        factor=factor,
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        original_max_position_embeddings=original_max_position_embeddings,
        truncate=truncate,
    )
