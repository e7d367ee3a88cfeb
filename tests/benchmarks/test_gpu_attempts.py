"""A piece of a part that fails leaves the others their figures: in the same process, and in the
next one."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_parts
from benchmarks.decode_batches import Decoder, StepTime
from benchmarks.gpu_attempts import CONTEXT_LOST, Attempts, read_result
from benchmarks.gpu_parts import Options, measure_step
from tests.support.gpu_parts import measured
from workers.rank.runner import Runner

CPU = torch.device("cpu")
CARD = {"bandwidth": 1e9, "gemm": {"dtype": "bf16", "size": 8192, "flops_per_s": 1e12}, "l2_bytes": 0}
ROOT = Path(__file__).parents[2]
OPTIONS = Options(CPU, None, "tiny", batch_sizes=(1, 3), contexts=(40,), steps=2, prompts=())


def fail() -> None:
    raise ValueError("no such thing\nand more of it")


def test_a_piece_that_raises_is_recorded_and_the_next_one_runs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, on_disk = tmp_path / "part.json", []
    attempts = Attempts(CPU, path)
    result = attempts.begin({"model": "m"}, lists=("rows",))
    assert not attempts.run("first", fail)
    assert attempts.run("second", lambda: (result["rows"].append(2), on_disk.append(read_result(path))))  # type: ignore[func-returns-value]
    assert on_disk[0]["doing"] == "second", "so that the process that stops it can name the piece"
    failures = [{"what": "first", "error": "ValueError: no such thing"}]
    assert read_result(path) == {
        "model": "m",
        "rows": [2],
        "tried": ["first", "second"],
        "failures": failures,
    }
    assert "in fail" in capfd.readouterr().err, "the traceback"


def test_a_second_process_leaves_out_what_was_tried(tmp_path: Path) -> None:
    path = tmp_path / "part.json"
    first = Attempts(CPU, path)
    rows = first.begin({}, lists=("rows",))["rows"]
    first.run("set up", lambda: rows.append("set up"), again=True)
    first.run("broken set-up", fail, again=True)
    first.run("a", lambda: rows.append("a"))
    second = Attempts(CPU, path)
    rows = second.begin({}, lists=("rows",))["rows"]
    second.run("set up", lambda: rows.append("set up again"), again=True)
    second.run("broken set-up", lambda: rows.append("never"), again=True)
    second.run("a", lambda: rows.append("never"))
    second.run("b", lambda: rows.append("b"))
    assert read_result(path)["rows"] == ["set up", "a", "set up again", "b"]


def test_a_lost_context_ends_the_process_at_once_with_all_that_was_found(tmp_path: Path) -> None:
    path = tmp_path / "part.json"
    script = (
        "import sys, torch\nfrom pathlib import Path\nfrom benchmarks import gpu_attempts\n"
        "gpu_attempts.is_context_lost = lambda device: True\n"
        "attempts = gpu_attempts.Attempts(torch.device('cpu'), Path(sys.argv[1]))\n"
        "result = attempts.begin({}, lists=('rows',))\n"
        "good = lambda: result['rows'].append(1)\n"
        "attempts.run('whole', lambda: attempts.run('good', good) and attempts.run('bad', lambda: 1 / 0), "
        "again=True)\n"
        "print('never')\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == CONTEXT_LOST
    assert ran.stdout == ""
    assert "ZeroDivisionError" in ran.stderr
    assert "bad: CUDA's context is lost" in ran.stderr
    found = read_result(path)
    assert found["rows"] == [1]
    assert found["failures"] == [{"what": "bad", "error": "ZeroDivisionError: division by zero"}]
    assert found["tried"] == ["good", "bad"], "what is around them is begun again"


class _Graphs:
    num_graphs, memory_bytes = 3, 10**6


@pytest.mark.parametrize("broken", [True, False])
def test_steps_are_measured_eagerly_where_graphs_cannot_be_captured(
    monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    runners: list[Runner] = []

    def capture(runner: Runner, progress: object) -> type[_Graphs]:
        runners.append(runner)
        if broken:
            raise RuntimeError("operation not permitted when stream is capturing")
        return _Graphs

    monkeypatch.setattr(Runner, "capture_graphs", capture)
    monkeypatch.setattr(Runner, "__init__", lambda self, *args, **options: None)
    monkeypatch.setattr(
        Decoder, "time", lambda self, batch: StepTime(0.5 if self._runner in runners else 2.0, 0.1, 3.0)
    )
    monkeypatch.setattr(gpu_parts, "_card", lambda device: CARD)
    monkeypatch.setattr(gpu_parts, "not_capturable", lambda kernels: ())
    model = gpu_parts.ChosenModel(OPTIONS)
    monkeypatch.setattr(gpu_parts, "ChosenModel", lambda options: model)
    found = measured(measure_step, replace(OPTIONS, device=_CudaInName()))  # type: ignore[arg-type]
    assert [row["seconds"] for row in found["steps"]] == [2.0 if broken else 0.5] * 2
    if broken:
        assert found["graphs"] == "none: capturing them failed"
        (failure,) = found["failures"]
        assert failure["error"] == "RuntimeError: operation not permitted when stream is capturing"
    else:
        assert found["graphs"].startswith("3, which keep 1 MB")


class _CudaInName:
    """A device that has only the type of a CUDA device."""

    type = "cuda"


def test_a_batch_that_fails_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one has a runner of its own: this one's has begun a step that did not end."""
    monkeypatch.setattr(gpu_parts, "_card", lambda device: CARD)
    launch = Runner.launch

    def failing(runner: Runner, plan: object) -> object:
        pending = launch(runner, plan)  # type: ignore[arg-type]
        if len(plan.seq_ids) == 1:  # type: ignore[attr-defined]
            raise RuntimeError("out of resources")
        return pending

    monkeypatch.setattr(Runner, "launch", failing)
    found = measured(measure_step, OPTIONS)
    assert [(row["size"], row["context"]) for row in found["steps"]] == [(3, 40)]
    assert found["failures"] == [{"what": "1 x 40", "error": "RuntimeError: out of resources"}]
