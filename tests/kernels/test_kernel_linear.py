"""The linear layer: right, and independent of the batch."""

import pytest
import torch

from kernels.cpu import native
from kernels.linear import linear

SHAPES = [(384, 256), (33, 31), (5, 96), (1000, 96), (8, 256), (96, 67)]
LARGE_SHAPES = [(512, 2880), (32, 2880), (2880, 4096)] if native.shared_library() is not None else []
"""Shapes of gpt-oss: here a BLAS, which runs where the C++ library was not built, cuts the sums of
few rows in another way than of many."""


@pytest.mark.parametrize(("outputs", "width"), SHAPES)
@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 100])
def test_agrees_with_float64(rows: int, outputs: int, width: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, weight = (
        torch.randn(rows, width, generator=generator),
        torch.randn(outputs, width, generator=generator),
    )
    bias = torch.randn(outputs, generator=generator)
    expected = torch.einsum("tk,nk->tn", x.double(), weight.double()) + bias.double()
    # fp32 sums of up to 256 products of order 1.
    torch.testing.assert_close(linear(x, weight, bias).double(), expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(linear(x, weight).double(), expected - bias.double(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "width"), SHAPES + LARGE_SHAPES)
def test_a_row_is_the_same_in_every_batch(outputs: int, width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(outputs)
    x = torch.randn(300, width, generator=generator).to(dtype)
    weight, bias = (
        torch.randn(outputs, width, generator=generator).to(dtype),
        torch.randn(outputs, generator=generator).to(dtype),
    )
    everything = linear(x, weight, bias)
    for rows in (1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 100, 129):
        for first in (0, 1, 37):
            assert torch.equal(
                linear(x[first : first + rows], weight, bias), everything[first : first + rows]
            ), (rows, first)


def test_fp32_weights_widen_the_input() -> None:
    x, weight, bias = torch.randn(3, 40).bfloat16(), torch.randn(5, 40), torch.randn(5)
    found = linear(x, weight, bias)
    assert found.dtype == torch.float32
    assert torch.equal(found, linear(x.float(), weight, bias))


@pytest.mark.parametrize(
    ("x", "weight", "bias", "named"),
    [
        (torch.zeros(3), torch.zeros(2, 3), None, "x"),
        (torch.zeros(1, 3), torch.zeros(2, 4), None, "weight"),
        (torch.zeros(1, 3), torch.zeros(2, 3, dtype=torch.bfloat16), None, "weight"),
        (torch.zeros(1, 3), torch.zeros(2, 3), torch.zeros(3), "bias"),
        (torch.zeros(1, 3), torch.zeros(2, 3), torch.zeros(2, dtype=torch.bfloat16), "bias"),
    ],
)
def test_bad_arguments_are_named(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, named: str
) -> None:
    with pytest.raises(ValueError, match=rf"^{named}"):
        linear(x, weight, bias)
