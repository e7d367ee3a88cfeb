"""The gate's linear layer as a Triton kernel, against float64."""

import pytest
import torch

from kernels.linear import MAX_NARROW_TOKENS, linear
from kernels.linear import reference as linear_reference
from tests.interpreter.guards import guarded
from tests.interpreter.interpreter import recorded_launches


@pytest.mark.parametrize(
    ("outputs", "width"),
    [(1, 1), (3, 7), (4, 64), (5, 255), (32, 257), (33, 1023), (6, 1024), (7, 1025), (9, 2880)],
)
@pytest.mark.parametrize("tokens", [0, 1, 7, 8, 9, 17])
def test_agrees_with_float64(tokens: int, outputs: int, width: int) -> None:
    """Sums of up to 2880 products of order 1 in fp32."""
    generator = torch.Generator().manual_seed(tokens)
    wide = torch.randn(tokens, width + 3, generator=generator).bfloat16()
    weight, bias = torch.randn(outputs, width, generator=generator), torch.randn(outputs, generator=generator)
    x = wide[:, 2:-1]
    exact = torch.einsum("tk,nk->tn", x.double(), weight.double())
    with recorded_launches() as names:
        found = linear(x, guarded(weight), guarded(bias))
    assert names == ["narrow_linear_kernel"] * (tokens > 0)
    torch.testing.assert_close(found.double(), exact + bias.double(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(linear(guarded(x), guarded(weight)).double(), exact, atol=1e-4, rtol=1e-5)


def test_many_tokens_go_another_way() -> None:
    x, weight, bias = torch.randn(MAX_NARROW_TOKENS + 1, 6).bfloat16(), torch.randn(3, 6), torch.randn(3)
    with recorded_launches() as names:
        found = linear(x, weight, bias)
    assert not names
    torch.testing.assert_close(found, linear_reference.linear(x, weight, bias), atol=1e-6, rtol=1e-6)


def test_layouts_that_are_refused_are_named() -> None:
    x, weight = torch.randn(4, 6).bfloat16(), torch.randn(3, 6)
    for wrong_x, wrong_weight, name in (
        (torch.randn(6, 4).bfloat16().T, weight, "x"),
        (x, torch.randn(6, 3).T, "weight"),
    ):
        with pytest.raises(ValueError, match=rf"^{name} "):
            linear(wrong_x, wrong_weight)
