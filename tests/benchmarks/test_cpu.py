"""The CPU benchmark measures what it says: operations and bytes of its tasks, the best of runs taken in turn, ratios to the yardsticks."""

import pytest
import torch

from benchmarks.cpu import (
    ExpertLayer,
    Task,
    attention_task,
    bandwidth_task,
    dense_weights,
    measure,
    print_table,
    recorded,
    run_dense,
    sampling_tasks,
)
from kernels.cpu import native

pytestmark = pytest.mark.skipif(native.shared_library() is None, reason="the C++ library was not built")


def test_tasks_take_turns_and_the_first_run_does_not_count() -> None:
    calls: list[tuple[str, int]] = []
    tasks = [Task(name, lambda call, name=name: calls.append((name, call))) for name in "ab"]  # type: ignore[misc]
    results = measure(tasks, 0.0)
    assert calls[:4] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert [task.name for task, _ in results] == ["a", "b"]
    assert all(0 <= best < 1 for _, best in results)


def test_ratios_are_to_the_yardsticks(capsys: pytest.CaptureFixture[str]) -> None:
    yardsticks = [(Task("read", print, num_bytes=20e9), 2.0), (Task("GEMM", print, num_operations=3e12), 1.0)]
    print_table("title", [*yardsticks, (Task("x", print, num_bytes=1e9, num_operations=3e11), 0.2)])
    out = capsys.readouterr().out
    assert "read bandwidth 10.0 GB/s, torch bf16 GEMM 3000 GFLOP/s" in out
    assert "| x | 200.00 | 5.0 | 50% | 1500 | 50% |" in out


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
    assert layer.expert_bytes == layer.gate_up.num_bytes // 32 + layer.down.num_bytes // 32
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
