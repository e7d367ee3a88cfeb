"""The mixture of experts by Triton kernels, in the interpreter, against float64 and the
reference."""

from dataclasses import replace

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from kernels.moe import (
    fused_experts,
    gate_topk,
    grouped,
    reference,
    routing,
)
from kernels.moe.matmul_wgmma import DECODE
from kernels.moe.tile_choice import ARCHITECTURES, DENSE, MXFP4, MXFP4_WGMMA, Tile, tiles
from kernels.mxfp4 import NATURAL, WGMMA, PackedMXFP4, choose_layout, from_natural, unpack
from kernels.pointwise import add_rms_norm
from tests.interpreter.guards import guarded
from tests.interpreter.interpreter import recorded_launches
from tests.support.moe_cases import (
    DENSE_CASES,
    PACKED_CASES,
    Inputs,
    MoeCase,
    arguments,
    float64,
    gate_logits,
    inputs,
    natural,
    operations,
)
from tests.support.ptx import run_ptx


def guarded_inputs(values: Inputs) -> Inputs:
    def copy(value: PackedMXFP4 | Tensor) -> PackedMXFP4 | Tensor:
        if isinstance(value, Tensor):
            return guarded(value)
        return PackedMXFP4(value.layout, guarded(value.blocks), guarded(value.scales), value.shape)

    return Inputs(*(copy(value) for value in values))


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Compare relative to the largest entry: sums of hundreds of terms cancel."""
    assert found.isfinite().all()
    largest = float(expected.abs().max()) if expected.numel() else 1.0
    torch.testing.assert_close(found.double(), expected, atol=tolerance * largest, rtol=0)


def run(case: MoeCase, values: Inputs) -> Tensor:
    return fused_experts(*arguments(case, guarded_inputs(values)))


@pytest.mark.parametrize("layout", [NATURAL, WGMMA])
@pytest.mark.parametrize("case", PACKED_CASES, ids=str)
def test_packed_experts_in_bf16(case: MoeCase, layout: str) -> None:
    values = inputs(case, layout=layout, dtype=torch.bfloat16)
    found = run(case, values)
    assert found.dtype == torch.bfloat16
    # Activations, each expert's result and the sum are rounded to bf16.
    assert_near(found, float64(case, values), 2**-7)


@pytest.mark.parametrize("layout", [NATURAL, WGMMA])
@pytest.mark.parametrize("case", PACKED_CASES[1::3], ids=str)
def test_packed_experts_in_fp32_are_the_reference(case: MoeCase, layout: str) -> None:
    values = inputs(case, layout=layout, dtype=torch.float32)
    found = run(case, values)
    assert_near(found, float64(case, values), 1e-6)
    torch.testing.assert_close(
        found, reference.fused_experts(*arguments(case, natural(values))), atol=1e-4, rtol=1e-5
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-7), (torch.float32, 1e-6)])
@pytest.mark.parametrize("case", DENSE_CASES, ids=str)
def test_dense_experts(case: MoeCase, dtype: torch.dtype, tolerance: float) -> None:
    values = inputs(case, layout=None, dtype=dtype)
    assert_near(run(case, values), float64(case, values), tolerance)


EVERY_TILE = sorted(
    {
        (weights, tile)
        for weights in (MXFP4, MXFP4_WGMMA, DENSE)
        for architecture in ARCHITECTURES
        for tile in tiles(weights, architecture)
    },
    key=str,
)


@pytest.mark.parametrize(("weights", "tile"), EVERY_TILE, ids=str)
def test_every_tile_of_every_architecture(weights: str, tile: Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each expert has a row more than a tile, and widths are no multiples of the tile's."""
    case = MoeCase(tile.block_m + 1, 2, 2, 160, 96)
    values = inputs(
        case, layout={MXFP4: NATURAL, MXFP4_WGMMA: WGMMA, DENSE: None}[weights], dtype=torch.bfloat16
    )
    monkeypatch.setattr(grouped, "choose_tile", lambda *args, **kwargs: tile)
    assert_near(run(case, values), float64(case, values), 2**-7)


def test_every_code_and_scale_in_fragment_order_decodes_exactly() -> None:
    """Words of the layout through the assembly: register r of lane 4g + t in fragment f is row 2g +
    r % 2, columns 16f + 2t + 8 (r // 2) and the next."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.arange(129).repeat(2)[:256].view(1, 64, 4).to(torch.uint8)
    blocks = torch.randint(0, 256, (1, 64, 4, 16), dtype=torch.uint8, generator=generator)
    blocks[0, :16, 0] = torch.arange(256).view(16, 16)
    packed = from_natural(blocks, scales, WGMMA)
    exact = unpack(from_natural(blocks, scales), torch.bfloat16)[0]
    words = (
        packed.blocks.numpy().view(np.uint32)[..., 0].astype(np.uint32)
    )  # [1, strip, chunk, lane, fragment]
    factors = packed.scales.numpy().astype(np.uint32) << 7  # [1, strip, chunk, g, parity, group]
    doubled = factors | (factors << 16)
    for strip, chunk, lane, fragment in np.ndindex(words.shape[1:]):
        g, t = divmod(lane, 4)
        even, odd = (doubled[0, strip, chunk, g, parity, fragment // 2] for parity in range(2))
        registers = run_ptx(
            DECODE.value,
            4,
            [np.asarray(value) for value in (words[0, strip, chunk, lane, fragment], even, odd)],
        )
        for register, value in enumerate(registers):
            row, column = (
                16 * strip + 2 * g + register % 2,
                64 * chunk + 16 * fragment + 2 * t + 8 * (register // 2),
            )
            wanted = exact[row, column : column + 2].contiguous().view(torch.int16).numpy().view(np.uint32)[0]
            assert value == wanted, (strip, chunk, lane, fragment, register)


def test_the_interpreter_reads_the_natural_layout() -> None:
    assert choose_layout(torch.device("cpu")) == NATURAL


@pytest.mark.parametrize("layout", [NATURAL, WGMMA])
def test_a_token_is_the_same_at_every_place_of_a_batch(layout: str) -> None:
    case = MoeCase(19, 3, 5, 96, 64)
    values = inputs(case, layout=layout, dtype=torch.bfloat16)
    expected = run(case, values)
    assert torch.equal(run(case, values), expected), "from run to run"
    order = torch.randperm(19, generator=torch.Generator().manual_seed(0))
    x, ids, weights = (values[index][order] for index in range(3))
    assert torch.equal(run(case, values._replace(x=x, topk_ids=ids, topk_weights=weights)), expected[order])


@pytest.mark.parametrize("layout", [NATURAL, WGMMA, None])
def test_experts_that_nobody_chose_are_not_read(layout: str | None) -> None:
    case = MoeCase(6, 2, 5, 64, 32)
    values = inputs(case, layout=layout, dtype=torch.bfloat16)
    ids = torch.tensor([[1, 3]] * 6, dtype=torch.int32)
    expected = run(case, values._replace(topk_ids=ids))
    for value in values[3:]:
        (value.scales if isinstance(value, PackedMXFP4) else value)[[0, 2, 4]] = (
            255 if isinstance(value, PackedMXFP4) else torch.nan
        )
    assert torch.equal(run(case, values._replace(topk_ids=ids)), expected)


def test_ranks_with_a_part_of_the_experts_add_up() -> None:
    whole = MoeCase(11, 4, 9, 96, 32)
    values = inputs(whole, layout=NATURAL, dtype=torch.float32)
    total = torch.zeros(11, 96)
    for first, last in ((0, 2), (2, 3), (3, 9)):
        part = torch.arange(first, last)
        mine = [value.select(part) if isinstance(value, PackedMXFP4) else value[part] for value in values[3:]]
        total += run(MoeCase(11, 4, 9, 96, 32, first, last - first), Inputs(*values[:3], *mine))
    assert_near(total, float64(whole, values), 1e-6)


@pytest.mark.parametrize("num_tokens", [1, 64, 65])
def test_gated_experts_is_choice_and_experts_in_few_launches(num_tokens: int) -> None:
    case = MoeCase(num_tokens, 4, 6, 32, 32, first_expert=1, num_local=4)
    values = inputs(case, layout=NATURAL, dtype=torch.bfloat16)
    logits = gate_logits(case)
    with recorded_launches() as launches:
        found = operations(case, values).gated_experts(values.x, guarded(logits), 4)
    place = [] if num_tokens <= routing.SINGLE_TOKENS else ["place_tokens"]
    assert launches == [
        "choose_experts",
        *place,
        "expert_matmul_natural",
        "expert_matmul_natural",
        "add_slots",
    ]
    # The softmax is computed in another way; weights differ in the last bits.
    torch.testing.assert_close(found, fused_experts(*arguments(case, values)), atol=2**-6, rtol=2**-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("num_tokens", "k", "hidden"), [(0, 2, 64), (1, 1, 32), (3, 4, 96), (9, 3, 1056), (65, 2, 64)]
)
def test_experts_and_the_norm_behind_them_in_one_launch(
    num_tokens: int, k: int, hidden: int, dtype: torch.dtype
) -> None:
    """The bits are those of two launches; some tokens have none of their experts here."""
    case = MoeCase(num_tokens, k, 7, hidden, 32, first_expert=2, num_local=3)
    values = inputs(case, layout=NATURAL, dtype=dtype)
    experts, choice = operations(case, values), (values.x, gate_logits(case), k)
    generator = torch.Generator().manual_seed(1)
    wide, weight = (
        torch.randn(num_tokens, hidden + 8, generator=generator).to(dtype),
        torch.randn(hidden, generator=generator).to(dtype),
    )
    residual = wide[:, :hidden]
    expected = add_rms_norm(residual.clone(), experts.gated_experts(*choice), weight, 1e-5)
    with recorded_launches() as launches:
        found = experts.gated_experts_add_rms_norm(*choice, guarded(residual), guarded(weight), 1e-5)
    assert num_tokens == 0 or launches[-2:] == ["expert_matmul_natural", "add_slots_rms_norm"]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_experts_and_norm_name_the_argument_they_refuse() -> None:
    case = MoeCase(3, 2, 4, 64, 32)
    values = inputs(case, layout=NATURAL, dtype=torch.bfloat16)
    x, weight = values.x, torch.ones(64)
    for residual, norm_weight, name in (
        (x[:2], weight, "residual"),
        (x.float(), weight, "residual"),
        (x.T.contiguous().T, weight, "residual"),
        (x.clone(), weight[:63], "norm_weight"),
        (x.clone(), torch.ones(128)[::2], "weight"),
    ):
        with pytest.raises(ValueError, match=rf"^{name} "):
            operations(case, values).gated_experts_add_rms_norm(
                x, gate_logits(case), 2, residual, norm_weight, 1e-5
            )


def test_rows_of_activations_may_be_apart() -> None:
    case = MoeCase(5, 2, 3, 64, 32)
    values = inputs(case, layout=NATURAL, dtype=torch.bfloat16)
    wide = torch.full((5, 100), torch.nan, dtype=torch.bfloat16)
    wide[:, 20:84] = values.x
    apart = values._replace(x=wide[:, 20:84])
    assert torch.equal(fused_experts(*arguments(case, apart)), run(case, values))


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "k"),
    [
        *(
            (1, 1, 1),
            (1, 2, 1),
            (1, 128, 4),
            (2, 129, 5),
            (2, 127, 3),
            (3, 5, 5),
            (4, 31, 4),
            (5, 16, 7),
            (7, 17, 8),
            (8, 15, 2),
        ),
        *(
            (9, 3, 3),
            (15, 64, 1),
            (16, 63, 9),
            (17, 65, 4),
            (31, 9, 6),
            (40, 33, 3),
            (63, 8, 4),
            (64, 7, 2),
            (65, 6, 4),
            (100, 32, 4),
        ),
        *((129, 4, 2), (33, 256, 4)),
    ],
)
def test_choice_is_the_reference(num_tokens: int, num_experts: int, k: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    for logits in (
        torch.randn(num_tokens, num_experts, generator=generator),
        torch.randint(-2, 2, (num_tokens, num_experts), generator=generator).float(),
    ):
        expected = reference.gate_topk(logits, k)
        found = gate_topk(guarded(logits), k)
        # The interpreter chooses among ties as the reference whatever the kernel says;
        # tests/kernels/test_kernel_gate.py reads how the compiled kernel does.
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1], atol=1e-6, rtol=1e-6)


def test_choice_among_zeros_infinities_and_nan() -> None:
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor(
        [
            [0.0, -0.0, 0.0],
            [-0.0, 0.0, -1.0],
            [-inf, -inf, -inf],
            [-inf, 1.0, -inf],
            [inf, 0.0, inf],
            [nan, nan, nan],
            [-1.0000001, -1.0, 1.0],  # neighbours in fp32
        ]
    )
    assert gate_topk(logits, 2)[0].tolist() == [[0, 1], [0, 1], [0, 1], [1, 0], [0, 2], [0, 1], [2, 1]]
    assert gate_topk(logits, 3)[0].sort(dim=1).values.tolist() == [[0, 1, 2]] * 7


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(st.data())
def test_every_pair_has_one_place(data: st.DataObject) -> None:
    num_experts = data.draw(st.integers(1, 20))
    k = data.draw(st.integers(1, min(4, num_experts)))
    num_tokens = data.draw(st.integers(1, 100))
    first = data.draw(st.integers(0, num_experts - 1))
    num_local = data.draw(st.integers(1, num_experts - first))
    block_m = data.draw(st.sampled_from([8, 16, 64]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    favour = torch.randn(num_experts, generator=generator) * data.draw(st.sampled_from([0.0, 3.0]))
    ids, weights = reference.gate_topk(torch.randn(num_tokens, num_experts, generator=generator) + favour, k)
    found = routing.route(ids, weights, first_expert=first, num_local=num_local, block_m=block_m)
    chosen: dict[int, list[int]] = {expert: [] for expert in range(num_local)}
    for pair, expert in enumerate(ids.flatten().tolist()):
        if first <= expert < first + num_local:
            chosen[expert - first].append(pair)
    placed: dict[int, list[int]] = {expert: [] for expert in range(num_local)}
    tiles = found.tiles.tolist()
    for expert, place, num_rows, _ in tiles:
        assert 0 <= num_rows <= block_m
        if num_rows:
            assert len(placed[expert]) % block_m == 0, "only an expert's last tile is not full"
            placed[expert] += found.pairs[place : place + num_rows].tolist()
    assert placed == chosen, "tokens in ascending order"
    assert [rows > 0 for _, _, rows, _ in tiles] == sorted(
        (rows > 0 for _, _, rows, _ in tiles), reverse=True
    )


def test_the_bound_on_tiles_is_reached_and_not_exceeded() -> None:
    for num_pairs, num_experts, block_m in [
        (1, 1, 8),
        (8, 1, 8),
        (9, 1, 8),
        (40, 3, 16),
        (2, 128, 16),
        (500, 7, 8),
    ]:
        started = min(num_pairs, num_experts)
        worst = [1 + (num_pairs - started) // block_m * block_m] + [1] * (started - 1)
        rest = num_pairs - sum(worst)
        assert 0 <= rest < block_m
        assert sum(-(-rows // block_m) for rows in worst) == routing.max_tiles(
            num_pairs, num_experts, block_m
        )


def test_bad_arguments_are_named() -> None:
    case = MoeCase(4, 2, 5, 64, 32)
    values = inputs(case, layout=None, dtype=torch.bfloat16)
    turned = values.down.transpose(1, 2).contiguous().transpose(1, 2)
    bad = {
        "x": [values.x.T.contiguous().T, values.x[0]],
        "topk_ids": [values.topk_ids + 5, values.topk_ids - 6, values.topk_ids[:2]],
        "topk_weights": [values.topk_weights.double()],
        "gate_up_bias": [torch.stack((values.gate_up_bias,) * 2, dim=-1)[..., 0], values.gate_up_bias[:, 1:]],
        "down": [turned, values.down[1:]],
    }
    for name, replacements in bad.items():
        for value in replacements:
            with pytest.raises(ValueError, match=rf"^{name} "):
                fused_experts(*arguments(case, values._replace(**{name: value})))
    experts = operations(case, values)
    with pytest.raises(ValueError, match=r"^gate_logits "):
        experts.gated_experts(values.x, torch.zeros(3, 5), 2)
    with pytest.raises(ValueError, match=r"^gate_logits "):
        experts.gated_experts(values.x, torch.zeros(4, 6), 2)
    with pytest.raises(ValueError, match=r"^k "):
        experts.gated_experts(values.x, torch.zeros(4, 5), 6)
    with pytest.raises(ValueError, match=r"^first_expert "):
        operations(replace(case, first_expert=1), values)


@pytest.mark.parametrize("case", PACKED_CASES[1:], ids=str)
def test_mxfp8_activations_are_the_reference(case: MoeCase) -> None:
    """Sums in another order round some activations to another e4m3 value, 1/16 away at most;
    several of 32 to 96 in a sum."""
    values = inputs(case, layout=NATURAL, dtype=torch.bfloat16)
    found = fused_experts(*arguments(case, guarded_inputs(values), "mxfp8"))
    expected = reference.fused_experts(*arguments(case, values, "mxfp8"))
    assert_near(found, expected.double(), 2**-6)
    exact = reference.fused_experts(*arguments(case, values))
    assert (found - exact).abs().max() > (found - expected).abs().max() or not exact.any(), (
        "it does change the numerics"
    )


def test_rounding_to_mxfp8_is_the_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 1088, generator=generator) * torch.logspace(-40, 37, 9 * 34).view(
        9, 34
    ).repeat_interleave(32, dim=1)
    x[0, :32], x[1, :32] = 0, torch.arange(417, 449).float()
    values, scales = grouped._quantized(guarded(x))
    found = torch.ldexp(values.float().view(9, 34, 32), scales.int()[..., None] - 127).view(9, 1088)
    assert torch.equal(found, reference.round_to_mxfp8(x))
