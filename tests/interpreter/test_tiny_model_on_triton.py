"""The tiny model served through Triton kernels: tokens, log probabilities and launches against the
torch references."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from kernels import backend
from kernels.cpu import dense as cpu_dense
from kernels.cpu import linear as cpu_linear
from kernels.cpu import native
from kernels.linear import reference as linear_reference
from kernels.mxfp4 import NATURAL, WGMMA
from kernels.sampling import choose
from tests.interpreter.interpreter import recorded_launches
from tests.interpreter.launches import LaunchCounter, NoHostReads
from tests.support.checkpoint_formats import write_bf16
from tests.support.decode_plans import (
    GREEDY,
    MAX_MODEL_LEN,
    MAX_NUM_SEQS,
    MIXED,
    NUM_BLOCKS,
    check_drafts,
    plans,
    with_drafts,
)
from tests.support.model_steps import PagedSequences
from tests.support.tiny_model import TINY, write_tiny_checkpoint
from workers.config import BLOCK_SIZE, Dtype
from workers.constraint.automaton import AutomatonState, TokenAutomaton
from workers.constraint.codec import Constraint
from workers.engine.llm import LLM, RequestOutput
from workers.model import expert_loader
from workers.model.checkpoint import load_model
from workers.parallel.collectives import Alone
from workers.rank.runner import Runner
from workers.request import SamplingParams

PROMPTS = [[5, 6, 7], list(range(10, 43)), [9] * 17, [3, 1, 4, 1, 5], [2]]
"""One is longer than the window of the sliding layer and than a chunk of the prefill."""
SAMPLING = [
    SamplingParams(max_tokens=5, temperature=0, ignore_eos=True),
    SamplingParams(max_tokens=4, temperature=0, seed=1, logprobs=3, ignore_eos=True),
    SamplingParams(max_tokens=5, temperature=1.3, seed=2**63 + 5, ignore_eos=True),
    SamplingParams(max_tokens=4, temperature=0.9, top_p=0.8, min_p=0.01, seed=7, ignore_eos=True),
    SamplingParams(
        max_tokens=4,
        temperature=0.7,
        top_k=9,
        seed=8,
        repetition_penalty=1.3,
        logit_bias=((11, 2.5),),
        min_tokens=2,
    ),
]


@contextmanager
def on_references() -> Iterator[None]:
    """Run torch alone: neither Triton nor the C++ library."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(backend, "_interpreting", lambda: False)
        patched.setattr(native, "shared_library", lambda: None)
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def one_pass_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "TILE", choose.SKIP)


def loaded(checkpoint: Path, dtype: Dtype) -> LLM:
    return LLM(
        checkpoint,
        dtype=dtype,
        max_model_len=64,
        max_num_seqs=4,
        max_num_batched_tokens=32,
        kv_cache_bytes=1 << 20,
    )


def generate(checkpoint: Path, dtype: Dtype) -> list[RequestOutput]:
    with loaded(checkpoint, dtype) as llm:
        return llm.generate(PROMPTS, SAMPLING, use_tqdm=False)


def test_the_same_tokens(checkpoint: Path) -> None:
    """fp32: sums in another order, so log probabilities agree to 1e-4, and the tokens of these
    seeds are the same."""
    with on_references():
        expected = generate(checkpoint, "float32")
    with recorded_launches() as names:
        found = generate(checkpoint, "float32")
    assert [output.outputs[0].token_ids for output in found] == [
        output.outputs[0].token_ids for output in expected
    ]
    assert len({output.outputs[0].token_ids for output in found}) == len(PROMPTS)
    for ours, theirs in zip(
        found[1].outputs[0].logprobs or (), expected[1].outputs[0].logprobs or (), strict=True
    ):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]
    assert {
        "add_rms_norm_kernel",
        "expert_matmul_natural",
        "search_kernel",
        "pick_kernel",
        "logprobs_kernel",
    } <= set(names)


@pytest.mark.parametrize("layout", [NATURAL, WGMMA])
def test_logits_in_bf16(checkpoint: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers, each rounded to 8 bits of mantissa at a dozen places: 2 % of the largest
    logit."""
    with on_references(), loaded(checkpoint, "bfloat16") as llm:
        expected = llm.logits(PROMPTS[1])
    monkeypatch.setattr(expert_loader, "choose_layout", lambda device: layout)
    with recorded_launches() as names, loaded(checkpoint, "bfloat16") as llm:
        found = llm.logits(PROMPTS[1])
    assert {NATURAL: "expert_matmul_natural", WGMMA: "expert_matmul_wgmma"}[layout] in names
    torch.testing.assert_close(found, expected, atol=0.02 * float(expected.abs().max()), rtol=0)


def test_logits_of_experts_in_bf16(checkpoint: Path, tmp_path: Path) -> None:
    """A fine-tune that was not quantised has such experts; the allowance is the same."""
    dense = write_bf16(checkpoint, tmp_path / "bf16", TINY)
    with on_references(), loaded(dense, "bfloat16") as llm:
        expected = llm.logits(PROMPTS[1])
    with recorded_launches() as names, loaded(dense, "bfloat16") as llm:
        assert "dense bfloat16" in llm.info.kernels["experts"]
        found = llm.logits(PROMPTS[1])
    assert names.count("expert_matmul_natural") >= 4
    torch.testing.assert_close(found, expected, atol=0.02 * float(expected.abs().max()), rtol=0)


MATMULS = ["expert_matmul_natural", "expert_matmul_natural"]
AROUND_ATTENTION = [
    ["linear"],
    [
        "linear",
        "add_rms_norm_kernel",
        "narrow_linear_kernel",
        "choose_experts",
        *MATMULS,
        "add_slots_rms_norm",
    ],
]
"""Launches of a layer that decodes. RoPE with the KV store and attention are between the dense
layers."""


@pytest.fixture
def runner(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    """Return the runner of a bf16 model that works as on a GPU: dense layers are one call of a BLAS
    each, indices go unchecked, and results are not waited for."""
    monkeypatch.setattr(cpu_dense, "can_run", lambda device, dtype: False)
    monkeypatch.setattr(cpu_linear, "can_run", lambda x: False)
    monkeypatch.setattr(linear_reference, "linear", functional.linear)
    model = load_model(checkpoint, TINY, dtype=torch.bfloat16, device=torch.device("cpu"))
    shape = (2, NUM_BLOCKS, BLOCK_SIZE, TINY.num_kv_heads, TINY.head_dim)
    caches = [torch.zeros(shape, dtype=torch.bfloat16) for _ in model.layers]
    runner = Runner(model, caches, max_num_seqs=MAX_NUM_SEQS, max_model_len=MAX_MODEL_LEN)
    monkeypatch.setattr(runner, "_pending", lambda *args: None)
    for name, module in list(sys.modules.items()):
        if name.startswith("kernels.") and hasattr(module, "checks_indices"):
            monkeypatch.setattr(module, "checks_indices", lambda: False)
    return runner


EVEN = TokenAutomaton((AutomatonState(allowed=tuple(range(0, 100, 2))),))


@pytest.mark.parametrize("constraint", [None, Constraint.of(EVEN)], ids=["free", "constrained"])
def test_launches_of_a_decode_step(runner: Runner, constraint: Constraint | None) -> None:
    prefill, decode = plans((GREEDY, GREEDY), constraint)[:2]
    runner.launch(prefill)
    with LaunchCounter() as counter:
        runner.launch(decode)
    launches = counter.launches
    before, after = AROUND_ATTENTION
    first = launches.index("linear")
    per_layer = launches.index(
        "add_slots_rms_norm", launches.index("add_slots_rms_norm") + 1
    ) - launches.index("add_slots_rms_norm")
    assert launches[:first] == ["read_slots_kernel", "yarn_kernel", "embed_kernel", "rms_norm_kernel"]
    assert per_layer <= 12
    for index in range(TINY.num_layers):
        layer = launches[first + index * per_layer : first + (index + 1) * per_layer]
        assert layer[: len(before)] == before
        assert layer[-len(after) :] == after
    ends = launches[first + TINY.num_layers * per_layer :]
    mask, advance = ([], []) if constraint is None else (["mask_kernel"], ["advance_kernel"])
    sampling = [*mask, "chunk_best_kernel", "greedy_kernel", *advance]
    assert ends == ["linear", "to", *sampling, "index_copy_"]


def new_runner(checkpoint: Path) -> Runner:
    model = load_model(checkpoint, TINY, dtype=torch.float32, device=torch.device("cpu"))
    shape = (2, NUM_BLOCKS, BLOCK_SIZE, TINY.num_kv_heads, TINY.head_dim)
    return Runner(model, [torch.zeros(shape) for _ in model.layers], max_num_seqs=2, max_model_len=64)


def test_drafts_and_log_probabilities_of_prompts(checkpoint: Path) -> None:
    steps = plans((GREEDY, GREEDY))
    with on_references():
        runner = new_runner(checkpoint)
        answers = [runner.step(plan) for plan in steps[:4]]
        drafted = with_drafts(steps, answers)
        runner = new_runner(checkpoint)
        expected = [runner.step(plan) for plan in drafted]
    with recorded_launches() as names:
        runner = new_runner(checkpoint)
        found = [runner.step(plan) for plan in drafted]
    check_drafts(found, expected, answers)
    assert {"read_slots_kernel", "logprobs_kernel", "greedy_kernel"} <= set(names)


class OneOfTwo(Alone):
    """The collectives of one of two ranks; the other adds nothing."""

    size = 2


def test_a_rank_alone_has_the_bits_of_one_that_adds_up_first(checkpoint: Path) -> None:
    """Alone, the experts' sum and the norm after it are one launch; with others an all-reduce
    stands between."""
    hidden = []
    for collectives, launches in ((Alone(), {"add_slots_rms_norm"}), (OneOfTwo(), {"add_slots"})):
        model = load_model(
            checkpoint, TINY, dtype=torch.bfloat16, device=torch.device("cpu"), collectives=collectives
        )
        with recorded_launches() as names:
            hidden.append(torch.cat(list(PagedSequences(model, 20).step({0: range(5, 38), 1: [7]}).values())))
        assert {name for name in names if name.startswith("add_slots")} == launches
    assert torch.equal(*hidden)


def test_a_step_reads_nothing_back(runner: Runner) -> None:
    sampling = (
        *MIXED[:2],
        SamplingParams(temperature=0.7, top_k=5, min_p=0.02, seed=3, logit_bias=((4, 2.0),), logprobs=2),
    )
    for plan in plans(sampling, Constraint.of(EVEN))[:3]:
        with NoHostReads():
            runner.launch(plan)
