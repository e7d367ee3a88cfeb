"""The fp8 KV cache of the reference: what storing loses, and attention over what is stored."""

import pytest
import torch
from torch import Tensor

from kernels.attention import paged_attention, reference, rope_and_store_kv, store_kv
from kernels.attention.fp8 import FP8, FP8_MAX
from kernels.formats import fp8_refusal
from tests.support.attention_cases import BLOCK_SIZE, SCALE, attention_case

KV_HEADS, HEAD_DIM = 3, 10


def stored(values: Tensor, scales: Tensor | None) -> Tensor:
    """[T, KV_HEADS, HEAD_DIM] as K, and its negative as V → [2, T, KV_HEADS, HEAD_DIM] fp32, as the
    cache gives them back."""
    cache = torch.zeros(2, len(values), BLOCK_SIZE, KV_HEADS, HEAD_DIM).to(FP8)
    slots = torch.arange(len(values)) * BLOCK_SIZE
    store_kv(values, -values, cache, slots, scales)
    found = cache[:, :, 0].float()
    return found if scales is None else found * scales[:, None, :, None]


@pytest.mark.parametrize("scales", [None, torch.tensor([[0.5, 0.03, 2.0], [0.1, 7.0, 1.0]])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stored_value_is_off_by_a_sixteenth_at_most(dtype: torch.dtype, scales: Tensor | None) -> None:
    """Three bits of mantissa: half a unit in the last place is 2^-4 of the value, and below 2^-6 of
    the scale 2^-10 of the scale."""
    values = (torch.randn(40, KV_HEADS, HEAD_DIM) * torch.logspace(-4, 1, 40)[:, None, None]).to(dtype)
    of_heads = torch.ones(2, KV_HEADS) if scales is None else scales
    for found, exact, scale in zip(
        stored(values, scales), (values.double(), -values.double()), of_heads, strict=True
    ):
        inside = exact.abs() <= FP8_MAX * scale[:, None]
        bound = (exact.abs() * 2**-4).maximum(scale[:, None] * 2**-10)
        assert ((found - exact).abs()[inside] <= bound[inside] * (1 + 1e-6)).all()
    powers = 2.0 ** torch.arange(-8, 8).repeat(KV_HEADS * HEAD_DIM, 1).T.reshape(-1, KV_HEADS, HEAD_DIM)
    assert torch.equal(stored(powers.to(dtype), None)[0], powers), "powers of two are exact"


def test_large_values_saturate_and_nan_stays() -> None:
    values = torch.zeros(1, KV_HEADS, HEAD_DIM)
    values[0, 0, :4] = torch.tensor([448.0, 449.0, 1e9, torch.inf])
    values[0, 1, 0] = torch.nan
    found = stored(values, None)
    assert found[0, 0, 0, :4].tolist() == [FP8_MAX] * 4
    assert found[1, 0, 0, :4].tolist() == [-FP8_MAX] * 4
    assert found[0, 0, 1, 0].isnan()


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("scales", [False, True])
def test_attention_over_what_is_stored(scales: bool, window: int | None) -> None:
    """Float64 over the values that the cache holds; fp32 sums in another order."""
    case = attention_case([(1, 700), (20, 300), (1, 17), (33, 33)], window=window, fp8=True, scales=scales)
    found = case.reference()
    assert not found.isnan().any()
    torch.testing.assert_close(found.double(), case.expected(), atol=1e-5, rtol=1e-5)


def test_the_whole_error_of_attention() -> None:
    """All scales are 1, keys and values normal: a value's 2^-4 is averaged away, a logit is off by
    2^-4 * |q| |k| / sqrt(d) at most and by far less mostly. The bound is 0.1 where outputs are up
    to 1."""
    exact = attention_case([(30, 400)], seed=3)
    fp8 = attention_case([(30, 400)], seed=3, fp8=True)
    torch.testing.assert_close(fp8.reference(), exact.reference(), atol=0.1, rtol=0)
    assert (fp8.reference() - exact.reference()).abs().mean() < 0.02


@pytest.mark.parametrize("window", [None, 24])
def test_chunks_give_the_bits_of_the_whole(window: int | None) -> None:
    case = attention_case([(150, 150)], window=window, fp8=True, scales=True)
    whole = case.reference()
    for start, end in ((0, 1), (0, 64), (64, 65), (65, 150), (149, 150)):
        part = paged_attention(
            case.q[start:end],
            case.kv_cache,
            case.block_table,
            torch.tensor([end], dtype=torch.int32),
            torch.tensor([0, end - start], dtype=torch.int32),
            case.sinks,
            scale=SCALE,
            window=window,
            kv_scales=case.kv_scales,
        )
        assert torch.equal(part, whole[start:end]), (start, end)


def test_keys_are_rounded_to_the_models_dtype_before_they_are_stored() -> None:
    qkv = torch.randn(4, 12, HEAD_DIM).bfloat16()
    angles = torch.rand(4, HEAD_DIM // 2)
    slots, scales = torch.tensor([3, 40, 41, 0]), torch.rand(2, KV_HEADS) + 0.1
    plain = torch.zeros(2, 3, BLOCK_SIZE, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16)
    fp8, expected = plain.to(FP8), plain.to(FP8)
    queries = reference.rope_and_store_kv(qkv, 6, angles.cos(), angles.sin(), plain, slots)
    assert torch.equal(
        rope_and_store_kv(qkv, 6, angles.cos(), angles.sin(), fp8, slots, kv_scales=scales), queries
    )
    k, v = plain.view(2, -1, KV_HEADS, HEAD_DIM)[:, slots]
    store_kv(k, v, expected, slots, scales)
    assert torch.equal(fp8.view(torch.uint8), expected.view(torch.uint8))


def test_scales_that_do_not_fit_are_refused() -> None:
    case = attention_case([(1, 17)], fp8=True)
    for scales in (
        torch.ones(2, KV_HEADS, dtype=torch.float64),
        torch.ones(KV_HEADS),
        torch.ones(2, KV_HEADS + 1),
    ):
        with pytest.raises(ValueError, match=r"^kv_scales "):
            paged_attention(*case.arguments, scale=SCALE, kv_scales=scales)
    plain = attention_case([(1, 17)])
    with pytest.raises(ValueError, match=r"^kv_scales is for a kv_cache of torch.float8_e4m3fn"):
        paged_attention(*plain.arguments, scale=SCALE, kv_scales=torch.ones(2, KV_HEADS))
    with pytest.raises(ValueError, match=r"^q must be of 16 or 32-bit floats"):
        paged_attention(case.q.to(FP8), *case.arguments[1:], scale=SCALE)


def test_which_architectures_have_it() -> None:
    having = ["cpu", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "gfx950"]
    assert [
        target
        for target in (*having, "sm_80", "sm_86", "gfx942", "gfx90a", "gfx1100")
        if fp8_refusal(target) is None
    ] == having
