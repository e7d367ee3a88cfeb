"""How tests/gpu are run on a GPU machine: dealt by weight, a result at a time, in new processes
after a death."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_children, gpu_tests
from benchmarks.gpu_test_weights import weights_of
from benchmarks.gpu_tests import FOLDER, WEIGHTS, deal, name_of_test, read_lines, run_tests, so_far
from tests.support.gpu_parts import Limits
from tests.support.waiting import until

ROOT = Path(__file__).parents[2]
LONG_S = 200.0


def run(
    tmp_path: Path,
    text: str,
    *,
    processes: int = 1,
    timeout_s: float = LONG_S,
    conftest: str = "",
    selected: str = "",
) -> dict[str, Any]:
    """Return the results of a folder with one file of tests; OUT is tmp_path / "out"."""
    folder, out = tmp_path / "gpu", tmp_path / "out"
    folder.mkdir()
    out.mkdir()
    (folder / "test_some.py").write_text(text)
    (folder / "conftest.py").write_text(conftest)
    env = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    return run_tests(tmp_path, out, processes, LONG_S, env, "gpu", selected)


def test_each_fault_has_a_line_and_costs_no_other_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_tests, "usable_cores", lambda: 12)
    found = run(
        tmp_path,
        "import pytest, os, sys\n"
        "@pytest.mark.parametrize('number', range(3))\ndef test_number(number): assert number != 1, 'three'\n"
        "@pytest.mark.skip(reason='needs 2 GPUs')\ndef test_two(): pass\n"
        "@pytest.fixture\ndef broken(): raise OSError('no file')\ndef test_with_fixture(broken): pass\n"
        "def test_roofline_of_it(): print('12 us'); assert os.environ['OMP_NUM_THREADS'] == '6'\n"
        "def test_dies(): os._exit(7)\n"
        "def test_dies_of_a_signal(): os.kill(os.getpid(), 11)\n"
        "def test_last(): pass\n",
        processes=2,
    )
    assert found["summary"] == "2 failed, 4 passed, 1 skipped of 9"
    by_test = {
        line.partition(": ")[0].rpartition("::")[2]: line.partition(": ")[2] for line in found["problems"]
    }
    assert "three" in by_test["test_number[1]"]
    assert by_test["test_with_fixture"] == "OSError: no file"
    assert by_test["test_dies"].startswith("its process ended with 7")
    assert by_test["test_dies_of_a_signal"].startswith("its process died of SIGSEGV")
    assert found["problems"][-1] == "skipped 1: needs 2 GPUs"
    assert found["failed"] == "4 problems"
    assert found["printed"][-1].startswith("1 passed")
    assert found["advice"] == []
    assert "assert 1 != 1" in (tmp_path / "out/tests.txt").read_text()
    assert "Segmentation fault" in (tmp_path / "out/tests.txt").read_text()
    lines = read_lines(tmp_path / "out/tests.jsonl")
    assert len([line for line in lines if "began" in line]) == 9
    assert {path.name for path in tmp_path.iterdir()} == {"gpu", "out"}


HANGS = "open('hangs', 'w').close(); threading.Event().wait()"


def test_a_process_that_is_stopped_keeps_its_results_and_says_where_it_was(
    tmp_path: Path, limits: Limits
) -> None:
    limits.reached_when((tmp_path / "hangs").exists)
    found = run(
        tmp_path,
        f"import threading\ndef test_first(): pass\ndef test_hangs(): {HANGS}\ndef test_never(): pass\n",
    )
    assert found["summary"] == "1 passed of 3"
    (problem,) = found["problems"]
    at = "gpu/test_some.py::test_hangs, test_hangs (gpu/test_some.py:3)"
    assert problem.startswith(f"not done in time: stopped in {at}, with 2 tests of 3 left")
    assert "in test_hangs" in (tmp_path / "out/tests/process0.txt").read_text()
    assert so_far(tmp_path / "out")["summary"] == "1 passed"


def test_an_interrupt_ends_all_processes_and_keeps_their_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_children, "_ending", threading.Event())
    # Ignored where the tests run in the background of a script.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt() -> None:
        until((tmp_path / "hangs").exists, LONG_S)
        # A real signal: it wakes the main thread, which waits for a lock.
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            run(
                tmp_path,
                f"import threading\ndef test_first(): pass\ndef test_hangs(): {HANGS}\ndef test_never(): "
                f"pass\n",
            )
    finally:
        signal.signal(signal.SIGINT, before)
    thread.join()
    assert not gpu_children._running
    assert so_far(tmp_path / "out")["summary"] == "1 passed"
    begun = [line["began"] for line in read_lines(tmp_path / "out/tests.jsonl") if "began" in line]
    assert begun == ["gpu/test_some.py::test_first", "gpu/test_some.py::test_hangs"], (
        "no other process went on"
    )


def test_after_a_lost_context_the_remaining_tests_run_in_a_new_process(tmp_path: Path) -> None:
    """Said by a stand-in: lost once a test has failed, until the process ends."""
    found = run(
        tmp_path,
        "import os\npids = []\n"
        "def test_loses_it(): assert not 'illegal memory access'\n"
        "def test_other(): open('other', 'w').write(str(os.getpid()))\n"
        "def test_another(): assert open('other').read() == str(os.getpid())\n",
        conftest="from benchmarks import gpu_test_results\ngpu_test_results.context_is_lost = lambda: True\n",
    )
    assert found["summary"] == "1 failed, 2 passed of 3"
    assert (tmp_path / "out/tests.txt").read_text().count("test session starts") in (0, 2)
    assert "CUDA's context is lost" in (tmp_path / "out/tests.txt").read_text()


def test_a_hang_while_tests_are_listed_is_a_result(tmp_path: Path, limits: Limits) -> None:
    limits.reached_when((tmp_path / "hangs").exists)
    found = run(tmp_path, f"import threading; {HANGS}")
    assert found == {
        "failed": "no tests were listed within 90 s: pytest was in <module> (gpu/test_some.py:1)"
    }


def test_tests_that_cannot_be_imported_are_a_result(tmp_path: Path) -> None:
    found = run(tmp_path, "import nothing_of_this_name")
    assert found["failed"].startswith("no tests were found, pytest ended with 2: ")
    assert "nothing_of_this_name" in found["failed"]


def test_without_pytest_the_other_parts_can_run(tmp_path: Path) -> None:
    """Only the part that runs the tests needs pytest; it reports a missing one in a sentence."""
    code = (
        "import sys\nsys.modules['pytest'] = None\nfrom pathlib import Path\n"
        "import benchmarks.gpu_check\nfrom benchmarks import gpu_tests\n"
        "gpu_tests.importlib.util.find_spec = lambda name: None\n"
        f"print(gpu_tests.run_tests(Path('.'), Path({str(tmp_path)!r}), 1, 9, {{}})['failed'])"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env)
    assert found.stdout == f"pytest is not installed for {sys.executable}: pip install pytest\n", found.stderr


def test_some_of_the_tests_can_be_selected(tmp_path: Path) -> None:
    found = run(tmp_path, "def test_moe(): pass\ndef test_attention(): pass\n", selected="moe")
    assert found["summary"] == "1 passed of 1"
    assert "failed" not in found


def test_tests_are_dealt_by_weight() -> None:
    """The heavy ones apart, all parts alike, each in the order of the list but from another place
    on."""
    ids = [f"f.py::test_heavy[{index}]" for index in range(3)] + [
        f"f.py::test_light[{index}]" for index in range(90)
    ]
    weights = {"f.py::test_heavy": 10.0, "f.py::test_light": 1.0}
    parts = deal(ids, 4, weights)
    assert sorted(id for part in parts for id in part) == sorted(ids)
    loads = [sum(weights[name_of_test(id)] for id in part) for part in parts]
    assert max(loads) - min(loads) <= 1
    assert [sum("heavy" in id for id in part) for part in parts] == [1, 1, 1, 0]
    for number, part in enumerate(parts):
        order = [ids.index(id) for id in part]
        start = len(order) - number * len(order) // 4
        assert order[start:] + order[:start] == sorted(order)
    assert len({part[0] for part in parts}) == 4
    assert deal(ids[:2], 8, {}) == [[ids[0]], [ids[1]]]


def test_weights_are_of_tests_that_are_there() -> None:
    known = json.loads(WEIGHTS.read_text())
    assert known, "none were measured"
    for name, seconds in known.items():
        file, _, function = name.partition("::")
        assert f"def {function}(" in (ROOT / FOLDER / file).read_text(), name
        assert seconds > gpu_tests.DEFAULT_WEIGHT


def test_weights_are_means_of_what_a_run_took(tmp_path: Path) -> None:
    lines = [
        ("tests/gpu/a.py::x[1]", "passed", 2.0),
        ("tests/gpu/a.py::x[2]", "failed", 4.0),
        ("tests/gpu/a.py::x[3]", "skipped", 0.0),
    ]
    lines += [("tests/gpu/a.py::light", "passed", 0.1)]
    results = tmp_path / "tests.jsonl"
    results.write_text(
        "".join(json.dumps({"test": id, "outcome": outcome, "seconds": s}) + "\n" for id, outcome, s in lines)
        + '{"test": "cut'
    )
    assert weights_of(results) == {"a.py::x": 3.0}


def test_a_failure_of_the_experts_proposes_what_narrows_it_down() -> None:
    one_stage, memcheck, racecheck = gpu_tests.advice(
        ["tests/gpu/test_moe_on_gpu.py::test_packed_experts[bf16-1x1of1]"]
    )
    assert "--only tests --tests moe --moe-num-stages 1" in one_stage
    for line, tool in ((memcheck, "memcheck"), (racecheck, "racecheck")):
        assert f"compute-sanitizer --tool {tool} python3 -m pytest" in line
        assert '"tests/gpu/test_moe_on_gpu.py::test_packed_experts[bf16-1x1of1]"' in line
    assert gpu_tests.advice(["tests/gpu/test_attention_on_gpu.py::test_heads"]) == []
