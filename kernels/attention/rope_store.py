# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Rotary embedding of queries and keys, and the store of keys and values into the paged cache, in
Triton, in one launch.

    (first, second) halves of a head → (first cos - second sin, second cos + first sin)

Everything is read once and written once: with 64 + 2 * 8 heads of 64 in bf16, 10 KiB each way per
token. A program takes BLOCK_H heads of one token, which may be query, key or value heads: so a
token of a decode is spread over several processors.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.fp8 import FP8, FP8_MAX
from kernels.attention.reference import check_rope_and_store
from kernels.backend import architecture, checks_indices
from kernels.formats import fp8_refusal

BLOCK_H = 16
"""Number of heads per program: with half heads of 32 elements in bf16, one load of 16 bytes for
each of 64 threads, and one for the other halves."""

_FP8_MAX = tl.constexpr(FP8_MAX)


@triton.jit
def _to_cache(x, scale, kv_ptr, IS_FP8: tl.constexpr):
    """Return [BLOCK_H, BLOCK_HALF] as the cache holds it; keys are first rounded to the model's
    dtype."""
    if IS_FP8:
        x = tl.clamp(tl.div_rn(x.to(tl.float32), scale), -_FP8_MAX, _FP8_MAX)
    return x.to(kv_ptr.dtype.element_ty)


@triton.jit(do_not_specialize_on_alignment=["slots_ptr", "scales_ptr"])
def _rope_and_store(
    qkv_ptr,  # [T, HEADS + 2 * KV, 2 * HALF]
    cos_ptr,  # [T, HALF] fp32
    sin_ptr,
    slots_ptr,  # [T] int64
    scales_ptr,  # [2, KV] fp32, or None
    q_ptr,  # [T, HEADS, 2 * HALF]
    kv_ptr,  # [2, slots, KV, 2 * HALF]
    qkv_stride,
    v_offset,
    HEADS: tl.constexpr,
    KV: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    IS_FP8: tl.constexpr,
):
    NUM_PARTS: tl.constexpr = (HEADS + 2 * KV + BLOCK_H - 1) // BLOCK_H
    token = (tl.program_id(0) // NUM_PARTS).to(tl.int64)
    head = tl.program_id(0) % NUM_PARTS * BLOCK_H + tl.arange(0, BLOCK_H)
    dim = tl.arange(0, BLOCK_HALF)
    inside = (dim < HALF)[None, :]
    is_query, is_cached, is_value = (
        head < HEADS,
        (head >= HEADS) & (head < HEADS + 2 * KV),
        head >= HEADS + KV,
    )
    at = qkv_ptr + token * qkv_stride + head[:, None] * (2 * HALF) + dim[None, :]
    there = (head < HEADS + 2 * KV)[:, None] & inside
    first = tl.load(at, mask=there, other=0.0)
    second = tl.load(at + HALF, mask=there, other=0.0)
    cos = tl.load(cos_ptr + token * HALF + dim, mask=dim < HALF, other=0.0)[None, :]
    sin = tl.load(sin_ptr + token * HALF + dim, mask=dim < HALF, other=0.0)[None, :]
    wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
    first = tl.where(
        is_value[:, None], first, (wide_first * cos - wide_second * sin).to(first.dtype)
    )  # [BLOCK_H, BLOCK_HALF]
    second = tl.where(is_value[:, None], second, (wide_second * cos + wide_first * sin).to(second.dtype))
    to_query = q_ptr + (token * HEADS + head[:, None]) * (2 * HALF) + dim[None, :]
    tl.store(to_query, first, mask=is_query[:, None] & inside)
    tl.store(to_query + HALF, second, mask=is_query[:, None] & inside)
    kv_head = tl.where(is_value, head - HEADS - KV, head - HEADS)
    scale = 1.0
    if scales_ptr is not None:
        scale = tl.load(scales_ptr + head - HEADS, mask=is_cached, other=1.0)[:, None]
    slot = tl.load(slots_ptr + token)
    to_cache = (
        kv_ptr
        + (slot * KV + kv_head[:, None]) * (2 * HALF)
        + tl.where(is_value, v_offset, 0)[:, None]
        + dim[None, :]
    )
    tl.store(to_cache, _to_cache(first, scale, kv_ptr, IS_FP8), mask=is_cached[:, None] & inside)
    tl.store(to_cache + HALF, _to_cache(second, scale, kv_ptr, IS_FP8), mask=is_cached[:, None] & inside)


def rope_and_store_kv(
    qkv: Tensor,
    num_heads: int,
    cos: Tensor,
    sin: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    *,
    kv_scales: Tensor | None = None,
) -> Tensor:
    """Compute `kernels.attention.reference.rope_and_store_kv` without a wait for the device. Slots
    are checked only if `checks_indices`.

    Raises:
        ValueError: as in the reference; also if qkv is not contiguous in each row, if cos or sin is
            not contiguous fp32, if tensors are on different devices, or for an fp8 cache on a GPU
            without instructions that convert to it.
        IndexError: a slot is outside the cache.
    """
    check_rope_and_store(qkv, num_heads, cos, sin, kv_cache, slot_mapping, kv_scales)
    num_tokens, num_rows, head_dim = qkv.shape
    if qkv.stride()[1:] != (head_dim, 1):
        raise ValueError(f"qkv must be contiguous in each row, got strides {qkv.stride()}")
    for name, tensor in (("cos", cos), ("sin", sin), ("slot_mapping", slot_mapping)):
        if not tensor.is_contiguous() or tensor.device != qkv.device:
            raise ValueError(
                f"{name} must be contiguous and on {qkv.device} as qkv is, got strides {tensor.stride()} on "
                f"{tensor.device}"
            )
    for name, tensor in (("cos", cos), ("sin", sin)):
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name} must be float32, got {tensor.dtype}")
    if kv_cache.device != qkv.device:
        raise ValueError(f"kv_cache must be on {qkv.device} as qkv is, got {kv_cache.device}")
    if kv_cache.dtype == FP8 and (reason := fp8_refusal(architecture(qkv.device))) is not None:
        raise ValueError(f"kv_cache: {reason}")
    num_slots = kv_cache.shape[1] * kv_cache.shape[2]
    if checks_indices() and bool(((slot_mapping < 0) | (slot_mapping >= num_slots)).any()):
        raise IndexError(
            f"slot_mapping must be within the {num_slots} slots of kv_cache, got {slot_mapping.tolist()}"
        )
    q = torch.empty(num_tokens, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    if num_tokens == 0:
        return q
    _rope_and_store[(num_tokens * triton.cdiv(num_rows, BLOCK_H),)](
        qkv,
        cos,
        sin,
        slot_mapping,
        kv_scales,
        q,
        kv_cache,
        qkv.stride(0),
        kv_cache.stride(0),
        HEADS=num_heads,
        KV=kv_cache.shape[3],
        HALF=head_dim // 2,
        BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
        BLOCK_H=BLOCK_H,
        IS_FP8=kv_cache.dtype == FP8,
        num_warps=2,
    )
    return q
