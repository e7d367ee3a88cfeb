"""The step that memory is profiled with is as large as any that the scheduler may plan, and the
model can run it."""

import threading
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from kernels.sampling import SampleOutput, SamplingBatch
from tests.support.fake_cuda import FakeCuda, Taken
from tests.support.tiny_model import TINY, write_tiny_checkpoint
from workers.config import BLOCK_SIZE, EngineConfig, KVDtype, ParallelConfig, SchedulerConfig
from workers.kv_cache.tensors import KV_TORCH_DTYPES
from workers.model.checkpoint import LoadOptions, load_model
from workers.model.gpt_oss import GptOss
from workers.parallel.collectives import Alone
from workers.parallel.shard import plan_shards
from workers.rank import memory_profile, rank
from workers.rank.memory_profile import (
    StepMemory,
    expected_graph_bytes,
    largest_batch,
    profile_step,
    run_largest_step,
    warm_up,
)
from workers.rank.recorded import cuda_graph
from workers.rank.recorded.cuda_graph import GraphReport

CPU = torch.device("cpu")
MIB = 1 << 20


@pytest.mark.parametrize(
    ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "num_tokens", "num_seqs"),
    [(5, 73, 100, 73, 5), (200, 30, 100, 30, 30), (3, 1000, 50, 150, 3)],
)
def test_the_largest_batch(
    max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int, num_tokens: int, num_seqs: int
) -> None:
    batch = largest_batch(SchedulerConfig(max_num_seqs, max_num_batched_tokens), max_model_len, CPU)
    assert len(batch.token_ids) == len(batch.positions) == len(batch.slot_mapping_full) == num_tokens
    assert len(batch.context_lens) == len(batch.sample_indices) == num_seqs
    assert batch.context_lens.max() <= max_model_len
    assert batch.cu_seqlens_q.tolist() == [0, *batch.context_lens.cumsum(0).tolist()]
    assert (batch.positions[batch.sample_indices] == batch.context_lens - 1).all()
    assert batch.max_query_len == batch.context_lens.max()
    assert batch.block_table_full.shape[1] * BLOCK_SIZE > max_model_len


@pytest.mark.parametrize("kv_dtype", ["float32", "fp8_e4m3"])
def test_the_model_runs_it_and_samples_every_sequence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kv_dtype: KVDtype
) -> None:
    options = LoadOptions(kv_dtype=KV_TORCH_DTYPES[kv_dtype])
    model = load_model(
        write_tiny_checkpoint(tmp_path), TINY, dtype=torch.float32, device=CPU, options=options
    )
    sampled = []
    operations = model.sampling.run

    def sample(logits: torch.Tensor, batch: SamplingBatch) -> SampleOutput:
        output = operations.sample(logits, batch)
        sampled.append((batch, output.token_ids))
        return output

    spied = replace(model.sampling, run=replace(operations, sample=sample))
    object.__setattr__(model, "sampling", spied)  # the model is frozen
    run_largest_step(model, SchedulerConfig(7, 300), 100, kv_dtype)
    ((batch, token_ids),) = sampled
    assert len(token_ids) == 7
    for part in fields(batch):
        assert getattr(batch, part.name) is not None, f"{part.name}: the worst is all at once"
    assert batch.num_top_logprobs > 0
    batch.check(7, TINY.vocab_size)


@pytest.mark.parametrize(
    ("taken", "num_graphs", "expected"),
    [
        (((100, 3), (2, 2)), 10, 100 + 9 * 3 + 10 * 2),
        (((100, 0), (0, 0)), 10, 110),
        (((100, 0), (0, 5000)), 10, 110),
        (((100, 0), (5000, 3)), 3, 109),
        (((100, 0), (-5000, 3)), 3, 103),
        (((100,), (4,)), 1, 104),
        (((0, 0), (0, 0)), 2, 2),
    ],
)
def test_the_memory_of_all_graphs_from_the_largest_two(
    taken: tuple[tuple[int, ...], tuple[int, ...]], num_graphs: int, expected: int
) -> None:
    """Memory is in MiB: (of the pool, of the driver). Memory that another process takes or frees
    meanwhile is no graph's."""
    pool, driver = (tuple(number * MIB for number in numbers) for numbers in taken)
    assert expected_graph_bytes(GraphReport(pool, driver), num_graphs) == expected * MIB


@pytest.mark.parametrize("eager", [False, True])
def test_a_gpu_s_cache_is_sized_after_kernels_are_compiled_by_what_the_profile_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eager: bool
) -> None:
    path = write_tiny_checkpoint(tmp_path)
    model = load_model(path, TINY, dtype=torch.float32, device=CPU)
    order: list[str] = []

    def profile(*args: object, graphs: bool) -> StepMemory:
        order.append(f"profile with graphs {graphs}")
        return StepMemory(activation_bytes=30 * MIB, graph_bytes=20 * MIB if graphs else 0)

    def free_and_total(device: torch.device) -> tuple[int, int]:
        order.append("what is in use")
        return 900 * MIB, 1000 * MIB

    for name, value in {
        "architecture": lambda device: "sm_90",
        "describe_device": str,
        "slow_paths": lambda choices, device: [],
        "load_model": lambda *args, **kwargs: model,
        "warm_up": lambda *args: order.append("compile"),
        "profile_step": profile,
    }.items():
        monkeypatch.setattr(rank, name, value)
    monkeypatch.setattr(rank, "not_capturable", lambda choices: [])
    monkeypatch.setattr(torch.cuda, "mem_get_info", free_and_total)
    config = EngineConfig(
        path, dtype="float32", max_model_len=512, scheduler=SchedulerConfig(10_000), enforce_eager=eager
    )
    (shard,) = plan_shards(TINY, ParallelConfig())
    loaded = rank.Rank(config, TINY, shard, Alone(), device=torch.device("cuda", 0)).load()
    assert order == ["compile", f"profile with graphs {not eager}", "what is in use"]
    assert loaded.kv_memory.num_bytes == (900 - 100 - 30 - (0 if eager else 20)) * MIB
    assert "100.00 MiB in use, 30.00 MiB for activations and " in loaded.kv_memory.source


@pytest.mark.parametrize("graphs", [False, True])
def test_the_profile_is_the_largest_step_s_peak_and_what_graphs_will_keep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graphs: bool
) -> None:
    """cuBLAS was used on another thread before, as the serving thread will use it."""
    model = load_model(write_tiny_checkpoint(tmp_path), TINY, dtype=torch.float32, device=CPU)
    cuda = FakeCuda([Taken(70 * MIB, 4 * MIB), Taken(5 * MIB, 2 * MIB)])
    cuda.install(monkeypatch)
    products: list[object] = []
    monkeypatch.setattr(
        cuda_graph, "multiply", lambda device: products.append((cuda.current, len(cuda.living)))
    )
    threads: list[threading.Thread] = []
    for name, value in {
        "set_device": lambda device: threads.append(threading.current_thread()),
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda device: None,
        "max_memory_reserved": lambda device: cuda.reserved + 30 * MIB,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    found = profile_step(model, SchedulerConfig(9, 64), 40, "float32", graphs=graphs)
    num_graphs = len(cuda_graph.graph_sizes(9))
    assert found == StepMemory(30 * MIB, (70 + (num_graphs - 1) * 5 + num_graphs * 2) * MIB if graphs else 0)
    assert len(cuda.captured_on) == (2 if graphs else 0)
    assert products == ([(cuda.captured_on[0], 0)] if graphs else []), (
        "cuBLAS's memory for the stream is in use, and no graph is any more"
    )
    (thread,) = threads
    assert thread is not threading.current_thread()
    assert not thread.is_alive()


def test_warming_up_runs_steps_of_every_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(write_tiny_checkpoint(tmp_path), TINY, dtype=torch.float32, device=CPU)
    sizes = []
    real = GptOss.forward
    monkeypatch.setattr(
        GptOss,
        "forward",
        lambda self, batch, caches: sizes.append(len(batch.token_ids)) or real(self, batch, caches),
    )
    warmed = []
    monkeypatch.setattr(
        memory_profile, "warm_up_sampling", lambda vocab_size, device: warmed.append(vocab_size)
    )
    warm_up(model, SchedulerConfig(7, 33), 100, "float32")
    assert sizes == [1, 2, 4, 8, 16, 32]
    assert warmed == [TINY.vocab_size]
