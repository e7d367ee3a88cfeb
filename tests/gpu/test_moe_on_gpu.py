"""The mixture of experts by compiled Triton kernels: the interpreter's cases, CUDA graphs, and
gpt-oss's shapes.

Written on machines without a GPU and not run on one yet. `make gpu-check` runs it.
"""

import pytest
import torch
from torch import Tensor

from kernels.formats import MoeActivationDtype
from kernels.moe import fused_experts, gate_topk, reference
from kernels.mxfp4 import NATURAL, WGMMA, choose_layout
from kernels.pointwise import add_rms_norm
from tests.support.moe_cases import (
    DENSE_CASES,
    PACKED_CASES,
    Inputs,
    MoeCase,
    arguments,
    float64,
    gate_logits,
    inputs,
    on_device,
    operations,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]

LARGE_CASES = [
    MoeCase(1, 4, 8, 2880, 2880),
    MoeCase(7, 4, 8, 2880, 2880),
    MoeCase(37, 4, 8, 2880, 2880),
    MoeCase(300, 4, 8, 2880, 2880, first_expert=4, num_local=4),
    MoeCase(1000, 4, 6, 2880, 1440),
]
"""gpt-oss's width, fewer experts, so that each of the tiles is met."""


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def layouts_here(device: torch.device) -> list[str]:
    return sorted({NATURAL, choose_layout(device)})


def run(
    case: MoeCase, values: Inputs, device: torch.device, moe_activation_dtype: MoeActivationDtype = "auto"
) -> Tensor:
    return fused_experts(*arguments(case, on_device(values, device), moe_activation_dtype)).cpu()


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Compare relative to the largest entry: sums of hundreds of terms cancel."""
    assert found.isfinite().all()
    largest = float(expected.abs().max()) if expected.numel() else 1.0
    torch.testing.assert_close(found.double(), expected.double(), atol=tolerance * largest, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", PACKED_CASES, ids=str)
def test_packed_experts(case: MoeCase, dtype: torch.dtype, device: torch.device) -> None:
    for layout in layouts_here(device):
        values = inputs(case, layout=layout, dtype=dtype)
        assert_near(
            run(case, values, device), float64(case, values), 2**-7 if dtype == torch.bfloat16 else 1e-5
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", DENSE_CASES, ids=str)
def test_dense_experts(case: MoeCase, dtype: torch.dtype, device: torch.device) -> None:
    values = inputs(case, layout=None, dtype=dtype)
    assert_near(run(case, values, device), float64(case, values), 2**-7 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("case", PACKED_CASES, ids=str)
def test_mxfp8_activations(case: MoeCase, device: torch.device) -> None:
    values = inputs(case, layout=NATURAL, dtype=torch.bfloat16)
    expected = reference.fused_experts(*arguments(case, values, "mxfp8"))
    assert_near(run(case, values, device, "mxfp8"), expected, 2**-6)


@pytest.mark.parametrize("case", LARGE_CASES, ids=str)
def test_widths_of_gpt_oss(case: MoeCase, device: torch.device) -> None:
    """The reference, which takes longest, once for all layouts of the same weights."""
    for layouts in (layouts_here(device), [None]):
        values = inputs(case, layout=None if layouts == [None] else NATURAL, dtype=torch.bfloat16)
        expected = reference.fused_experts(*arguments(case, values))
        for layout in layouts:
            found = fused_experts(*arguments(case, on_device(values, device, layout))).cpu()
            assert_near(found, expected, 2**-6)


def test_a_token_is_the_same_at_every_place_and_in_every_run(device: torch.device) -> None:
    case = MoeCase(200, 4, 16, 288, 96)
    for layout in layouts_here(device):
        values = inputs(case, layout=layout, dtype=torch.bfloat16)
        expected = run(case, values, device)
        for seed in range(5):
            order = torch.randperm(200, generator=torch.Generator().manual_seed(seed))
            x, ids, weights = (values[index][order] for index in range(3))
            assert torch.equal(
                run(case, values._replace(x=x, topk_ids=ids, topk_weights=weights), device), expected[order]
            )


@pytest.mark.parametrize("num_tokens", [1, 64, 65, 500])
def test_a_graph_holds_choice_and_experts(num_tokens: int, device: torch.device) -> None:
    """Captured with one choice of experts, replayed with another."""
    case = MoeCase(num_tokens, 4, 12, 96, 64)
    values = on_device(inputs(case, layout=choose_layout(device), dtype=torch.bfloat16), device)
    logits, x = gate_logits(case, seed=0).to(device), values.x.clone()
    experts = operations(case, values)

    def step() -> Tensor:
        return experts.gated_experts(x, logits, 4)

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for seed in (0, 1, 2):
        logits.copy_(gate_logits(case, seed=seed))
        x.copy_(values.x.roll(seed, 0))
        graph.replay()
        assert torch.equal(out, step())


@pytest.mark.parametrize("num_tokens", [1, 64, 300])
def test_the_norm_behind_the_experts_has_the_same_bits_in_their_launch(
    num_tokens: int, device: torch.device
) -> None:
    case = MoeCase(num_tokens, 4, 12, 2880, 64)
    values = on_device(inputs(case, layout=choose_layout(device), dtype=torch.bfloat16), device)
    experts, choice = operations(case, values), (values.x, gate_logits(case).to(device), 4)
    residual, weight = values.x.flip(0), values.x[0].clone()
    expected = add_rms_norm(residual.clone(), experts.gated_experts(*choice), weight, 1e-5)
    found = experts.gated_experts_add_rms_norm(*choice, residual, weight, 1e-5)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "k"), [(1, 128, 4), (64, 128, 4), (65, 32, 4), (1000, 128, 4), (3, 5, 5)]
)
def test_choice_is_the_reference(num_tokens: int, num_experts: int, k: int, device: torch.device) -> None:
    logits = torch.randint(
        -3, 3, (num_tokens, num_experts), generator=torch.Generator().manual_seed(0)
    ).float()
    expected = reference.gate_topk(logits, k)
    found = gate_topk(logits.to(device), k)
    assert torch.equal(found[0].cpu(), expected[0])
    torch.testing.assert_close(found[1].cpu(), expected[1], atol=1e-6, rtol=1e-6)


def test_bad_arguments_are_named(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids are checked if the environment requests it; weights that were left on the host are
    refused."""
    case = MoeCase(4, 2, 5, 64, 32)
    on_host = inputs(case, layout=choose_layout(device), dtype=torch.bfloat16)
    values = on_device(on_host, device)
    with pytest.raises(ValueError, match=r"^gate_up.blocks must be on cuda"):
        fused_experts(*arguments(case, values._replace(gate_up=on_host.gate_up)))
    monkeypatch.setenv("CANTATA_CHECK_INDICES", "1")
    with pytest.raises(ValueError, match=r"^topk_ids "):
        fused_experts(*arguments(case, values._replace(topk_ids=values.topk_ids + 5)))


def test_both_layouts_of_sm_90_agree(device: torch.device) -> None:
    if choose_layout(device) != WGMMA:
        pytest.skip("not an sm_90")
    case = MoeCase(40, 4, 8, 2880, 2880)
    values = inputs(case, layout=NATURAL, dtype=torch.bfloat16)
    found, expected = (
        fused_experts(*arguments(case, on_device(values, device, layout))).cpu()
        for layout in (WGMMA, NATURAL)
    )
    assert_near(found, expected, 2**-7)
