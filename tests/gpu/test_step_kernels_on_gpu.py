"""Norms, YaRN tables, embedding, gate and sampling by compiled Triton kernels, against their
references on a CPU, and in CUDA graphs.

Written on machines without a GPU and not run on one yet. `make gpu-check` runs it.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.automaton import device as automaton_device
from kernels.embedding import embed
from kernels.linear import linear
from kernels.linear import reference as linear_reference
from kernels.pointwise import add_rms_norm, rms_norm, yarn_cos_sin
from kernels.pointwise import reference as pointwise_reference
from kernels.sampling import SampleOutput, SamplingBatch, sample
from kernels.sampling import reference as sampling_reference
from kernels.slots import read_slots
from kernels.slots import reference as slots_reference
from tests.support.automaton_cases import AutomatonSteps, follow_limits
from tests.support.sampling_cases import assert_same, on_device, random_batch, random_logits
from tests.support.slot_cases import SLOT_CASES, SlotCase

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]

VOCAB = 201_088
GPT_OSS = {
    "theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 4096,
}


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def on_cpu(output: SampleOutput) -> SampleOutput:
    parts = (output.token_ids, output.logprobs, output.top_ids, output.top_logprobs)
    return SampleOutput(*(None if part is None else part.cpu() for part in parts))  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [1, 7, 128, 1025, 2880])
def test_norms(device: torch.device, width: int) -> None:
    """One rounding to bf16 may go the other way."""
    x, delta, weight = random(5, width), random(5, width, seed=1), random(width, seed=2)
    expected = pointwise_reference.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(
        rms_norm(x.to(device), weight.to(device), 1e-5).cpu(), expected, atol=2**-7, rtol=2**-7
    )
    wanted = pointwise_reference.add_rms_norm(x, delta, weight, 1e-5)
    total, normed = add_rms_norm(x.to(device), delta.to(device), weight.to(device), 1e-5)
    assert torch.equal(total.cpu(), wanted[0])
    torch.testing.assert_close(normed.cpu(), wanted[1], atol=2**-7, rtol=2**-7)


def test_yarn_tables_up_to_the_last_position(device: torch.device) -> None:
    positions = torch.arange(0, 131072, 61)
    found = yarn_cos_sin(positions.to(device), 64, truncate=False, **GPT_OSS)
    expected = pointwise_reference.yarn_cos_sin(positions, 64, truncate=False, **GPT_OSS)
    for table, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(table.cpu(), wanted, atol=2.4e-7, rtol=0)


def test_embedding(device: torch.device) -> None:
    weight, ids = random(500, 2880), torch.tensor([0, 99, 100, 599, 600, 10**6, 350])
    found = embed(ids.to(device), weight.to(device), 100).cpu()
    local = ids - 100
    here = (local >= 0) & (local < 500)
    assert torch.equal(found, torch.where(here[:, None], weight[local.clamp(0, 499)], 0))


@pytest.mark.parametrize("case", [*SLOT_CASES, SlotCase(300, 256, 257, 8193, 8193)], ids=str)
def test_reads_by_slot(device: torch.device, case: SlotCase) -> None:
    arguments = case.inputs()
    found = read_slots(*(tensor.to(device) for tensor in arguments), case.num_blocks)
    for ours, theirs in zip(found, slots_reference.read_slots(*arguments, case.num_blocks), strict=True):
        assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("tokens", [1, 7, 8, 64, 257])
def test_gate(device: torch.device, tokens: int) -> None:
    x, weight, bias = (
        random(tokens, 2880),
        random(128, 2880, dtype=torch.float32, seed=1),
        random(128, dtype=torch.float32, seed=2),
    )
    found = linear(x.to(device), weight.to(device), bias.to(device)).cpu()
    torch.testing.assert_close(found, linear_reference.linear(x, weight, bias), atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize(
    "parts",
    [
        "",
        "k",
        "p",
        "k p m",
        "automaton",
        "bias penalties automaton allowed bits forbidden logprobs",
        "k p m bias penalties logprobs",
    ],
)
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (3, 8191), (3, 8193), (9, 20_000), (4, VOCAB)])
def test_the_reference_s_tokens(device: torch.device, rows: int, vocab: int, parts: str) -> None:
    logits, batch = random_logits(rows, vocab, seed=rows), random_batch(rows, vocab, seed=vocab, parts=parts)
    moved = on_device(batch, device)
    assert_same(on_cpu(sample(logits.to(device), moved)), sampling_reference.sample(logits, batch))
    if batch.automaton is not None and moved.automaton is not None:
        assert torch.equal(moved.automaton.places.cpu(), batch.automaton.places)


def test_automata(device: torch.device) -> None:
    """Sequences that come and go, drafts and limits, as on the host."""

    @settings(deadline=None, max_examples=100, derandomize=True, database=None)
    @given(st.data())
    def follow(data: st.DataObject) -> None:
        AutomatonSteps(automaton_device.mask, automaton_device.advance, device).run(data)

    follow()
    follow_limits(automaton_device.mask, automaton_device.advance, device)


def test_sampling_in_a_graph(device: torch.device) -> None:
    """The graph's tokens follow the logits and parameters that are in its inputs when it is
    replayed."""
    rows = 5
    batch = on_device(random_batch(rows, VOCAB, seed=1), device)
    logits = random_logits(rows, VOCAB, seed=1).to(device)
    sample(logits, batch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = sample(logits, batch)
    for seed in (2, 3):
        logits.copy_(random_logits(rows, VOCAB, seed=seed))
        assert batch.output_positions is not None
        batch.output_positions.add_(1)
        graph.replay()
        assert_same(on_cpu(output), on_cpu(sample(logits, batch)))


def test_greedy_and_empty(device: torch.device) -> None:
    logits = random_logits(64, VOCAB)
    assert torch.equal(sample(logits.to(device), SamplingBatch()).token_ids.cpu(), logits.argmax(-1))
    assert sample(logits[:0].to(device), SamplingBatch()).token_ids.shape == (0,)
    batch = replace(SamplingBatch(), logprob_rows=torch.arange(3, device=device), num_top_logprobs=20)
    expected = sampling_reference.sample(logits, replace(batch, logprob_rows=torch.arange(3)))
    assert_same(on_cpu(sample(logits.to(device), batch)), expected)
