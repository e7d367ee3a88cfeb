"""The report of a GPU machine: its arithmetic, its tables, and that a part which fails or hangs
leaves the others their figures."""

import json
import subprocess
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_check, gpu_children, gpu_machine, gpu_parts, moe_stages
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
from benchmarks.gpu_parts import (
    Options,
    measure_device,
    measure_prefill,
    measure_sampling,
    measure_step,
    prefill_flops,
)
from benchmarks.gpu_report import report
from benchmarks.random_model import random_model
from kernels.mxfp4 import choose_layout
from tests.support.gpu_parts import measured
from tests.support.tiny_model import TINY
from workers.config import ParallelConfig
from workers.model.make_checkpoint import preset_config
from workers.model.sizes import count_parameters, rank_bytes
from workers.parallel.shard import plan_shards
from workers.rank.runner import Runner

CPU = torch.device("cpu")
OPTIONS = Options(CPU, None, "tiny", batch_sizes=(1, 3), contexts=(40,), steps=2, prompts=(20,))


def test_bytes_of_a_decode_step() -> None:
    model = replace(TINY, num_experts=10, num_experts_per_token=2, layer_windows=(24, None, 24), num_layers=3)
    (shard,) = plan_shards(model, ParallelConfig())
    sizes = rank_bytes(model, shard, "bfloat16")
    dense = sizes.total - sizes.experts - sizes.embedding
    kv_of_a_sequence = 2 * (24 + 100 + 24) * 3 * 8 * 2
    assert decode_step_bytes(model, shard, "bfloat16", 1, 100) == pytest.approx(
        dense + 0.2 * sizes.experts + kv_of_a_sequence
    )
    assert decode_step_bytes(model, shard, "bfloat16", 2, 100) == pytest.approx(
        dense + 0.36 * sizes.experts + 2 * kv_of_a_sequence
    )
    assert decode_step_bytes(model, shard, "bfloat16", 1, 10) == pytest.approx(
        dense + 0.2 * sizes.experts + 2 * 3 * 10 * 3 * 8 * 2
    )


def test_products_of_a_prompt() -> None:
    """One token uses the active parameters and sees one key a layer; of 30, the last of a window of
    24 sees 24."""
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
    assert [(batch.size, batch.context) for batch in fits] == [
        (1, 1024),
        (8, 1024),
        (64, 1024),
        (256, 1024),
        (1, 8192),
        (8, 8192),
    ]
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
    assert all(len(set(sliding[at : at + 3])) == 3 for at in range(len(sliding) - 2)), (
        "a window of 24 touches three blocks"
    )


def test_batches_decode_one_after_the_other() -> None:
    model = random_model(TINY, CPU, choose_layout(CPU), dtype=torch.float32)
    batches = [Batch(4, 100), Batch(3, 90)]
    decoder = Decoder(
        Runner(model, random_caches(model, batches, 10), max_num_seqs=4, max_model_len=120), TINY, 3, CPU
    )
    for batch in batches:
        took = decoder.time(batch)
        assert took.median_s >= took.seconds > 0
        assert took.launch_s > 0


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
        found = gpu_parts.ChosenModel(options)
        assert len(found.batches) == fits
        left_out = [{"size": 1000, "context": 40}] if fits == 1 else []
        assert found.about["left_out"] == left_out
        text = report({"kernels": found.about | {"batches": []}})
        assert ("No room for 1000 x 40." in text) == (fits == 1)
    monkeypatch.setattr(gpu_parts, "host_free_bytes", lambda: weights + RESERVE_BYTES)
    with pytest.raises(
        SystemExit, match=r"tiny: none of these fits into 4\.0 GiB with a batch of the given sizes"
    ):
        gpu_parts.ChosenModel(options)


def test_a_part_that_fails_leaves_the_others_their_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes and the clock are this test's: one writes half a result and fails, one raises here,
    and the tests cannot be run at all."""
    now, limits = [100.0], {}

    def run_part(
        name: str, command: list[str], out: Path, timeout_s: float, env: dict[str, str]
    ) -> dict[str, object]:
        assert command[command.index("--part") + 1] == name
        assert command[command.index("--batch-sizes") + 1] == "1,2"
        limits[name] = timeout_s
        now[0] += 10
        if name == "step":
            raise OSError("no more processes")
        return {"half": name, "failed": "ended with 3"} if name == "kernels" else {"skipped": name}

    def run_tests(
        root: Path, out: Path, processes: int, timeout_s: float, env: dict[str, str], *, selected: str
    ) -> dict[str, object]:
        limits["tests"] = timeout_s
        assert selected == "moe"
        raise subprocess.TimeoutExpired("pytest", timeout_s)

    monkeypatch.setattr(gpu_check, "run_part", run_part)
    monkeypatch.setattr(gpu_check, "run_tests", run_tests)
    monkeypatch.setattr(gpu_check, "time", SimpleNamespace(monotonic=lambda: now[0]))
    out = tmp_path / "out"
    flags = ["--device", "cpu", "--batch-sizes", "1,2", "--out", str(out), "--tests", "moe", "--time-limit"]
    assert gpu_check.main([*flags, "200", "--only", "tests,kernels,step,device,probe"]) == 1
    found = json.loads((out / "gpu_check.json").read_text())
    assert list(found) == ["machine", "probe", "device", "step", "kernels", "tests"], (
        "the probe first, tests last"
    )
    assert found["step"] == {"failed": "OSError: no more processes"}
    assert found["kernels"] == {"half": "kernels", "failed": "ended with 3"}
    assert found["tests"]["failed"].startswith("TimeoutExpired: ")
    assert limits == {
        "probe": 60,
        "device": pytest.approx(114),
        "step": pytest.approx(108),
        "kernels": pytest.approx(102),
        "tests": 160,
    }
    assert "**kernels: ended with 3**" in (out / "gpu_check.md").read_text()
    assert gpu_check.main([*flags, "60", "--only", "device"]) == 0
    assert limits["device"] == 60, "all of it where nothing else is to be done"
    assert gpu_check.main([*flags, "25", "--only", "device,step"]) == 1
    found = json.loads((out / "gpu_check.json").read_text())
    assert found["step"] == {"failed": "not begun, no time was left of 25 s"}


def test_a_check_that_is_stopped_keeps_what_its_part_had_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_part(
        name: str, command: list[str], out: Path, timeout_s: float, env: dict[str, str]
    ) -> dict[str, object]:
        (out / "step.json").write_text(json.dumps({"steps": [1]}))
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_check, "run_part", run_part)
    monkeypatch.setattr(gpu_check, "report", lambda found: "")
    monkeypatch.setattr(gpu_children, "_ending", threading.Event())
    with pytest.raises(KeyboardInterrupt):
        gpu_check.main(["--device", "cpu", "--out", str(tmp_path), "--only", "step"])
    assert json.loads((tmp_path / "gpu_check.json").read_text())["step"] == {
        "steps": [1],
        "failed": "gpu-check itself was stopped",
    }


def test_the_first_line_says_what_the_machine_has(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(*command: str) -> str:
        return "NVIDIA H100, 580.1, 80000 MiB, 81559 MiB" if command[0] == "nvidia-smi" else "12.2.0"

    monkeypatch.setattr(gpu_machine, "_said", said)
    monkeypatch.setattr(gpu_machine.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--only", "device"]) == 2
    line = capsys.readouterr().out
    for words in (
        "gpu: NVIDIA H100",
        "driver: 580.1",
        "free memory: 80000 MiB of 81559 MiB",
        "C compiler: gcc 12.2.0",
        f"torch: {torch.__version__}",
    ):
        assert words in line
    assert "Python.h: in /" in line or "Python.h: not in /" in line
    monkeypatch.setattr(gpu_machine, "_said", lambda *command: "")
    monkeypatch.setattr(gpu_machine.shutil, "which", lambda name: None)
    found = gpu_machine.describe()
    assert found["gpu"] == "unknown (no nvidia-smi)"
    assert found["C compiler"].startswith("none")


def test_the_probe_has_a_decode_step(tmp_path: Path) -> None:
    path = tmp_path / "probe.json"
    flags = ["--device", "cpu", "--part", "probe", "--preset", "tiny", "--result", str(path)]
    assert gpu_check.main(flags) == 0
    found = json.loads(path.read_text())
    assert found["product"] == "a bf16 product is right"
    assert [row["way"] for row in found["ways"]] == ["eager"]
    assert found["tried"] == ["device", "steps, eager"]
    assert "failures" not in found
    assert "| eager |" in report({"probe": found})
    assert "no product of matrices" in report({"probe": {"failed": "stopped"}})


def test_experts_can_be_run_without_a_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels.moe import grouped, tile_choice

    monkeypatch.setattr(grouped, "choose_tile", grouped.choose_tile)
    monkeypatch.setenv(moe_stages.ENVIRONMENT, "1")
    moe_stages.apply_from_environment()
    for kind in (tile_choice.MXFP4_WGMMA, tile_choice.DENSE):
        for pairs in (1, 1000):
            tile = grouped.choose_tile(kind, "sm_90", pairs, 8, fp32=False)
            assert tile == replace(tile_choice.choose_tile(kind, "sm_90", pairs, 8, fp32=False), num_stages=1)
