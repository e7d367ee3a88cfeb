# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Logits as integers in the same order, for Triton kernels: exact searches and reductions whose
results do not depend on the order of execution."""

import triton
import triton.language as tl

LEAST: tl.constexpr = tl.constexpr(-(2**63))
"""Value below every packed candidate."""


@triton.jit
def load_logits(row_ptr, at, vocab_size):
    """Return the fp32 logits at `at`; -inf past the end and for NaN."""
    x = tl.load(row_ptr + at, mask=at < vocab_size, other=float("-inf")).to(tl.float32)
    return tl.where(x == x, x, float("-inf"))


@triton.jit
def key_of(x):
    """Convert fp32 without NaN to uint32 in the same order; 0 and -0 are equal, and no result is
    0."""
    x = tl.where(x == 0, 0.0, x)
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 != 0, ~bits, bits | 0x80000000)


@triton.jit
def value_of(key):
    """Return the fp32 value of a key."""
    return tl.where(key >> 31 != 0, key & 0x7FFFFFFF, ~key).to(tl.float32, bitcast=True)


@triton.jit
def candidates(x, at, vocab_size):
    """Return int64 candidates: larger for a larger logit, and for equal logits larger for the lower
    id; LEAST past the end."""
    key = (key_of(x) ^ 0x80000000).to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(at < vocab_size, (key << 32) | (0x7FFFFFFF - at).to(tl.int64), LEAST)


@triton.jit
def candidate_id(packed):
    """Return the token id of a candidate, int64."""
    return 0x7FFFFFFF - (packed & 0x7FFFFFFF)


@triton.jit
def candidate_value(packed):
    """Return the logit of a candidate."""
    return value_of((packed >> 32).to(tl.int32).to(tl.uint32, bitcast=True) ^ 0x80000000)
