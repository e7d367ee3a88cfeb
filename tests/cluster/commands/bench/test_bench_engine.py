"""`cantata bench engine` on a tiny checkpoint: a report that adds up, and flags that cannot be
met."""

import json
from pathlib import Path

import pytest

from cluster.cli import main
from kernels.cpu import native
from tests.support.tiny_model import TINY, write_tiny_checkpoint

FLAGS = [
    "--input-len",
    "20",
    "--output-len",
    "5",
    "--batch-size",
    "3",
    "--num-iters",
    "2",
    "--kv-cache-memory",
    "4MiB",
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("models"))


def test_the_report_adds_up(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    assert (
        main(["bench", "engine", "--model", str(checkpoint), *FLAGS, "--profile", "--json", str(file)]) == 0
    )
    report = json.loads(file.read_text())
    settings = report["settings"]
    assert (settings["model"], settings["batch_size"], settings["input_len"], settings["num_iters"]) == (
        "tiny-0",
        3,
        20,
        2,
    )
    latency, prefill, per_token = report["latency_s"], report["prefill_s"], report["time_per_output_token_s"]
    assert 0 < prefill["mean"] < latency["mean"]
    assert per_token["mean"] == pytest.approx((latency["mean"] - prefill["mean"]) / 4)
    assert report["output_tokens_per_s"] == pytest.approx(3 * 5 / latency["mean"])
    assert report["total_tokens_per_s"] == pytest.approx(3 * 25 / latency["mean"])
    assert report["prompt_tokens_per_s"] == pytest.approx(3 * 20 / prefill["mean"])
    assert report["kernels"]["attention"] == f"C++ {native.isa()} (the widest instructions of this processor)"

    profile = report["profile"]
    assert profile["prefill"]["num_steps"] >= 1
    assert profile["decode"]["num_steps"] >= 1
    # The step that is under way when prefill ends belongs to both phases, but no step is lost or
    # counted twice.
    assert profile["prefill"]["num_steps"] + profile["decode"]["num_steps"] in (5, 6, 7)
    for phase in (profile["prefill"], profile["decode"]):
        rows = phase["operations"]
        assert sum(row["share"] for row in rows) == pytest.approx(1)
        assert sum(row["seconds"] for row in rows) == pytest.approx(phase["step_s"])
        assert rows[-1]["name"] == "outside kernels"
    calls: dict[str, float] = {}
    for phase in (profile["prefill"], profile["decode"]):
        for row in phase["operations"]:
            calls[row["name"]] = calls.get(row["name"], 0) + row["calls"] * phase["num_steps"]
    num_steps = profile["prefill"]["num_steps"] + profile["decode"]["num_steps"]
    assert calls["sampling"] == pytest.approx(num_steps)
    assert calls["norms"] == pytest.approx(num_steps * (2 * TINY.num_layers + 1))
    assert calls["RoPE and KV store"] == calls["gate top-k"] == pytest.approx(num_steps * TINY.num_layers)

    out = capsys.readouterr().out
    assert "time per output token" in out
    assert "| outside kernels |" in out
    assert profile["gemm_dtype"] in ("fp32", "bf16")
    assert profile["gemm_flops_per_s"] > 0
    assert f"torch multiplies {profile['gemm_dtype']} matrices" in out
    assert f"| GFLOP/s | of {profile['gemm_dtype']} GEMM |" in out


def test_dense_weights_in_int8(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    flags = [*FLAGS, "--num-iters", "1", "--profile", "--cpu-dense-dtype", "int8", "--json", str(file)]
    assert main(["bench", "engine", "--model", str(checkpoint), *flags]) == 0
    report = json.loads(file.read_text())
    assert report["settings"]["cpu_dense_dtype"] == "int8"
    assert "packed int8" in report["kernels"]["dense layers"]
    assert f"| dense int8 {TINY.vocab_size} x {TINY.hidden_size} |" in capsys.readouterr().out


def test_another_instruction_set(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "report.json"
    flags = [*FLAGS, "--num-iters", "1", "--json", str(file)]
    try:
        assert main(["bench", "engine", "--model", str(checkpoint), *flags, "--cpu-isa", "portable"]) == 0
    finally:
        native.choose("auto")
    report = json.loads(file.read_text())
    assert report["settings"]["cpu_isa"] == "portable"
    assert report["kernels"]["attention"] == "C++ portable (as cpu_isa says)"
    capsys.readouterr()
    [missing, *_] = [name for name in ("neon", "avx2") if name not in native.available()]
    assert main(["bench", "engine", "--model", str(checkpoint), *flags, "--cpu-isa", missing]) == 1
    assert (
        f"cantata: cpu_isa is {missing}, which this processor or this build does not have: set it to one of "
        f"auto, " in capsys.readouterr().err
    )


def test_without_decode(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*FLAGS, "--output-len", "1", "--num-iters-warmup", "0", "--profile"]
    assert main(["bench", "engine", "--model", str(checkpoint), *flags]) == 0
    out = capsys.readouterr().out
    assert "prefill: 1 steps" in out
    assert "decode:" not in out


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--profile", "--tensor-parallel-size", "2"], "--profile times the C++ kernels"),
        (["--profile", "--device", "cuda"], "--profile times the C++ kernels"),
        (["--json", "/nowhere/at/all.json"], "its folder does not exist"),
        (["--input-len", "100000000"], "max_model_len must be"),
    ],
)
def test_what_cannot_be_measured_is_said(
    checkpoint: Path, flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "engine", "--model", str(checkpoint), *flags]) == 1
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [["--batch-size", "0"], ["--num-iters", "x"], ["--kv-cache-memory", "much"], ["--temperature", "-1"]],
)
def test_flags_are_checked(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "engine", "--model", "m", *flags])
    assert flags[0] in capsys.readouterr().err
