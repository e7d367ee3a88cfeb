"""The C++ kernels at their worst input: tensors that begin in the middle of a vector or are not
contiguous, which are computed like others; shapes that do not fit; instruction sets that are not
there."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kernels.linear
import kernels.moe
from kernels import attention, pointwise
from kernels.cpu import dense, native
from kernels.moe import ExpertWeights
from kernels.mxfp4 import ROWS16, pack
from tests.support.attention_cases import SCALE, attention_case

pytestmark = pytest.mark.skipif(native.shared_library() is None, reason="the C++ library was not built")


def misaligned(tensor: Tensor) -> Tensor:
    """Return a copy one element after a boundary of 64 bytes; NaN or the largest number around
    it."""
    memory = torch.full(
        (tensor.numel() + 64,), torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    ).to(tensor.dtype)
    begin = -memory.data_ptr() % 64 // tensor.itemsize + 1
    moved = memory[begin : begin + tensor.numel()].view(tensor.shape)
    moved.copy_(tensor)
    assert moved.data_ptr() % 64 == tensor.itemsize
    return moved


def strided(tensor: Tensor) -> Tensor:
    """Return a copy with other values between its rows."""
    wide = torch.stack((tensor, torch.full_like(tensor, 3)), dim=1)
    assert not wide[:, 0].is_contiguous()
    return wide[:, 0]


WAYS = pytest.mark.parametrize("way", [misaligned, strided])
Way = Callable[[Tensor], Tensor]


@WAYS
@pytest.mark.parametrize("num_tokens", [2, 19])
def test_layers(isa: str, way: Way, num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (
        torch.randn(*shape, generator=generator) for shape in ((num_tokens, 72), (37, 72), (37,))
    )
    out = kernels.linear.linear(x, weight, bias)
    assert torch.equal(kernels.linear.linear(way(x), way(weight), misaligned(bias)), out)
    for dtype in (torch.bfloat16, torch.int8):
        packed = dense.pack(weight.bfloat16(), dtype)
        out = kernels.linear.linear(x.bfloat16(), packed, bias.bfloat16())
        assert torch.equal(dense.pack(way(weight.bfloat16()), dtype).values, packed.values)
        assert torch.equal(kernels.linear.linear(way(x.bfloat16()), packed, misaligned(bias.bfloat16())), out)


@WAYS
@pytest.mark.parametrize("num_tokens", [2, 19])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts(isa: str, way: Way, num_tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(num_tokens, 96, generator=generator).to(dtype)
    gate_up, down = (
        pack(torch.randn(5, 64, 96, generator=generator), ROWS16),
        pack(torch.randn(5, 96, 32, generator=generator), ROWS16),
    )
    biases = (
        torch.randn(5, 64, generator=generator).to(dtype),
        torch.randn(5, 96, generator=generator).to(dtype),
    )
    logits = torch.randn(num_tokens, 5, generator=generator)

    def run(move: Way) -> Tensor:
        ids, weights = kernels.moe.gate_topk(move(logits), 3)
        gate_up_bias, down_bias = map(move, biases)
        held = ExpertWeights(gate_up, gate_up_bias, down, down_bias, 7.0, 1.702, num_experts=5)
        return kernels.moe.fused_experts(move(x), move(ids), move(weights), held)

    assert torch.equal(run(way), run(lambda tensor: tensor))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention(isa: str, dtype: torch.dtype) -> None:
    case = attention_case([(1, 130), (19, 40)], window=17, dtype=dtype)
    expected = attention.paged_attention(*case.arguments, scale=SCALE, window=17)
    found = attention.paged_attention(*map(misaligned, case.arguments), scale=SCALE, window=17)
    assert torch.equal(found, expected)
    q, kv_cache, *rest = case.arguments
    assert torch.equal(
        attention.paged_attention(strided(q), kv_cache, *map(strided, rest), scale=SCALE, window=17), expected
    )


@WAYS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms(isa: str, way: Way, dtype: torch.dtype) -> None:
    x, delta, weight = (
        torch.randn(*shape, generator=torch.Generator().manual_seed(3)).to(dtype)
        for shape in ((7, 50), (7, 50), (50,))
    )
    assert torch.equal(
        pointwise.rms_norm(way(x), misaligned(weight), 1e-5), pointwise.rms_norm(x, weight, 1e-5)
    )
    found = pointwise.add_rms_norm(way(x), way(delta), misaligned(weight), 1e-5)
    expected = pointwise.add_rms_norm(x.clone(), delta, weight, 1e-5)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_shapes_that_do_not_fit_are_refused_by_name() -> None:
    x, ids, weights = torch.zeros(3, 96), torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2)
    gate_up, down = pack(torch.zeros(5, 64, 96), ROWS16), pack(torch.zeros(5, 96, 32), ROWS16)

    def run(
        x: Tensor = x, ids: Tensor = ids, gate_up_bias: Tensor | None = None, down_bias: Tensor | None = None
    ) -> Tensor:
        gate_up_bias = torch.zeros(5, 64) if gate_up_bias is None else gate_up_bias
        down_bias = torch.zeros(5, 96) if down_bias is None else down_bias
        held = ExpertWeights(gate_up, gate_up_bias, down, down_bias, 7.0, 1.702, num_experts=5)
        return kernels.moe.fused_experts(x, ids, weights, held)

    assert run().shape == (3, 96)
    for arguments, name in (
        ({"x": torch.zeros(3, 95)}, r"^x must be \[T, 96\]"),
        ({"ids": torch.zeros(2, 2, dtype=torch.int64)}, "^topk_ids"),
        ({"gate_up_bias": torch.zeros(5, 63)}, "^gate_up_bias"),
        ({"down_bias": torch.zeros(4, 96)}, "^down_bias"),
    ):
        with pytest.raises(ValueError, match=name):
            run(**arguments)
    for norm in (
        lambda: pointwise.rms_norm(x, torch.ones(95), 1e-5),
        lambda: pointwise.add_rms_norm(x, x[:2], torch.ones(96), 1e-5),
    ):
        with pytest.raises(ValueError, match=r"^(weight|delta)"):
            norm()


def test_an_instruction_set_that_is_not_there_changes_nothing() -> None:
    before = native.isa()
    for name in ("sse5", "", "avx512_bf17"):
        with native.using_isa(name) as there:
            assert not there
            assert native.isa() == before
    assert native.isa() == before
