"""MXFP4 in torch: a value is e2m1 (1 sign, 2 exponent, 1 mantissa bit), a group of 32 along K
shares the scale 2^(s - 127).

Follows: OCP Microscaling Formats (MX) Specification 1.0, sections 5.3.3, 5.4.1 and 6.3.
"""

from functools import cache

import torch
from torch import Tensor

from kernels.formats import MX_BLOCK
from kernels.mxfp4.layouts import NATURAL, PackedMXFP4, from_natural, to_natural

E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of codes 0 to 7; codes 8 to 15 are their negatives, 8 being -0."""

_LARGEST_EXPONENT = 2
"""Exponent of the largest binade of e2m1, floor(log2(6))."""

_BIAS = 127

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def _pair_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return [256]: both values of each byte, low nibble first, as one integer of twice the width,
    so that a single gather fetches both."""
    codes = torch.arange(256)
    values = torch.tensor([*E2M1_MAGNITUDES, *(-magnitude for magnitude in E2M1_MAGNITUDES)], dtype=dtype)
    pairs = torch.stack((values[codes & 15], values[codes >> 4]), dim=-1)
    return pairs.view(torch.int64 if dtype == torch.float32 else torch.int32)[:, 0].to(device)


@cache
def _scale_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return [256]: 2^(s - 127); the last is NaN."""
    table = torch.tensor([2.0 ** (code - _BIAS) for code in range(255)] + [torch.nan], dtype=torch.float64)
    return table.to(dtype).to(device)


@cache
def _rounding_boundaries(device: torch.device) -> Tensor:
    """Return [7]: a magnitude above the i-th rounds to code i + 1 or more. Midpoints go to the even
    code, so a midpoint below an even code counts as above its boundary, which therefore lies one
    fp32 step lower."""
    boundaries = []
    for code in range(7):
        midpoint = torch.tensor((E2M1_MAGNITUDES[code] + E2M1_MAGNITUDES[code + 1]) / 2, dtype=torch.float32)
        boundaries.append(midpoint if code % 2 == 0 else torch.nextafter(midpoint, torch.zeros(())))
    return torch.stack(boundaries).to(device)


def pack(dense: Tensor, layout: str = NATURAL) -> PackedMXFP4:
    """Quantise: for each group of 32 along K the scale is 2^(floor(log2(max|x|)) - 2); values are
    rounded to nearest even and saturate at 6.

    The result of `unpack` packs to the same values again. A group of zeros gets scale 0.

    Args:
        dense: [E, N, K] fp32, bf16 or fp16, finite.
    Raises:
        ValueError: dense is not [E, N, K], K is not a multiple of 32, a wrong dtype, a value that
            is not finite, or an unknown layout.
    """
    if dense.ndim != 3 or dense.shape[2] % MX_BLOCK:
        raise ValueError(
            f"dense must be [E, N, K] with K a multiple of {MX_BLOCK}, got shape {list(dense.shape)}"
        )
    if dense.dtype not in _DTYPES:
        raise ValueError(f"dense must be float32, bfloat16 or float16, got {dense.dtype}")
    num_experts, num_rows, width = dense.shape
    groups = dense.float().reshape(num_experts, num_rows, width // MX_BLOCK, MX_BLOCK)
    if not bool(groups.isfinite().all()):
        raise ValueError("dense must be finite")
    largest = groups.abs().amax(-1)
    # frexp's mantissa is in [0.5, 1): its exponent is one more than floor(log2).
    exponent = torch.frexp(largest).exponent - 1 - _LARGEST_EXPONENT
    scales = (exponent + _BIAS).clamp(min=0).to(torch.uint8)  # at most 252: fp32 ends at 2^128
    scales[largest == 0] = 0
    # 2^(127 - s) is exact, and so is the product, up to the magnitudes that saturate or round to
    # zero anyway.
    inverse = _scale_table(torch.float32, dense.device)[(2 * _BIAS - scales.int())]
    codes = torch.bucketize((groups * inverse[..., None]).abs(), _rounding_boundaries(dense.device)).to(
        torch.uint8
    )
    codes |= groups.signbit().to(torch.uint8) << 3
    blocks = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return from_natural(blocks, scales, layout)


def unpack(packed: PackedMXFP4, dtype: torch.dtype) -> Tensor:
    """Decode all experts, exactly: code value times scale, rounded once to `dtype` (which changes a
    value only if dtype overflows or underflows).

    Args:
        dtype: float32, bfloat16 or float16.
    Returns:
        [E, N, K] of `dtype`; NaN where a scale is 255.
    Raises:
        ValueError: dtype is another one, or the layout is unknown.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    blocks, scales = to_natural(packed)
    # Every scale and product is exact in bf16 as in fp32, or overflows in both; fp16 holds few of
    # the scales.
    inner = torch.float32 if dtype == torch.float16 else dtype
    values = _pair_table(inner, blocks.device).index_select(0, blocks.reshape(-1).int()).view(inner)
    factors = _scale_table(inner, scales.device).index_select(0, scales.reshape(-1).int())
    values = values.view(-1, MX_BLOCK).mul_(factors[:, None])
    return values.view(packed.shape).to(dtype)


def unpack_experts(packed: PackedMXFP4, expert_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Decode only the experts at `expert_ids` ([n] integer), as `unpack` does.

    Returns:
        [n, N, K] of `dtype`.
    """
    if expert_ids.ndim != 1 or expert_ids.dtype.is_floating_point:
        raise ValueError(
            f"expert_ids must be [n] integers, got shape {list(expert_ids.shape)} of {expert_ids.dtype}"
        )
    return unpack(packed.select(expert_ids), dtype)
