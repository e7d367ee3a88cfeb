"""The report of a GPU machine: its arithmetic, its tables, and that a part which fails or hangs leaves the others their figures."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_check, gpu_parts
from benchmarks.decode_batches import (
    RESERVE_BYTES,
    Batch,
    Decoder,
    batches_bytes,
    block_tables,
    decode_step_bytes,
    random_caches,
    what_fits,
)
from benchmarks.gpu_parts import Options, measure_device, measure_prefill, measure_sampling, measure_step, prefill_flops
from benchmarks.gpu_report import report
from benchmarks.gpu_tests import run_tests, split
from benchmarks.random_model import random_model
from kernels.mxfp4 import choose_layout
from tests.support.gpu_parts import measured
from tests.support.tiny_model import TINY
from workers.config import ParallelConfig
from workers.executor.runner import Runner
from workers.model.make_checkpoint import preset_config
from workers.model.sizes import count_parameters, rank_bytes
from workers.parallel.shard import plan_shards

CPU = torch.device("cpu")
OPTIONS = Options(CPU, None, "tiny", batch_sizes=(1, 3), contexts=(40,), steps=2, prompts=(20,))


def test_bytes_of_a_decode_step() -> None:
    model = replace(TINY, num_experts=10, num_experts_per_token=2, layer_windows=(24, None, 24), num_layers=3)
    (shard,) = plan_shards(model, ParallelConfig())
    sizes = rank_bytes(model, shard, "bfloat16")
    dense = sizes.total - sizes.experts - sizes.embedding
    kv_of_a_sequence = 2 * (24 + 100 + 24) * 3 * 8 * 2
    assert decode_step_bytes(model, shard, "bfloat16", 1, 100) == pytest.approx(dense + 0.2 * sizes.experts + kv_of_a_sequence)
    assert decode_step_bytes(model, shard, "bfloat16", 2, 100) == pytest.approx(dense + 0.36 * sizes.experts + 2 * kv_of_a_sequence)
    assert decode_step_bytes(model, shard, "bfloat16", 1, 10) == pytest.approx(dense + 0.2 * sizes.experts + 2 * 3 * 10 * 3 * 8 * 2)


def test_products_of_a_prompt() -> None:
    """One token uses the active parameters and sees one key a layer; of 30, the last of a window of 24 sees 24."""
    active = count_parameters(TINY)[1]
    assert prefill_flops(TINY, 1) == 2 * active + 4 * 6 * 8 * 2
    pairs = 30 * 31 // 2 + sum(min(position + 1, 24) for position in range(30))
    lm_head = TINY.vocab_size * TINY.hidden_size
    assert prefill_flops(TINY, 30) == 2 * 30 * (active - lm_head) + 2 * lm_head + 4 * 6 * 8 * pairs


def test_a_gpu_of_80_gb_has_room_for_these_batches_beside_120b() -> None:
    config, mib = preset_config("120b"), 2**20
    (shard,) = plan_shards(config, ParallelConfig())
    free = 79_000 * mib - rank_bytes(config, shard, "bfloat16").total
    asked = [Batch(size, context) for context in (1024, 8192) for size in (1, 8, 64, 256)]
    fits = what_fits(config, asked, 56, 2, free)
    assert [(batch.size, batch.context) for batch in fits] == [(1, 1024), (8, 1024), (64, 1024), (256, 1024), (1, 8192), (8, 8192)]
    assert not what_fits(config, asked, 56, 2, 4 << 30)


def test_a_cache_is_as_large_as_was_counted_and_no_two_sequences_share_a_block() -> None:
    config = replace(TINY, layer_windows=(24, None, 24), num_layers=3)
    model = random_model(config, CPU, choose_layout(CPU), dtype=torch.bfloat16)
    batches = [Batch(3, 100), Batch(5, 30)]
    caches = random_caches(model, batches, 10)
    most = max(batch.size for batch in batches)
    beside = 3 * most * config.vocab_size * 4 + 2 * most * config.num_heads * 64 * config.head_dim * 4
    assert batches_bytes(config, batches, 10, 2) == sum(cache.nbytes for cache in caches) + beside
    for batch in batches:
        for tables, cache in zip(block_tables(config, batch, 10), (caches[1], caches[0]), strict=True):
            used = [set(table) for table in tables]
            assert sum(map(len, used)) == len(set().union(*used))
            assert min(map(min, used)) == 1
            assert max(map(max, used)) < cache.shape[1]
    (sliding,) = block_tables(config, Batch(1, 100), 0)[1]
    assert all(len(set(sliding[at : at + 3])) == 3 for at in range(len(sliding) - 2)), "a window of 24 touches three blocks"


def test_batches_decode_one_after_the_other() -> None:
    model = random_model(TINY, CPU, choose_layout(CPU), dtype=torch.float32)
    batches = [Batch(4, 100), Batch(3, 90)]
    decoder = Decoder(Runner(model, random_caches(model, batches, 10), max_num_seqs=4, max_model_len=120), TINY, 3)
    for batch in batches:
        took = decoder.time(batch)
        assert took.seconds > took.launch_s > 0


def test_a_random_model_has_the_sizes_that_were_counted_and_finite_logits() -> None:
    model = random_model(TINY, CPU, choose_layout(CPU), dtype=torch.float32)
    every_expert = decode_step_bytes(TINY, model.shard, "float32", 10**6, 0)
    assert every_expert == pytest.approx(model.weight_bytes - model.embedding.nbytes)
    logits = model.compute_logits(torch.randn(3, TINY.hidden_size))
    assert logits is not None
    assert logits.isfinite().all()
    assert 0.2 < logits.std() < 5


def test_parts_make_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_parts, "_bandwidth", lambda device: 1e9)
    found = {
        "device": measured(measure_device, OPTIONS),
        "step": measured(measure_step, OPTIONS),
        "prefill": measured(measure_prefill, OPTIONS),
        "sampling": measured(measure_sampling, OPTIONS),
        "kernels": {"skipped": "no Triton kernels run here"},
        "tests": {"summary": "3 passed of 3", "problems": ["skipped 1: needs 2 GPUs"], "printed": ["a line"]},
    }
    assert not any("failures" in result for result in found.values())
    text = report(json.loads(json.dumps(found)))
    for name in ("device", "prefill"):
        gemm = found[name]["gemm"]
        assert gemm["dtype"] in ("fp32", "bf16")
        assert f"a {gemm['dtype']} product of {gemm['size']} x {gemm['size']} matrices reaches" in text
    assert "| 3 | 40 |" in text
    assert "No room for" not in text
    assert "| 20 |" in text
    assert "| way | 1 | 3 |" in text
    assert "**kernels: no Triton kernels run here**" in text
    assert "- skipped 1: needs 2 GPUs" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith(("| 1 |", "| 3 |"))}) == 1


def test_batches_without_room_are_named_and_none_at_all_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = preset_config("tiny")
    (shard,) = plan_shards(config, ParallelConfig())
    weights = rank_bytes(config, shard, "bfloat16").total
    options = replace(OPTIONS, batch_sizes=(1, 1000))
    for large, fits in ((False, 1), (True, 2)):
        room = batches_bytes(config, [Batch(1000 if large else 999, 40)], options.num_steps, 2)
        monkeypatch.setattr(gpu_parts, "host_free_bytes", lambda room=room: weights + RESERVE_BYTES + room)
        found = gpu_parts._Model(options)
        assert len(found.batches) == fits
        left_out = [{"size": 1000, "context": 40}] if fits == 1 else []
        assert found.about["left_out"] == left_out
        text = report({"kernels": found.about | {"batches": []}})
        assert ("No room for 1000 x 40." in text) == (fits == 1)
    monkeypatch.setattr(gpu_parts, "host_free_bytes", lambda: weights + RESERVE_BYTES)
    with pytest.raises(SystemExit, match=r"tiny: none of these fits into 4\.0 GiB with a batch of the given sizes"):
        gpu_parts._Model(options)


def test_parts_that_fail_or_hang_leave_the_others_their_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes and the clock are this test's: one writes half a result and fails, one does not end."""
    now = [100.0]

    def run(command: list[str], *, timeout: float, **options: object) -> SimpleNamespace:
        part, path = (command[command.index(flag) + 1] for flag in ("--part", "--result"))
        assert command[command.index("--batch-sizes") + 1] == "1,2"
        Path(path).write_text(json.dumps({"skipped" if part == "device" else "half": part}))
        if part == "kernels":
            now[0] += timeout
            raise subprocess.TimeoutExpired(command, timeout)
        now[0] += 10
        return SimpleNamespace(returncode=3 if part == "step" else 0, stderr="a line\nthe reason\n")

    monkeypatch.setattr(gpu_check, "subprocess", SimpleNamespace(run=run, PIPE=None, TimeoutExpired=subprocess.TimeoutExpired))
    monkeypatch.setattr(gpu_check, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(gpu_check, "run_tests", lambda *args: {"summary": f"1 passed in {args[2]} s", "problems": [], "printed": []})
    out = tmp_path / "out"
    flags = ["--device", "cpu", "--batch-sizes", "1,2", "--out", str(out), "--time-limit", "60", "--only"]
    assert gpu_check.main([*flags, "device,tests,step,kernels,prefill"]) == 1
    found = json.loads((out / "gpu_check.json").read_text())
    assert found["device"] == {"skipped": "device"}
    assert found["tests"]["summary"] == "1 passed in 25.0 s", "half of what is left"
    assert found["step"] == {"half": "step", "failed": "ended with 3: a line | the reason"}
    assert found["kernels"] == {"half": "kernels", "failed": "not done after 40 s"}
    assert found["prefill"] == {"failed": "not begun, no time was left of 60 s"}
    assert "**step: ended with 3: a line | the reason**" in (out / "gpu_check.md").read_text()
    assert gpu_check.main([*flags, "tests"]) == 0
    assert "60.0 s" in (out / "gpu_check.md").read_text(), "all of it where nothing else is to be done"


def test_tests_run_in_parts_and_each_fault_has_a_line(tmp_path: Path) -> None:
    folder = tmp_path / "gpu"
    folder.mkdir()
    (folder / "test_some.py").write_text(
        "import pytest, os\n"
        "@pytest.mark.parametrize('number', range(5))\ndef test_number(number): assert number != 3, 'three'\n"
        "@pytest.mark.skip(reason='needs 2 GPUs')\ndef test_two(): pass\n"
        "def test_roofline_of_it(): print('12 us')\n"
        "def test_dies(): os._exit(7)\n"
    )
    found = run_tests(tmp_path, 4, 240.0, tmp_path / "tests.txt", "gpu")
    assert found["failed"] == "2 problems"
    assert found["summary"].endswith(" of 7")
    assert any("test_number[3]" in line and "three" in line for line in found["problems"])
    assert any(line.startswith("a process ended with 7: ") for line in found["problems"])
    assert found["problems"][-1] == "skipped 1: needs 2 GPUs"
    assert "assert 3 != 3" in (tmp_path / "tests.txt").read_text()
    assert found["printed"][-1].startswith("1 passed")
    assert split(list("abcde"), 2) == [list("abc"), list("de")]
