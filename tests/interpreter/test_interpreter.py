"""The repaired interpreter against torch; and each repair is still needed, so that none outlives
the bug."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from tests.interpreter.guards import GUARD_BYTES, GuardedAllocations, guarded
from tests.interpreter.interpreter import (
    emulates_asm,
    recorded_launches,
    round_to_bf16,
    unrepaired,
    widen_bf16,
)

N = 256


@triton.jit
def binary_kernel(x_ptr, y_ptr, out_ptr, OP: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    if OP == "add":
        result = x + y
    elif OP == "sub":
        result = x - y
    elif OP == "mul":
        result = x * y
    elif OP == "div":
        result = x / y
    elif OP == "max":
        result = tl.maximum(x, y)
    elif OP == "clamp":
        result = tl.clamp(x, y * 0 - 1, y * 0 + 1)
    elif OP == "neg":
        result = -x
    elif OP == "fma":
        result = tl.fma(x, y, x)
    elif OP == "less":
        result = tl.where(x < y, x, y)
    else:
        result = tl.where(x == y, x, x * 0)
    tl.store(out_ptr + at, result)


@triton.jit
def cast_kernel(x_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, tl.load(x_ptr + at).to(out_ptr.dtype.element_ty))


@triton.jit
def dot_kernel(x_ptr, y_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    x, y = tl.load(x_ptr + m * K + k[None, :]), tl.load(y_ptr + k[:, None] * N + n)
    tl.store(out_ptr + m * N + n, tl.dot(x, y))


@triton.jit
def dot_scaled_kernel(x_ptr, w_ptr, s_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n = tl.arange(0, M)[:, None], tl.arange(0, N)
    x = tl.load(x_ptr + m * K + tl.arange(0, K)[None, :])
    w = tl.load(w_ptr + n[None, :] * (K // 2) + tl.arange(0, K // 2)[:, None])
    s = tl.load(s_ptr + n[:, None] * (K // 32) + tl.arange(0, K // 32)[None, :])
    tl.store(out_ptr + m * N + n[None, :], tl.dot_scaled(x, None, "bf16", w, s, "e2m1"))


@triton.jit
def asm_kernel(x_ptr, low_ptr, high_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    low, high = tl.inline_asm_elementwise(
        "// test: nibbles\n and.b32 $0, $2, 15; shr.u32 $1, $2, 4;",
        "=r,=r,r",
        [tl.load(x_ptr + at)],
        dtype=(tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )
    tl.store(low_ptr + at, low)
    tl.store(high_ptr + at, high)


@emulates_asm("test: nibbles")
def nibbles(operands: list[np.ndarray], pack: int) -> list[np.ndarray]:
    assert pack == 1
    return [operands[0] & 15, operands[0] >> 4]


@triton.jit
def loop_kernel(length_ptr, out_ptr):
    for at in range(tl.load(length_ptr)):
        tl.store(out_ptr + at, at)


@triton.jit
def overrunning_kernel(x_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, tl.load(x_ptr + at))


@triton.jit
def scalar_mask_kernel(x_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    first = tl.load(x_ptr)
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=(at < N) & (first > 0), other=7))


BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "max": torch.maximum,
    "clamp": lambda x, y: x.clamp(-1, 1),
    "neg": lambda x, y: -x,
    "fma": lambda x, y: (x.double() * y.double() + x.double()).to(torch.bfloat16),
    "less": lambda x, y: torch.where(x < y, x, y),
    "equal": lambda x, y: torch.where(x == y, x, 0),
}


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def binary(op: str) -> tuple[Tensor, Tensor]:
    """Return (the kernel's result, torch's)."""
    x, y = random(N), random(N, seed=1)
    y[::3] = x[::3]
    out = torch.empty(N, dtype=torch.bfloat16)
    binary_kernel[(1,)](x, y, out, OP=op, N=N)
    return out, BINARY[op](x, y)


def casted(x: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(len(x), dtype=dtype)
    cast_kernel[(1,)](x, out, N=len(x))
    return out


def dot(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (the kernel's result, torch's), fp32"""
    x, y = random(16, 64, dtype=dtype), random(64, 32, dtype=dtype, seed=1)
    out = torch.empty(16, 32)
    dot_kernel[(1,)](x, y, out, M=16, N=32, K=64)
    return out, x.float() @ y.float()


def dot_scaled(magnitude: float) -> tuple[Tensor, Tensor]:
    """Return (the kernel's result, torch's), fp32; all weights are 1."""
    x = random(16, 64) * magnitude
    weights, scales = (
        torch.full((32, 32), 0x22, dtype=torch.uint8),
        torch.full((32, 2), 127, dtype=torch.uint8),
    )
    out = torch.empty(16, 32)
    dot_scaled_kernel[(1,)](x, weights, scales, out, M=16, N=32, K=64)
    return out, x.float().sum(1, keepdim=True).expand(16, 32)


HALVES = torch.arange(-(2**10), 2**10).float() * 2**-8 + 1  # ties of bf16 and of fp8 among them


@pytest.mark.parametrize("op", BINARY)
def test_arithmetic_on_bf16(op: str) -> None:
    torch.testing.assert_close(*binary(op), atol=0, rtol=0)


def test_casts_round_to_nearest_even() -> None:
    for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        for values in (HALVES, HALVES * 2**-7, random(2048, dtype=torch.float32)):
            limited = values.clamp(-448, 448)
            torch.testing.assert_close(
                casted(limited, dtype).float(), limited.to(dtype).float(), atol=0, rtol=0
            )
            wide = limited.to(dtype)
            torch.testing.assert_close(casted(wide, torch.float32), wide.float(), atol=0, rtol=0)
            torch.testing.assert_close(casted(wide, torch.bfloat16), wide.to(torch.bfloat16), atol=0, rtol=0)
    for dtype in (torch.float16, torch.int32):
        bf16 = random(N) * 100
        torch.testing.assert_close(casted(bf16, dtype), bf16.to(dtype), atol=0, rtol=0)
        torch.testing.assert_close(
            casted(bf16.to(dtype), torch.bfloat16), bf16.to(dtype).to(torch.bfloat16), atol=0, rtol=0
        )


def test_casts_of_what_is_not_finite() -> None:
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.4e38])
    torch.testing.assert_close(casted(odd, torch.bfloat16), odd.to(torch.bfloat16), equal_nan=True)
    # The instructions saturate, torch gives NaN.
    saturated = torch.tensor([448.0, -448.0, torch.nan, 448.0])
    torch.testing.assert_close(casted(odd, torch.float8_e4m3fn).float(), saturated, equal_nan=True)


def test_float64_is_rounded_to_bf16_once() -> None:
    tie = 1 + 2**-8
    just_above, just_below = tie + 2**-40, tie - 2**-40
    assert widen_bf16(round_to_bf16(np.array([tie, just_above, just_below, -just_above]))).tolist() == [
        1,
        1 + 2**-7,
        1,
        -1 - 2**-7,
    ]


def test_dots() -> None:
    """Sums of 64 products in fp32, in another order: 1e-5."""
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2):
        torch.testing.assert_close(*dot(dtype), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("magnitude", [1.0, 1e-8, 1e8])
def test_scaled_dots_have_the_range_of_bf16(magnitude: float) -> None:
    out, expected = dot_scaled(magnitude)
    torch.testing.assert_close(out / magnitude, expected / magnitude, atol=1e-5, rtol=1e-5)


def test_a_loop_may_be_as_long_as_memory_says() -> None:
    out = torch.full((5,), 9)
    loop_kernel[(1,)](torch.tensor([3]), out)
    assert out.tolist() == [0, 1, 2, 9, 9]


def test_inline_assembly_runs_its_emulation() -> None:
    x = torch.arange(256, dtype=torch.int32)
    low, high = torch.empty_like(x), torch.empty_like(x)
    asm_kernel[(1,)](x, low, high, N=256)
    assert torch.equal(low, x & 15)
    assert torch.equal(high, x >> 4)


def test_a_comparison_of_scalars_masks_a_block() -> None:
    for first, expected in ((1, [1, 5, 5, 5]), (0, [7, 7, 7, 7])):
        out = torch.empty(4, dtype=torch.int64)
        scalar_mask_kernel[(1,)](torch.tensor([first, 5, 5, 5]), out, N=4)
        assert out.tolist() == expected


def test_launches_are_recorded() -> None:
    with recorded_launches() as names:
        casted(HALVES, torch.bfloat16)
        dot(torch.bfloat16)
    casted(HALVES, torch.bfloat16)
    assert names == ["cast_kernel", "dot_kernel"]


def test_the_guards_see_reads_and_writes_past_the_end() -> None:
    x, y = guarded(torch.ones(12)), torch.zeros(32)
    overrunning_kernel[(1,)](x, y, N=16)
    assert torch.equal(y[:12], torch.ones(12))
    assert bool(y[12:16].isnan().all())
    with (
        pytest.raises(AssertionError, match="past the end of an allocation of 48 bytes"),
        GuardedAllocations(),
    ):
        overrunning_kernel[(1,)](torch.zeros(16), torch.empty(12), N=16)
    assert GUARD_BYTES >= 16
    with GuardedAllocations():
        assert bool(torch.empty(7).isnan().all())
        assert bool(torch.empty_like(torch.zeros(3, 4, dtype=torch.bfloat16).T).isnan().all())


@pytest.mark.skipif(not hasattr(InterpreterBuilder, "create_dot_scaled"), reason="a Triton before 3.9")
class TestWithoutTheRepairs:
    """Tests of faults in Triton's interpreter. A failure here means that Triton has mended one:
    drop the repair, once no older Triton is supported."""

    @pytest.mark.parametrize("op", ["add", "mul", "less", "neg"])
    def test_arithmetic_is_wrong(self, op: str) -> None:
        with unrepaired():
            out, expected = binary(op)
        assert not torch.allclose(out, expected, equal_nan=True)

    def test_casts_are_wrong(self) -> None:
        with unrepaired():
            to_bf16, to_fp8 = casted(HALVES, torch.bfloat16), casted(HALVES, torch.float8_e4m3fn)
        assert not torch.equal(to_bf16, HALVES.to(torch.bfloat16))
        assert not torch.equal(to_fp8.float(), HALVES.to(torch.float8_e4m3fn).float())

    def test_dots_are_wrong(self) -> None:
        with unrepaired():
            out, expected = dot(torch.bfloat16)
            large, expected_large = dot_scaled(1e8)
        assert not torch.allclose(out, expected, atol=1, rtol=1)
        assert not torch.allclose(large, expected_large, rtol=0.1)

    def test_comparisons_of_scalars_are_no_masks(self) -> None:
        x = torch.ones(4, dtype=torch.int64)
        with unrepaired(), pytest.raises(Exception, match="mask has unsupported dtype"):
            scalar_mask_kernel[(1,)](x, x.clone(), N=4)

    def test_inline_assembly_is_missing(self) -> None:
        x = torch.arange(256, dtype=torch.int32)
        with unrepaired(), pytest.raises(Exception, match="inline_asm not supported"):
            asm_kernel[(1,)](x, x.clone(), x.clone(), N=256)
