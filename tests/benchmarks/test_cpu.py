"""The CPU benchmark's figures are right: operations and bytes of its tasks, the best of runs taken
in turn, ratios to the yardsticks."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import cpu
from benchmarks.cpu import (
    ExpertLayer,
    Task,
    attention_task,
    bandwidth_task,
    dense_tasks,
    dense_weights,
    gemm_task,
    measure,
    print_table,
    recorded,
    run_dense,
    sampling_tasks,
)
from kernels.cpu import native
from kernels.cpu.roofline import Gemm

pytestmark = pytest.mark.skipif(native.shared_library() is None, reason="the C++ library was not built")


def test_tasks_take_turns_and_the_first_run_does_not_count() -> None:
    calls: list[tuple[str, int]] = []
    tasks = [Task(name, lambda call, name=name: calls.append((name, call))) for name in "ab"]  # type: ignore[misc]
    results = measure(tasks, 1e-3)
    assert calls[:4] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert [task.name for task, _ in results] == ["a", "b"]
    assert all(0 <= best < 1 for _, best in results)


def test_ratios_are_to_the_yardsticks(capsys: pytest.CaptureFixture[str]) -> None:
    gemm = gemm_task(Gemm("bf16", 64, 1e9))
    assert (gemm.name, gemm.num_operations) == ("torch bf16 GEMM", 2 * 64**3)
    product = gemm.run(0)
    assert isinstance(product, torch.Tensor)
    assert (product.shape, product.dtype) == ((64, 64), torch.bfloat16)
    yardsticks = [
        (Task("read", print, num_bytes=20e9), 2.0),
        (Task("torch fp32 GEMM", print, num_operations=3e12), 1.0),
    ]
    others = [(Task("x", print, num_bytes=1e9, num_operations=3e11), 0.2), (Task("y", print), 0.1)]
    print_table("title", [*yardsticks, *others])
    out = capsys.readouterr().out
    assert "read bandwidth 10.0 GB/s, torch fp32 GEMM 3000 GFLOP/s" in out
    assert "| GFLOP/s | of torch fp32 GEMM |" in out
    assert "| x | 200.00 | 5.0 | 50% | 1500 | 50% |" in out
    assert "| y | 100.00 | - | - | - | - |" in out


def test_torch_runs_dense_layers_in_its_faster_data_type() -> None:
    """A product in the other one may take minutes."""
    tasks = [task for task in dense_tasks(1, "fp32") if task.name.startswith("torch ")]
    assert tasks[0].name == "torch fp32 [5120, 2880], 1 token"
    assert tasks[0].num_bytes == 4 * 5120 * 2880
    out = tasks[0].run(1)
    assert isinstance(out, torch.Tensor)
    assert out.dtype == torch.float32


def test_a_slow_task_ends_after_its_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(cpu, "time", SimpleNamespace(perf_counter=lambda: now[0], thread_time=lambda: now[0]))
    calls: list[str] = []
    shares: list[float] = []

    def task(name: str, took_s: float) -> Task:
        def run(call: int) -> None:
            calls.append(name)
            now[0] += took_s

        return Task(name, run)

    results = measure([task("slow", 100.0), task("middling", 1.5), task("fast", 0.25)], 1.0, shares.append)
    assert [best for _, best in results] == [100.0, 1.5, 0.25]
    assert [calls.count(name) for name in ("slow", "middling", "fast")] == [1, 3, 4]
    assert shares == sorted(shares)
    assert 0 < shares[-1] <= 1


def test_weights_and_experts_are_what_is_counted() -> None:
    read = bandwidth_task(32 << 20)
    assert read.run(0) == read.run(1) == 0  # an even number of equal words
    weights = dense_weights(48, 64, torch.int8, 1)
    assert len(weights) == 2
    assert run_dense(torch.ones(3, 64).bfloat16(), weights)(1).shape == (3, 48)
    layer = ExpertLayer(64, 32, 1)
    task = layer.task("experts", 5, 4)
    assert task.num_operations == 2 * 5 * 4 * 3 * 64 * 32
    assert 4 * layer.expert_bytes <= task.num_bytes <= 20 * layer.expert_bytes
    gate_up, down = layer.weights.gate_up, layer.weights.down
    assert layer.expert_bytes == gate_up.num_bytes // 32 + down.num_bytes // 32
    assert task.run(3).isfinite().all()  # type: ignore[attr-defined]


def test_recorded_calls_are_those_that_were_recorded() -> None:
    weights = dense_weights(48, 64, torch.int8, 3 * 48 * 64)
    run = run_dense(torch.randn(1, 64).bfloat16(), weights)
    replay = recorded(run, len(weights))
    for call in (2, 0, 1, 5):
        assert torch.equal(replay(call), run(call))
    assert not torch.equal(run(0), run(1))


def test_attention_counts_the_keys_that_are_seen() -> None:
    layers = torch.zeros(2, 2, 12, 16, 8, 64, dtype=torch.bfloat16)
    chunk = attention_task(layers, 1, 3, 40, None)
    assert (chunk.num_bytes, chunk.num_operations) == (0, 4 * (38 + 39 + 40) * 64 * 64)
    decodes = attention_task(layers, 2, 1, 40, 16)
    assert (decodes.num_bytes, decodes.num_operations) == (2 * 16 * 2 * 8 * 64 * 2, 4 * 2 * 16 * 64 * 64)
    assert all(decodes.run(call).shape == (2, 64, 64) for call in range(5))  # type: ignore[attr-defined]


def test_sampling_tasks_sample_rows_of_logits() -> None:
    tasks = sampling_tasks(300)
    assert len(tasks) == len({task.name for task in tasks}) == 16
    for task in tasks:
        tokens = task.run(5)
        num_rows = int(task.name.split()[0])
        assert task.num_bytes == num_rows * 300 * 4
        assert isinstance(tokens, torch.Tensor)
        assert tokens.shape == (num_rows,)
        assert all(0 <= token < 300 for token in tokens.tolist())
