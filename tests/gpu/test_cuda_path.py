"""A rank on a CUDA device: the same tokens as on a CPU, launched ahead, through graphs, and over
two GPUs.

Written on machines without a GPU and not run on one yet. `make gpu-check` runs it.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels import attention, moe
from kernels.attention import reference as attention_reference
from kernels.moe import ExpertWeights
from kernels.moe import reference as moe_reference
from kernels.mxfp4 import choose_layout, from_natural, pack, to_natural
from tests.support.decode_plans import (
    GREEDY,
    MAX_MODEL_LEN,
    MAX_NUM_SEQS,
    MIXED,
    NUM_BLOCKS,
    ahead,
    check_drafts,
    plans,
    tokens,
    with_drafts,
)
from tests.support.tiny_model import TINY, write_tiny_checkpoint
from workers.config import BLOCK_SIZE, EngineConfig, SchedulerConfig
from workers.executor.inline import InlineExecutor
from workers.model.checkpoint import load_model
from workers.model.make_checkpoint import write_checkpoint
from workers.rank.device import usable_device
from workers.rank.kernel_table import model_kernels, not_capturable
from workers.rank.memory_profile import activation_bytes, profile_step
from workers.rank.recorded.cuda_graph import graph_sizes
from workers.rank.runner import Runner
from workers.rank.step_inputs import InputBuffers
from workers.request import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("models"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def new_runner(checkpoint: Path, device: torch.device) -> Runner:
    model = load_model(checkpoint, TINY, dtype=torch.float32, device=device)
    shape = (2, NUM_BLOCKS, BLOCK_SIZE, TINY.num_kv_heads, TINY.head_dim)
    caches = [torch.zeros(shape, device=device) for _ in TINY.layer_windows]
    return Runner(model, caches, max_num_seqs=MAX_NUM_SEQS, max_model_len=MAX_MODEL_LEN)


def test_products_are_exact_once_a_device_is_in_use() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    usable_device("cuda")
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction


def test_uploads_are_not_overwritten_while_the_gpu_is_behind(device: torch.device) -> None:
    inputs = InputBuffers(device)
    torch.cuda._sleep(200_000_000)
    uploaded = [inputs.upload([np.full(1000, number, dtype=np.int64)])[0] for number in range(12)]
    assert [tensor.unique().tolist() for tensor in uploaded] == [[number] for number in range(12)]


def test_the_same_tokens_as_on_a_cpu_with_steps_launched_ahead(
    checkpoint: Path, device: torch.device
) -> None:
    steps = plans(MIXED)
    on_cpu = new_runner(checkpoint, CPU)
    expected = [on_cpu.step(plan) for plan in steps]
    actual = ahead(new_runner(checkpoint, device), steps)
    assert tokens(actual) == tokens(expected)
    for left, right in zip(actual, expected, strict=True):
        for seq_id, entry in right.logprobs.items():
            assert left.logprobs[seq_id].logprob == pytest.approx(entry.logprob, abs=1e-4)


@pytest.mark.parametrize("eager", [False, True])
def test_drafts_and_log_probabilities_of_prompts(checkpoint: Path, device: torch.device, eager: bool) -> None:
    steps = plans((GREEDY, GREEDY))
    on_cpu = new_runner(checkpoint, CPU)
    answers = [on_cpu.step(plan) for plan in steps[:4]]
    drafted = with_drafts(steps, answers)
    on_cpu = new_runner(checkpoint, CPU)
    expected = [on_cpu.step(plan) for plan in drafted]
    runner = new_runner(checkpoint, device)
    if not eager:
        runner.capture_graphs(lambda phase, done, total: None)
    check_drafts([runner.step(plan) for plan in drafted], expected, answers)


@pytest.mark.parametrize("eager", [False, True])
def test_an_executor_from_start_to_answer(checkpoint: Path, eager: bool) -> None:
    """The start is an engine's: kernels compiled, memory profiled, the cache sized by it, graphs
    captured; the tokens are a CPU's."""
    steps = plans(MIXED)
    config = EngineConfig(
        checkpoint,
        dtype="float32",
        device="cuda",
        max_model_len=MAX_MODEL_LEN,
        scheduler=SchedulerConfig(MAX_NUM_SEQS, 64),
        enforce_eager=eager,
    )
    on_cpu = new_runner(checkpoint, CPU)
    expected = [on_cpu.step(plan) for plan in steps]
    executor = InlineExecutor(config, TINY)
    info = executor.start()
    try:
        phases = [*info.phases_s]
        captured = [] if eager else ["capture graphs"]
        assert phases == [
            "load weights",
            "compile kernels",
            "profile memory",
            "allocate KV cache",
            "warm up",
            *captured,
        ]
        assert min(info.num_full_blocks, info.num_sliding_blocks) >= NUM_BLOCKS
        assert all(kernel.startswith(("Triton", "cuBLAS", "hipBLASLt")) for kernel in info.kernels.values())
        futures = [executor.execute(plan) for plan in steps]
        assert tokens([future.result(60) for future in futures]) == tokens(expected)
    finally:
        executor.shutdown()


def test_graph_is_eager_with_the_kernels_that_serve(checkpoint: Path, device: torch.device) -> None:
    blocking = not_capturable(model_kernels(load_model(checkpoint, TINY, dtype=torch.float32, device=device)))
    if blocking:
        pytest.skip(f"no graph can hold the kernels for {' and '.join(blocking)}")
    check_graphs(checkpoint, device)


def check_graphs(checkpoint: Path, device: torch.device) -> None:
    for sampling in (MIXED, MIXED[:3], MIXED[:1]):
        steps = plans(sampling)
        eager = ahead(new_runner(checkpoint, device), steps)
        runner = new_runner(checkpoint, device)
        seen: list[tuple[str, int, int]] = []
        report = runner.capture_graphs(lambda *progress, seen=seen: seen.append(progress))
        sizes = graph_sizes(MAX_NUM_SEQS)
        assert seen == [("capture graphs", done, len(sizes)) for done in range(len(sizes) + 1)]
        assert report.num_graphs == len(sizes)
        assert tokens(ahead(runner, steps)) == tokens(eager)


def test_graphs_outlive_those_of_another_engine(checkpoint: Path, device: torch.device) -> None:
    """Newer versions of torch free a stream's cuBLAS memory with a graph. What is freed here goes
    back to the driver, and is filled."""
    steps = plans(MIXED[:3])
    expected = tokens(ahead(new_runner(checkpoint, device), steps))
    first, second = new_runner(checkpoint, device), new_runner(checkpoint, device)
    for runner in (first, second):
        runner.capture_graphs(lambda phase, done, total: None)
    del runner, second
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    filled = [torch.full((32 << 20,), 255, dtype=torch.uint8, device=device) for _ in range(8)]
    assert tokens(ahead(first, steps)) == expected
    del filled


def test_the_profiled_step_takes_memory(checkpoint: Path, device: torch.device) -> None:
    model = load_model(checkpoint, TINY, dtype=torch.float32, device=device)
    small, large = SchedulerConfig(4, 64), SchedulerConfig(4, 4096)
    # compiles, and has libraries allocate what they keep
    activation_bytes(model, large, 4096, "float32")
    assert (
        0 < activation_bytes(model, small, 4096, "float32") < activation_bytes(model, large, 4096, "float32")
    )


def test_the_profile_foresees_what_graphs_keep(checkpoint: Path, device: torch.device) -> None:
    """The profile also leaves nothing in memory. The graphs are tiny: the driver rounds the memory
    of each to its pages, so half as much more is allowed."""
    model = load_model(checkpoint, TINY, dtype=torch.float32, device=device)
    scheduler = SchedulerConfig(MAX_NUM_SEQS, 64)
    profile_step(model, scheduler, MAX_MODEL_LEN, "float32", graphs=True)  # as above
    before = torch.cuda.memory_reserved(device)
    foreseen = profile_step(model, scheduler, MAX_MODEL_LEN, "float32", graphs=True)
    assert torch.cuda.memory_reserved(device) == before
    assert profile_step(model, scheduler, MAX_MODEL_LEN, "float32", graphs=False).graph_bytes == 0
    report = new_runner(checkpoint, device).capture_graphs(lambda phase, done, total: None)
    assert report.memory_bytes <= 1.5 * foreseen.graph_bytes


def test_attention_is_the_reference(device: torch.device) -> None:
    """fp32 sums in another order: 1e-4 on a GPU that may use TF32 for none of them; bf16 2e-2."""
    generator = torch.Generator().manual_seed(0)
    lengths, queries = (1, 127, 128, 129, 1000), (1, 5, 128, 1, 40)
    table = torch.randperm(5 * 63, generator=generator).view(5, 63).to(torch.int32)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        for window in (None, 128):
            cache = torch.randn(2, 5 * 63, BLOCK_SIZE, 2, 64, generator=generator).to(dtype)
            q = torch.randn(sum(queries), 6, 64, generator=generator).to(dtype)
            sinks = torch.randn(6, generator=generator)
            contexts = torch.tensor(
                [max(pair) for pair in zip(lengths, queries, strict=True)], dtype=torch.int32
            )
            cu_seqlens = torch.tensor([0, *queries]).cumsum(0).to(torch.int32)
            args = (q, cache, table, contexts, cu_seqlens, sinks)
            expected = attention_reference.paged_attention(*args, scale=0.125, window=window)
            actual = attention.paged_attention(*(arg.to(device) for arg in args), scale=0.125, window=window)
            torch.testing.assert_close(actual.cpu(), expected, atol=tolerance, rtol=tolerance)


def test_experts_are_the_reference(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(1)
    gate_up, down = (
        torch.randn(5, 192, 64, generator=generator) / 8,
        torch.randn(5, 64, 96, generator=generator) / 8,
    )
    biases = torch.randn(5, 192, generator=generator), torch.randn(5, 64, generator=generator)
    packed = pack(gate_up), pack(down)
    topk_ids, topk_weights = moe.gate_topk(torch.randn(33, 5, generator=generator), 2)
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 5e-2)):
        x = torch.randn(33, 64, generator=generator).to(dtype)
        held = ExpertWeights(packed[0], biases[0], packed[1], biases[1], 7.0, 1.702, num_experts=5)
        expected = moe_reference.fused_experts(x, topk_ids, topk_weights, held)
        on_gpu = [
            from_natural(*(part.to(device) for part in to_natural(weights)), choose_layout(device))
            for weights in packed
        ]
        bias_gate_up, bias_down = (bias.to(device) for bias in biases)
        chosen = topk_ids.to(device), topk_weights.to(device)
        there = ExpertWeights(on_gpu[0], bias_gate_up, on_gpu[1], bias_down, 7.0, 1.702, num_experts=5)
        actual = moe.fused_experts(x.to(device), *chosen, there)
        torch.testing.assert_close(actual.cpu(), expected, atol=tolerance, rtol=tolerance)


def test_two_gpus_answer_as_one(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 GPUs, torch finds {torch.cuda.device_count()}")
    from workers.engine.llm import LLM  # here, since it needs more packages than one GPU's tests

    even = replace(TINY, num_kv_heads=2)
    write_checkpoint(tmp_path / "even", even, seed=2)
    greedy = SamplingParams(temperature=0, seed=0, max_tokens=24, ignore_eos=True)
    prompts = [list(range(1, 5 + 9 * index)) for index in range(5)]
    answers = []
    for num_ranks in (1, 2):
        with LLM(
            tmp_path / "even",
            dtype="float32",
            device="cuda",
            max_num_seqs=4,
            kv_cache_bytes=8 << 20,
            tensor_parallel_size=num_ranks,
        ) as llm:
            answers.append(
                [output.outputs[0].token_ids for output in llm.generate(prompts, greedy, use_tqdm=False)]
            )
    assert answers[1] == answers[0]
