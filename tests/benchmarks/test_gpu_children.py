"""Processes of a GPU check that raise, hang and die, and what is left of them."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from benchmarks.gpu_attempts import CONTEXT_LOST
from benchmarks.gpu_check import child_environment, run_part
from benchmarks.gpu_children import how_it_ended, run_child, where_it_was
from tests.support.gpu_parts import Limits
from tests.support.waiting import until

ROOT = Path(__file__).parents[2]
LONG_S = 120.0


def script(text: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(text)]


def run(text: str, log: Path) -> int | None:
    return run_child(script(text), log, LONG_S, cwd=ROOT, env=os.environ)


def test_how_a_process_ended_and_what_it_printed(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert run("print('out'); import sys; print('err', file=sys.stderr); sys.exit(3)", log) == 3
    code = run("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", log)
    assert code == -signal.SIGSEGV
    assert log.read_text().split()[:2] == ["out", "err"]
    assert "Segmentation fault" in log.read_text(), "faulthandler is on"
    assert [how_it_ended(code) for code in (3, -11, -200)] == [
        "ended with 3",
        "died of SIGSEGV",
        "died of signal 200",
    ]


def test_a_process_at_its_limit_leaves_where_each_thread_was_and_no_children(
    tmp_path: Path, limits: Limits
) -> None:
    """The process hangs in the middle of C code, which takes no Python signal handler."""
    log, pid_file, source = tmp_path / "log.txt", tmp_path / "pid", tmp_path / "hangs.py"
    source.write_text(
        textwrap.dedent(
            """
            import subprocess, sys, threading
            def in_a_thread(): started.set(); threading.Event().wait()
            def waits_for_ever(): open(sys.argv[2], "w").close(); lock.acquire()
            started = threading.Event()
            threading.Thread(target=in_a_thread, daemon=True).start()
            started.wait()
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            open(sys.argv[1], "w").write(str(child.pid))
            lock = threading.Lock()
            lock.acquire()
            print("so far", end="")
            waits_for_ever()
            """
        )
    )
    limits.reached_when((tmp_path / "hangs").exists)
    command = [sys.executable, str(source), str(pid_file), str(tmp_path / "hangs")]
    assert run_child(command, log, LONG_S, cwd=ROOT, env=os.environ) is None
    text = log.read_text()
    assert text.startswith("so far")
    assert "in in_a_thread" in text
    assert where_it_was(log, tmp_path) == "waits_for_ever (hangs.py:4)"
    assert where_it_was(log, ROOT).startswith("waits_for_ever (/"), "of no repository: by its whole path"
    pid = int(pid_file.read_text())
    until(lambda: not is_running(pid), LONG_S)


def test_where_it_was_of_a_log_without_a_dump(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("nothing\n")
    assert where_it_was(tmp_path / "log", ROOT) == ""


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    child = (
        "import os, time; from benchmarks.gpu_children import end_with_parent; end_with_parent()\n"
        f"open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    )
    parent = (
        "import os, sys; from pathlib import Path; from benchmarks.gpu_children import run_child\n"
        f"run_child([sys.executable, '-c', {child!r}], Path({str(tmp_path / 'log')!r}), 500, "
        f"cwd=Path({str(ROOT)!r}), env=os.environ)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT)
    try:
        until(lambda: pid_file.exists() and pid_file.read_text() != "", LONG_S)
    finally:
        process.kill()
        process.wait()
    until(lambda: not is_running(int(pid_file.read_text())), LONG_S)


def is_running(pid: int) -> bool:
    """Return whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


PIECES = """
    import os, signal, sys
    from pathlib import Path
    from types import SimpleNamespace
    from benchmarks.gpu_attempts import Attempts
    attempts = Attempts(SimpleNamespace(type="cpu"), Path(sys.argv[-1]))
    result = attempts.begin({"model": "m"}, lists=("rows",))
    def add(row): result["rows"].append(row)
"""


def part(text: str, out: Path) -> dict[str, object]:
    return run_part(
        "step",
        script(textwrap.dedent(PIECES) + textwrap.dedent(text)),
        out,
        LONG_S,
        child_environment(out, None),
    )


def test_a_part_that_dies_in_a_piece_goes_on_in_a_new_process(tmp_path: Path) -> None:
    (tmp_path / "step.json").write_text('{"tried": ["before"], "rows": ["of another run"]}')
    found = part(
        f"""
        attempts.run("before", lambda: add(os.getpid()))
        attempts.run("dies", lambda: os.kill(os.getpid(), signal.SIGKILL))
        attempts.run("lost", lambda: os._exit({CONTEXT_LOST}))
        attempts.run("raises", lambda: 1 / 0)
        attempts.run("after", lambda: add(os.getpid()))
        """,
        tmp_path,
    )
    first, last = found["rows"]  # type: ignore[misc]
    assert first != last, "another process, and nothing of an earlier run"
    assert "failed" not in found
    errors = {failure["what"]: failure["error"] for failure in found["failures"]}  # type: ignore[attr-defined]
    assert errors["dies"].startswith("the process died of SIGKILL")
    assert errors["raises"] == "ZeroDivisionError: division by zero"
    assert "ZeroDivisionError" in (tmp_path / "step.txt").read_text()


def test_a_part_that_raises_outside_of_its_pieces_keeps_what_it_has(tmp_path: Path) -> None:
    found = part("attempts.run('first', lambda: add(1)); raise OSError('no room')", tmp_path)
    assert found["rows"] == [1]
    assert str(found["failed"]).startswith("ended with 1: ")
    assert "OSError: no room" in str(found["failed"])
    assert "Traceback" in (tmp_path / "step.txt").read_text()


def test_a_part_that_hangs_keeps_what_it_has_and_says_where_it_was(tmp_path: Path, limits: Limits) -> None:
    limits.reached_when((tmp_path / "hangs").exists)
    found = part(
        f"""
        import threading
        def stuck(): open({str(tmp_path / "hangs")!r}, "w").close(); threading.Event().wait()
        attempts.run("first", lambda: add(1))
        attempts.run("second", stuck)
        """,
        tmp_path,
    )
    assert found["rows"] == [1]
    assert str(found["failed"]).startswith(
        f"stopped after {LONG_S:.0f} s at second in run (benchmarks/gpu_attempts.py:"
    )
    assert " in stuck" in (tmp_path / "step.txt").read_text()


def test_all_that_children_write_is_under_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    env = child_environment(tmp_path, 1)
    for name in ("TRITON_CACHE_DIR", "CUDA_CACHE_PATH", "TORCHINDUCTOR_CACHE_DIR"):
        assert Path(env[name]).is_relative_to(tmp_path)
    assert env["PYTHONDONTWRITEBYTECODE"] == "1"
    assert env["GPU_CHECK_MOE_NUM_STAGES"] == "1"
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    assert child_environment(tmp_path, None)["TRITON_CACHE_DIR"] == "/elsewhere"
