"""RMSNorm and YaRN rotary embedding in torch, fp32 inside."""

import math

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `x / sqrt(mean(x^2) + eps) * weight` over the last axis, multiplied by the weight in
    fp32, before the cast back.

    Args:
        x: [..., H] float.
        weight: [H] float.
    Returns:
        Shape and dtype of x.
    Raises:
        ValueError: weight is not [H].
    """
    check_rms_norm(x, weight)
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (weight.float() * normed).to(x.dtype)


def add_rms_norm(residual: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add to the residual stream, then compute the RMSNorm of the sum, as rounded to the stream's
    dtype.

    Args:
        residual, delta: [T, H], same dtype.
        weight: [H] float.
    Returns:
        (residual + delta, its `rms_norm`), both [T, H] of that dtype. `residual` may have been
        overwritten.
    Raises:
        ValueError: names the argument of a wrong shape or dtype.
    """
    check_add_rms_norm(residual, delta, weight)
    residual = residual + delta
    return residual, rms_norm(residual, weight, eps)


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
    """Return cosine and sine of YaRN's rotary angles, both multiplied by the attention
    concentration `0.1 ln(factor) + 1`.

    Dimensions that turn more than beta_fast times within the original context keep their frequency,
    for those that turn less than beta_slow times it is divided by `factor`, and a linear ramp lies
    between.

    Args:
        positions: [T] integer.
        truncate: widen the ramp's ends to whole dimensions; gpt-oss does not.
    Returns:
        (cos, sin), each [T, head_dim / 2] fp32.
    Raises:
        ValueError: positions is not a vector of integers, or head_dim is odd.
    Follows: YaRN (arXiv 2309.00071), section 3.2 and appendix A.
    """
    check_positions(positions, head_dim)
    frequency = yarn_frequencies(
        head_dim,
        theta,
        factor,
        beta_fast,
        beta_slow,
        original_max_position_embeddings,
        truncate,
        device=positions.device,
    )
    return cos_sin(positions, frequency, yarn_concentration(factor))


def cos_sin(positions: Tensor, frequencies: Tensor, concentration: float) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of `positions * frequencies`, times the concentration.

    Args:
        positions: [T] integer.
        frequencies: [half] fp32.
    Returns:
        (cos, sin), each [T, half] fp32.
    """
    angles = positions.float()[:, None] * frequencies
    return angles.cos() * concentration, angles.sin() * concentration


def yarn_frequencies(
    head_dim: int,
    theta: float,
    factor: float,
    beta_fast: float,
    beta_slow: float,
    original_max_position_embeddings: int,
    truncate: bool,
    *,
    device: torch.device | None = None,
) -> Tensor:
    """Return the radians per position for each pair of dimensions, [head_dim / 2] fp32."""

    def dimension_turning(times: float) -> float:
        """Return the (fractional) dimension whose angle makes `times` turns over the original
        context."""
        return (
            head_dim
            * math.log(original_max_position_embeddings / (times * 2 * math.pi))
            / (2 * math.log(theta))
        )

    low, high = dimension_turning(beta_fast), dimension_turning(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    pair = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device)
    period = theta ** (pair / head_dim)
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32, device=device) - low) / (high - low)).clamp(
        0, 1
    )
    kept = 1 - ramp
    # As products with reciprocals, in transformers' order: at position 131071 one rounding of a
    # frequency changes an angle by 1e-4.
    return (1 / (factor * period)) * (1 - kept) + (1 / period) * kept


def yarn_concentration(factor: float) -> float:
    """Return the factor of cosine and sine."""
    return 0.1 * math.log(factor) + 1 if factor > 1 else 1.0


def check_positions(positions: Tensor, head_dim: int) -> None:
    """Refuse arguments that `yarn_cos_sin` cannot take.

    Raises:
        ValueError: names the argument.
    """
    if positions.ndim != 1 or positions.dtype.is_floating_point:
        raise ValueError(
            f"positions must be [T] integers, got shape {list(positions.shape)} of {positions.dtype}"
        )
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim must be even and positive, got {head_dim}")


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (first half, second half) of each head by the angle of the token's position.

    Args:
        x: [T, heads, D] float, D even.
        cos, sin: [T, D / 2] fp32.
    Returns:
        Shape and dtype of x; computed in fp32.
    Raises:
        ValueError: names the argument of a wrong shape.
    """
    if x.ndim != 3 or x.shape[-1] % 2:
        raise ValueError(f"x must be [T, heads, D] with D even, got shape {list(x.shape)}")
    expected = (x.shape[0], x.shape[2] // 2)
    for name, table in (("cos", cos), ("sin", sin)):
        if tuple(table.shape) != expected:
            raise ValueError(f"{name} must be {list(expected)}, got shape {list(table.shape)}")
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos.float()[:, None], sin.float()[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def check_rms_norm(x: Tensor, weight: Tensor) -> None:
    """Refuse arguments that `rms_norm` cannot take.

    Raises:
        ValueError: names the argument.
    """
    if x.ndim == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"weight must have the width of x {list(x.shape[-1:])}, got shape {list(weight.shape)}"
        )


def check_add_rms_norm(residual: Tensor, delta: Tensor, weight: Tensor) -> None:
    """Refuse arguments that `add_rms_norm` cannot take.

    Raises:
        ValueError: names the argument.
    """
    if residual.ndim != 2:
        raise ValueError(f"residual must be [T, H], got shape {list(residual.shape)}")
    if delta.shape != residual.shape or delta.dtype != residual.dtype:
        raise ValueError(
            f"delta must be {list(residual.shape)} {residual.dtype} as residual is, got {list(delta.shape)} "
            f"{delta.dtype}"
        )
    check_rms_norm(residual, weight)
