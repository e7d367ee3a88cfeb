"""Mixture of experts against float64 loops and transformers' module."""

import math
from fractions import Fraction
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from kernels.formats import MoeActivationDtype
from kernels.moe import ExpertWeights, fused_experts, gate_topk, reference
from kernels.mxfp4 import PackedMXFP4, from_natural, pack, unpack

E, H, WIDTH, T, K = 5, 96, 64, 7, 3
LIMIT, ALPHA = 7.0, 1.702


class Weights(NamedTuple):
    gate_up: Tensor
    gate_up_bias: Tensor
    down: Tensor
    down_bias: Tensor


def weights(seed: int = 0, dtype: torch.dtype = torch.float32) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((E, 2 * WIDTH, H), (E, 2 * WIDTH), (E, H, WIDTH), (E, H))
    # Large enough that both sides of the clamp are met.
    return Weights(*(torch.randn(shape, generator=generator).mul_(0.7).to(dtype) for shape in shapes))


def oracle(x: Tensor, ids: Tensor, expert_weights: Tensor, w: Weights) -> Tensor:
    """Compute token by token, neuron by neuron, in float64."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(x.shape[0]):
        for slot in range(ids.shape[1]):
            expert = int(ids[token, slot])
            projected = w.gate_up[expert].double() @ x[token].double() + w.gate_up_bias[expert].double()
            active = []
            for neuron in range(projected.shape[0] // 2):
                gate = min(float(projected[2 * neuron]), LIMIT)
                up = max(-LIMIT, min(LIMIT, float(projected[2 * neuron + 1])))
                active.append((up + 1) * gate / (1 + math.exp(-ALPHA * gate)))
            result = (
                w.down[expert].double() @ torch.tensor(active, dtype=torch.float64)
                + w.down_bias[expert].double()
            )
            out[token] += float(expert_weights[token, slot]) * result
    return out


def inputs(num_tokens: int = T, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, H, generator=generator)
    return (x, *gate_topk(torch.randn(num_tokens, E, generator=generator), K))


def run(
    x: Tensor,
    ids: Tensor,
    expert_weights: Tensor,
    w: Weights,
    packed: tuple[PackedMXFP4, PackedMXFP4] | None = None,
    moe_activation_dtype: MoeActivationDtype = "auto",
) -> Tensor:
    gate_up, down = packed or (w.gate_up, w.down)
    held = ExpertWeights(
        gate_up,
        w.gate_up_bias,
        down,
        w.down_bias,
        swiglu_limit=LIMIT,
        swiglu_alpha=ALPHA,
        num_experts=len(w.gate_up_bias),
        moe_activation_dtype=moe_activation_dtype,
    )
    return fused_experts(x, ids, expert_weights, held)


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Compare relative to the largest entry: sums of hundreds of terms cancel."""
    torch.testing.assert_close(found.double(), expected, atol=tolerance * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("num_tokens", [1, 7, 17])
def test_dense_experts_against_float64(num_tokens: int) -> None:
    x, ids, expert_weights = inputs(num_tokens)
    assert_near(run(x, ids, expert_weights, weights()), oracle(x, ids, expert_weights, weights()), 1e-5)


def test_both_sides_of_the_clamp_are_met() -> None:
    x, _, _ = inputs()
    w = weights()
    projected = x @ w.gate_up[0].T + w.gate_up_bias[0]
    assert projected[:, 0::2].max() > LIMIT
    assert projected[:, 1::2].max() > LIMIT
    assert projected[:, 1::2].min() < -LIMIT


def test_packed_experts_compute_with_the_decoded_weights() -> None:
    w = weights()
    packed = pack(w.gate_up), pack(w.down)
    decoded = w._replace(gate_up=unpack(packed[0], torch.float32), down=unpack(packed[1], torch.float32))
    x, ids, expert_weights = inputs()
    found = run(x, ids, expert_weights, w, packed)
    assert_near(found, oracle(x, ids, expert_weights, decoded), 1e-5)
    assert torch.equal(found, run(x, ids, expert_weights, decoded))


def test_bf16_activations() -> None:
    w = weights(dtype=torch.bfloat16)
    x, ids, expert_weights = inputs()
    found = run(x.bfloat16(), ids, expert_weights, w)
    assert found.dtype == torch.bfloat16
    # One rounding to bf16 at the end.
    assert_near(found, oracle(x.bfloat16(), ids, expert_weights, w), 2**-8)


def test_against_transformers() -> None:
    config = GptOssConfig(hidden_size=H, intermediate_size=WIDTH, num_local_experts=E, num_experts_per_tok=K)
    theirs, w = GptOssExperts(config), weights()
    theirs.gate_up_proj.data, theirs.gate_up_proj_bias.data = (
        w.gate_up.transpose(1, 2).contiguous(),
        w.gate_up_bias,
    )
    theirs.down_proj.data, theirs.down_proj_bias.data = w.down.transpose(1, 2).contiguous(), w.down_bias
    x, ids, expert_weights = inputs(40)
    assert_near(run(x, ids, expert_weights, w), theirs(x, ids.long(), expert_weights).detach().double(), 1e-5)


def test_all_tokens_on_one_expert_and_the_others_never_touched() -> None:
    w = weights()
    x = inputs(20)[0]
    ids, expert_weights = torch.full((20, 1), 3, dtype=torch.int32), torch.ones(20, 1)
    poisoned = Weights(*(tensor.clone() for tensor in w))
    for tensor in poisoned:
        tensor[[0, 1, 2, 4]] = torch.nan
    assert_near(run(x, ids, expert_weights, poisoned), oracle(x, ids, expert_weights, w), 1e-5)


def test_packed_experts_that_nobody_chose_are_not_decoded() -> None:
    w = weights()
    packed = pack(w.gate_up), pack(w.down)
    x = inputs(4)[0]
    ids, expert_weights = torch.full((4, 1), 1, dtype=torch.int32), torch.ones(4, 1)
    expected = run(x, ids, expert_weights, w, packed)
    for tensors in packed:
        tensors.scales[[0, 2, 3, 4]] = 255
    with pytest.raises(ValueError, match="scales"):
        from_natural(packed[0].blocks, packed[0].scales)
    assert torch.equal(run(x, ids, expert_weights, w, packed), expected)


def test_the_gate_is_not_clamped_below() -> None:
    """A gate of -30 lets nothing through; clamped at -7 it would let 4e-4 through."""
    gate_up_bias = torch.tensor([[-30.0, 7.0]])
    w = Weights(torch.zeros(1, 2, 1), gate_up_bias, torch.ones(1, 1, 1), torch.zeros(1, 1))
    found = run(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1), w)
    assert abs(float(found)) < 1e-15


def test_a_token_is_the_same_in_every_batch_at_an_odd_width() -> None:
    """Widths that are no multiple of a vector leave remainders, which elementwise loops may compute
    in another way."""
    generator = torch.Generator().manual_seed(2)
    odd = Weights(
        *(
            torch.randn(shape, generator=generator)
            for shape in ((E, 2 * 37, 33), (E, 2 * 37), (E, 33, 37), (E, 33))
        )
    )
    x, ids = torch.randn(60, 33, generator=generator), torch.randint(0, E, (60, 1), generator=generator)
    ones = torch.ones(60, 1)
    everything = run(x, ids, ones, odd)
    alone = torch.cat([run(x[i : i + 1], ids[i : i + 1], ones[i : i + 1], odd) for i in range(60)])
    assert torch.equal(alone, everything)


def test_no_tokens() -> None:
    assert run(*inputs(0), weights()).shape == (0, H)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_is_the_same_in_every_batch(dtype: torch.dtype) -> None:
    w = weights(dtype=dtype)
    packed = pack(w.gate_up), pack(w.down)
    x, ids, expert_weights = inputs(130)
    x = x.to(dtype)
    everything = run(x, ids, expert_weights, w, packed)
    for first, count in [(0, 1), (5, 1), (3, 2), (17, 8), (1, 33), (40, 90)]:
        part = slice(first, first + count)
        assert torch.equal(run(x[part], ids[part], expert_weights[part], w, packed), everything[part]), (
            first,
            count,
        )
    order = torch.randperm(130, generator=torch.Generator().manual_seed(3))
    assert torch.equal(run(x[order], ids[order], expert_weights[order], w, packed), everything[order])


@pytest.mark.usefixtures("implementation")
def test_gate_takes_the_softmax_over_the_chosen() -> None:
    logits = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    ids, chosen_weights = gate_topk(logits, 4)
    assert ids.dtype == torch.int32
    assert chosen_weights.dtype == torch.float32
    for row, found_ids, found_weights in zip(
        logits.tolist(), ids.tolist(), chosen_weights.tolist(), strict=True
    ):
        order = sorted(range(32), key=lambda expert, row=row: (-row[expert], expert))[:4]
        powers = [math.exp(row[expert]) for expert in order]
        assert found_ids == order
        assert found_weights == pytest.approx([power / sum(powers) for power in powers], rel=1e-6)


@pytest.mark.usefixtures("implementation")
def test_gate_ties_go_to_the_lower_expert_in_every_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 3, (64, 128), generator=generator).float()
    ids, chosen_weights = gate_topk(logits, 4)
    for row, found in zip(logits.tolist(), ids.tolist(), strict=True):
        assert found == sorted(range(128), key=lambda expert, row=row: (-row[expert], expert))[:4]
    alone = [gate_topk(logits[i : i + 1], 4) for i in range(64)]
    assert torch.equal(torch.cat([found for found, _ in alone]), ids)
    assert torch.equal(torch.cat([found for _, found in alone]), chosen_weights)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize(("num_experts", "k"), [(1, 1), (5, 5), (7, 1), (128, 4)])
def test_gate_agrees_with_the_reference(num_experts: int, k: int) -> None:
    logits = torch.randn(40, num_experts, generator=torch.Generator().manual_seed(k)) * 20
    logits[1, 0] = torch.nan
    logits[2] = -torch.inf
    logits[3, num_experts // 2] = torch.inf
    found, expected = gate_topk(logits, k), reference.gate_topk(logits, k)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], atol=1e-6, rtol=1e-5, equal_nan=True)
    assert torch.equal(gate_topk(logits.bfloat16(), k)[0], reference.gate_topk(logits.bfloat16(), k)[0])


def test_bad_arguments_are_named() -> None:
    x, ids, expert_weights = inputs()
    w = weights()
    good = {"x": x, "topk_ids": ids, "topk_weights": expert_weights}

    def run(*, w: Weights = w, **tokens: Tensor) -> None:
        fused_experts(
            **tokens, weights=ExpertWeights(*w, swiglu_limit=LIMIT, swiglu_alpha=ALPHA, num_experts=E)
        )

    bad = {
        "x": [x[0], x[:, 1:]],
        "topk_ids": [ids[:3], ids.float(), ids + E, ids - 5],
        "topk_weights": [expert_weights[:, :1], expert_weights.double()],
        "gate_up": [w.gate_up[0], w.gate_up[:, 1:]],
        "gate_up_bias": [w.gate_up_bias[:, 1:]],
        "down": [w.down.transpose(1, 2), pack(w.gate_up)],
        "down_bias": [w.down_bias[1:]],
    }
    for name, values in bad.items():
        for value in values:
            with pytest.raises(ValueError, match=rf"^{name} "):
                run(**({**good, name: value} if name in good else {**good, "w": w._replace(**{name: value})}))
    with pytest.raises(ValueError, match=r"^gate_up_bias must be \[5, 96\]"):
        run(**good, w=w._replace(gate_up=w.gate_up.transpose(1, 2)))
    with pytest.raises(ValueError, match=r"^gate_logits"):
        gate_topk(torch.zeros(3), 1)
    for k in (0, E + 1):
        with pytest.raises(ValueError, match=r"^k "):
            gate_topk(torch.zeros(3, E), k)


def e4m3(code: int) -> Fraction:
    """Return the value of a positive code from its fields: four exponent bits of bias 7, three
    mantissa bits; exponent 0 is subnormal."""
    exponent, mantissa = code >> 3, code & 7
    return (
        Fraction(mantissa, 8) * Fraction(2) ** -6
        if exponent == 0
        else Fraction(8 + mantissa, 8) * Fraction(2) ** (exponent - 7)
    )


E4M3 = [e4m3(code) for code in range(127)]
"""Code 127 is NaN; 126 is 448."""


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=32, max_size=32),
    st.integers(-20, 20),
)
def test_rounding_to_mxfp8_is_to_the_nearest_of_the_groups_values(group: list[float], power: int) -> None:
    x = torch.ldexp(torch.tensor(group), torch.tensor(power))
    x = torch.where(x.isfinite(), x, 0).view(1, 32)
    largest = float(x.abs().max())
    exponent = max(math.frexp(largest)[1] - 1 - 8, -126) if largest else -126
    for value, found in zip(x[0].tolist(), reference.round_to_mxfp8(x)[0].tolist(), strict=True):
        scaled = abs(Fraction(value)) / Fraction(2) ** exponent
        distance = min(abs(candidate - scaled) for candidate in E4M3)
        nearest = [code for code, candidate in enumerate(E4M3) if abs(candidate - scaled) == distance]
        wanted = float(E4M3[min(nearest, key=lambda code: code & 1)] * Fraction(2) ** exponent)
        assert found == math.copysign(wanted, value)


def test_mxfp8_activations_round_what_enters_each_projection() -> None:
    w = weights()
    x, ids, expert_weights = inputs()
    rounded = reference.round_to_mxfp8(x)
    assert not torch.equal(rounded, x)
    found = run(x, ids, expert_weights, w, moe_activation_dtype="mxfp8")
    again = run(rounded, ids, expert_weights, w, moe_activation_dtype="mxfp8")
    assert torch.equal(found, again)
    # Of e4m3's three mantissa bits; the second rounding is why this is not that of `rounded`
    # without the argument.
    assert_near(found, oracle(x, ids, expert_weights, w), 2**-4)
    assert not torch.equal(found, run(rounded, ids, expert_weights, w))
    narrow = Weights(w.gate_up[..., :40], w.gate_up_bias, w.down[:, :40], w.down_bias[:, :40])
    with pytest.raises(ValueError, match=r"^moe_activation_dtype mxfp8 needs widths"):
        run(x[:, :40], ids, expert_weights, narrow, moe_activation_dtype="mxfp8")
