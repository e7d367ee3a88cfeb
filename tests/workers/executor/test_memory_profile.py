"""The step that memory is profiled with is as large as any that the scheduler may plan, and the model can run it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.support.tiny_model import TINY, write_tiny_checkpoint
from workers.config import BLOCK_SIZE, EngineConfig, KVDtype, ParallelConfig, SchedulerConfig
from workers.executor import cuda_graph, memory_profile, rank
from workers.executor.cuda_graph import DecodeGraphs, GraphReport
from workers.executor.memory_profile import StepMemory, expected_graph_bytes, largest_batch, profile_step, run_largest_step, warm_up
from workers.executor.slots import DeviceSlots, SequenceSlots
from workers.model.checkpoint import load_model
from workers.model.gpt_oss import GptOss
from workers.parallel.collectives import Alone
from workers.parallel.shard import plan_shards

CPU = torch.device("cpu")
MIB = 1 << 20


@pytest.mark.parametrize(
    ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "num_tokens", "num_seqs"),
    [(5, 73, 100, 73, 5), (200, 30, 100, 30, 30), (3, 1000, 50, 150, 3)],
)
def test_the_largest_batch(max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int, num_tokens: int, num_seqs: int) -> None:
    batch = largest_batch(SchedulerConfig(max_num_seqs, max_num_batched_tokens), max_model_len, CPU)
    assert len(batch.token_ids) == len(batch.positions) == len(batch.slot_mapping_full) == num_tokens
    assert len(batch.context_lens) == len(batch.sample_indices) == num_seqs
    assert batch.context_lens.max() <= max_model_len
    assert batch.cu_seqlens_q.tolist() == [0, *batch.context_lens.cumsum(0).tolist()]
    assert (batch.positions[batch.sample_indices] == batch.context_lens - 1).all()
    assert batch.max_query_len == batch.context_lens.max()
    assert batch.block_table_full.shape[1] * BLOCK_SIZE > max_model_len


@pytest.mark.parametrize("kv_dtype", ["float32", "fp8_e4m3"])
def test_the_model_runs_it_and_samples_every_sequence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kv_dtype: KVDtype) -> None:
    model = load_model(write_tiny_checkpoint(tmp_path), TINY, dtype=torch.float32, device=CPU)
    sampled = []
    real = memory_profile.sample
    monkeypatch.setattr(memory_profile, "sample", lambda logits, batch: sampled.append((batch, real(logits, batch).token_ids)))
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
        ((100 * MIB, 3 * MIB), 10, 100 * MIB + 9 * 3 * MIB),
        ((100 * MIB, 0), 10, 109 * MIB),
        ((100 * MIB, -2 * MIB), 3, 102 * MIB),
        ((100 * MIB,), 1, 100 * MIB),
        ((0, 0), 2, 2 * MIB),
    ],
)
def test_the_memory_of_all_graphs_from_the_largest_two(taken: tuple[int, ...], num_graphs: int, expected: int) -> None:
    assert expected_graph_bytes(GraphReport(taken), num_graphs) == expected


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
    config = EngineConfig(path, dtype="float32", max_model_len=512, scheduler=SchedulerConfig(10_000), enforce_eager=eager)
    (shard,) = plan_shards(TINY, ParallelConfig())
    loaded = rank.Rank(config, TINY, shard, Alone(), device=torch.device("cuda", 0)).load()
    assert order == ["compile", f"profile with graphs {not eager}", "what is in use"]
    assert loaded.kv_memory.num_bytes == (900 - 100 - 30 - (0 if eager else 20)) * MIB
    assert "100.00 MiB in use, 30.00 MiB for activations and " in loaded.kv_memory.source


class FakeCuda:
    """A GPU that does the work at once, on one stream at a time, and has less memory after each capture."""

    def __init__(self, taken: list[int]) -> None:
        self.free = [sum(taken) - sum(taken[:count]) for count in range(len(taken) + 1)]
        self.streams: list[object] = []
        self.captured_on: list[object] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        @contextmanager
        def graph(captured: object, *, pool: object, stream: object, capture_error_mode: str) -> Iterator[None]:
            assert capture_error_mode == "thread_local"
            self.captured_on.append(stream)
            yield

        def new_stream(device: torch.device) -> SimpleNamespace:
            self.streams.append(SimpleNamespace(wait_stream=lambda other: None))
            return self.streams[-1]

        for name, value in {
            "Stream": new_stream,
            "current_stream": lambda device: SimpleNamespace(wait_stream=lambda other: None),
            "stream": lambda stream: nullcontext(),
            "synchronize": lambda device: None,
            "mem_get_info": lambda device: (self.free.pop(0), 0),
            "graph_pool_handle": object,
            "CUDAGraph": object,
            "graph": graph,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


@pytest.mark.parametrize("graphs", [False, True])
def test_the_profile_is_the_largest_step_s_peak_and_what_graphs_will_keep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graphs: bool
) -> None:
    """After cuBLAS was used on another thread, as the one that serves will use it."""
    model = load_model(write_tiny_checkpoint(tmp_path), TINY, dtype=torch.float32, device=CPU)
    cuda = FakeCuda([70 * MIB, 5 * MIB])
    cuda.install(monkeypatch)
    monkeypatch.setattr(cuda_graph, "_capture_stream", cache(cuda_graph._capture_stream.__wrapped__))
    threads: list[threading.Thread] = []
    for name, value in {
        "set_device": lambda device: threads.append(threading.current_thread()),
        "empty_cache": lambda: None,
        "memory_reserved": lambda device: 100 * MIB,
        "reset_peak_memory_stats": lambda device: None,
        "max_memory_reserved": lambda device: 130 * MIB,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    found = profile_step(model, SchedulerConfig(9, 64), 40, "float32", graphs=graphs)
    num_graphs = len(cuda_graph.graph_sizes(9))
    assert found == StepMemory(30 * MIB, (70 + (num_graphs - 1) * 5) * MIB if graphs else 0)
    assert len(cuda.captured_on) == (2 if graphs else 0)
    (thread,) = threads
    assert thread is not threading.current_thread()
    assert not thread.is_alive()


@pytest.mark.parametrize("limit", [None, 2])
def test_graphs_are_captured_from_the_largest_on_one_stream_and_their_memory_is_counted(
    monkeypatch: pytest.MonkeyPatch, limit: int | None
) -> None:
    """A stream for each graph would leave a cuBLAS workspace for each."""
    taken = [70, 5, 3, 2, 1][: limit or 5]
    cuda = FakeCuda(taken)
    cuda.install(monkeypatch)
    monkeypatch.setattr(cuda_graph, "_capture_stream", cache(cuda_graph._capture_stream.__wrapped__))
    slots = SequenceSlots(9, 40)
    batches = []
    graphs = DecodeGraphs(slots, DeviceSlots(slots, CPU), lambda batch: batches.append(batch) or batch.positions)
    assert graphs.sizes == (1, 2, 4, 8, 9)
    seen = []
    report = graphs.capture(lambda *progress: seen.append(progress), limit=limit)
    assert cuda_graph._capture_stream(CPU) is cuda.streams[0], "and for each capture"
    assert report.graph_bytes == tuple(taken)
    assert (report.num_graphs, report.memory_bytes) == (len(taken), sum(taken))
    assert [len(batch.token_ids) for batch in batches[::2]] == [9, 8, 4, 2, 1][: limit or 5], "each once to warm up and once captured"
    assert len(batches) == 2 * len(taken)
    assert len(cuda.streams) == 1
    assert cuda.captured_on == cuda.streams * len(taken)
    assert seen == [("capture graphs", done, len(taken)) for done in range(len(taken) + 1)]


def test_warming_up_runs_steps_of_every_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(write_tiny_checkpoint(tmp_path), TINY, dtype=torch.float32, device=CPU)
    sizes = []
    real = GptOss.forward
    monkeypatch.setattr(GptOss, "forward", lambda self, batch, caches: sizes.append(len(batch.token_ids)) or real(self, batch, caches))
    warmed = []
    monkeypatch.setattr(memory_profile, "warm_up_sampling", lambda vocab_size, device: warmed.append(vocab_size))
    warm_up(model, SchedulerConfig(7, 33), 100, "float32")
    assert sizes == [1, 2, 4, 8, 16, 32]
    assert warmed == [TINY.vocab_size]
