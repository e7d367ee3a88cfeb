"""RMSNorm and YaRN against float64 and against transformers' modules."""

import math

import pytest
import torch
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import (
    GptOssRMSNorm,
    GptOssRotaryEmbedding,
    _apply_rotary_emb,
)

from kernels.pointwise import add_rms_norm, apply_rope, reference, rms_norm, yarn_cos_sin

GPT_OSS = {
    "theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 4096,
}
POSITIONS = [0, 1, 127, 128, 129, 1000, 4095, 4096, 4097, 20000, 131071]


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 96, 257])
def test_rms_norm(width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    x = (torch.randn(7, width, generator=generator) * 30).to(dtype)
    weight = torch.randn(width, generator=generator).to(dtype)
    rows = [[float(value) for value in row] for row in x]
    expected = torch.tensor(
        [
            [
                value / math.sqrt(sum(v * v for v in row) / width + 1e-5) * float(factor)
                for value, factor in zip(row, weight, strict=True)
            ]
            for row in rows
        ],
        dtype=torch.float64,
    )
    # One rounding to the output's dtype, and fp32 arithmetic before it.
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(rms_norm(x, weight, 1e-5).double(), expected, atol=tolerance, rtol=tolerance)
    theirs = GptOssRMSNorm(width, eps=1e-5)
    theirs.weight.data = weight.float()
    assert torch.equal(reference.rms_norm(x, weight, 1e-5), theirs(x).detach())


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_rms_norm_rounds_the_sum_before_the_norm(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    residual, delta = (torch.randn(3, 97, generator=generator).to(dtype) * scale for scale in (100, 1))
    weight = torch.randn(97, generator=generator).to(dtype)
    expected_sum = (residual.double() + delta.double()).to(dtype)
    theirs = GptOssRMSNorm(97, eps=1e-5)
    theirs.weight.data = weight.float()
    total, normed = add_rms_norm(residual.clone(), delta.clone(), weight, 1e-5)
    assert torch.equal(total, expected_sum)
    assert torch.equal(reference.rms_norm(expected_sum, weight, 1e-5), theirs(expected_sum).detach())
    assert torch.equal(normed, rms_norm(expected_sum, weight, 1e-5))
    for bad in (delta[:2], delta.double()):
        with pytest.raises(ValueError, match=r"^delta"):
            add_rms_norm(residual, bad, weight, 1e-5)


@pytest.mark.usefixtures("implementation", "_restore_threads")
def test_rms_norm_of_zeros_and_of_a_row_alone() -> None:
    weight = torch.ones(967)
    assert torch.equal(rms_norm(torch.zeros(2, 967), weight, 1e-5), torch.zeros(2, 967))
    x = torch.randn(150, 967, generator=torch.Generator().manual_seed(0))
    torch.set_num_threads(1)
    everything = rms_norm(x, weight, 1e-5)
    assert all(torch.equal(rms_norm(x[i : i + 1], weight, 1e-5), everything[i : i + 1]) for i in range(150))
    torch.set_num_threads(3)
    assert torch.equal(rms_norm(x, weight, 1e-5), everything)
    assert torch.equal(rms_norm(x.view(3, 50, 967), weight, 1e-5), everything.view(3, 50, 967))


@pytest.mark.usefixtures("implementation")
def test_norms_of_other_values() -> None:
    weight = torch.ones(40, dtype=torch.bfloat16)
    x = torch.randn(3, 40).bfloat16()
    x[1, 7] = torch.nan
    out = rms_norm(x, weight.float(), 1e-5)
    assert out[1].isnan().all()
    assert not out[[0, 2]].isnan().any()
    assert torch.equal(rms_norm(x[[0]], weight, 1e-5), out[[0]])
    assert rms_norm(x[:0], weight, 1e-5).shape == (0, 40)
    large = torch.full((1, 40), 3e38).bfloat16()
    total, normed = add_rms_norm(large.clone(), large, weight, 1e-5)
    assert total.isinf().all()
    assert normed.isnan().all()


def yarn_frequency(dimension: int, head_dim: int, truncate: bool, **rope: float) -> float:
    """Return the frequency of a pair, from the paper's ramp over the number of turns' dimension, in
    float64."""

    def dimension_of(turns: float) -> float:
        wavelength = rope["original_max_position_embeddings"] / turns
        return head_dim / 2 * math.log(wavelength / (2 * math.pi), rope["theta"])

    low, high = dimension_of(rope["beta_fast"]), dimension_of(rope["beta_slow"])
    if truncate:
        low, high = float(math.floor(low)), float(math.ceil(high))
    low, high = max(low, 0.0), min(high, head_dim - 1.0)
    plain = rope["theta"] ** (-2 * dimension / head_dim)
    interpolated = min(1.0, max(0.0, (dimension - low) / (high - low)))
    return plain / rope["factor"] * interpolated + plain * (1 - interpolated)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize("head_dim", [10, 64])
def test_yarn_against_float64(head_dim: int, truncate: bool) -> None:
    cos, sin = yarn_cos_sin(torch.tensor(POSITIONS), head_dim, truncate=truncate, **GPT_OSS)
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == sin.shape == (len(POSITIONS), head_dim // 2)
    concentration = 0.1 * math.log(32) + 1
    for row, position in enumerate(POSITIONS):
        for dimension in range(head_dim // 2):
            angle = position * yarn_frequency(dimension, head_dim, truncate, **GPT_OSS)
            # fp32 holds an angle of 131071 to 2^-8; the tolerance follows the angle.
            tolerance = 2e-6 + abs(angle) * 3e-7
            assert abs(float(cos[row, dimension]) - math.cos(angle) * concentration) < tolerance, (
                position,
                dimension,
            )
            assert abs(float(sin[row, dimension]) - math.sin(angle) * concentration) < tolerance, (
                position,
                dimension,
            )


@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head_dim": 10},
        {"factor": 8.0, "theta": 10000.0, "original": 256},
        {"factor": 32.0, "theta": 100.0, "original": 262_144},  # the ramp would end past the last dimension
    ],
)
def test_yarn_equals_transformers(truncate: bool, changes: dict[str, float]) -> None:
    head_dim = int(changes.get("head_dim", 64))
    rope = {**GPT_OSS}
    if "factor" in changes:
        rope |= {
            "factor": changes["factor"],
            "theta": changes["theta"],
            "original_max_position_embeddings": int(changes["original"]),
        }
    config = GptOssConfig(
        hidden_size=6 * head_dim,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=head_dim,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": rope["theta"],
            "factor": rope["factor"],
            "beta_fast": rope["beta_fast"],
            "beta_slow": rope["beta_slow"],
            "original_max_position_embeddings": rope["original_max_position_embeddings"],
            "truncate": truncate,
        },
    )
    positions = torch.tensor(POSITIONS)
    their_cos, their_sin = GptOssRotaryEmbedding(config)(torch.zeros(1), positions[None])
    cos, sin = reference.yarn_cos_sin(positions, head_dim, truncate=truncate, **rope)
    assert torch.equal(cos, their_cos[0])
    assert torch.equal(sin, their_sin[0])
    # The same angles, and another library's sine of them.
    for found, expected in zip(
        yarn_cos_sin(positions, head_dim, truncate=truncate, **rope), (cos, sin), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=3e-7, rtol=0)


def test_truncating_matters() -> None:
    positions = torch.tensor([5000])
    exact, rounded = (
        yarn_cos_sin(positions, 64, truncate=truncate, **GPT_OSS)[0] for truncate in (False, True)
    )
    assert not torch.allclose(exact, rounded, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_apply_rope(dtype: torch.dtype) -> None:
    x = torch.randn(len(POSITIONS), 3, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    cos, sin = yarn_cos_sin(torch.tensor(POSITIONS), 10, truncate=False, **GPT_OSS)
    rotated = apply_rope(x, cos, sin)
    assert rotated.dtype == dtype
    # A pair is a complex number that is multiplied by cos + i sin.
    pairs = (
        torch.complex(x[..., :5].double(), x[..., 5:].double())
        * torch.complex(cos.double(), sin.double())[:, None]
    )
    expected = torch.cat((pairs.real, pairs.imag), dim=-1)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(rotated.double(), expected, atol=tolerance, rtol=tolerance)
    if dtype == torch.float32:
        assert torch.equal(rotated, _apply_rotary_emb(x, cos[:, None], sin[:, None]))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"^weight"):
        rms_norm(torch.zeros(2, 4), torch.zeros(3), 1e-5)
    with pytest.raises(ValueError, match=r"^positions"):
        yarn_cos_sin(torch.zeros(3), 64, truncate=False, **GPT_OSS)
    with pytest.raises(ValueError, match=r"^head_dim"):
        yarn_cos_sin(torch.zeros(3, dtype=torch.int64), 63, truncate=False, **GPT_OSS)
    with pytest.raises(ValueError, match=r"^x "):
        apply_rope(torch.zeros(2, 3, 5), torch.zeros(2, 2), torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"^cos"):
        apply_rope(torch.zeros(2, 3, 6), torch.zeros(3, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"^sin"):
        apply_rope(torch.zeros(2, 3, 6), torch.zeros(2, 3), torch.zeros(2, 6))
