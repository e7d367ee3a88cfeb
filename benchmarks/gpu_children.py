"""Processes that `benchmarks/gpu_check.py` starts. Their output goes to a file at once; a process
that reaches its limit leaves a traceback of each thread there; none outlives the process that
started it."""

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_GRACE_S = 5.0
"""Seconds between the signal that makes a process dump its threads and the one that ends it."""
_PARENT_POLL_S = 0.5
RESULTS = "GPU_CHECK_TEST_RESULTS"
"""Environment variable: the file that `gpu_test_results` appends lines to, also of other
processes."""
_PARENT = "GPU_CHECK_PARENT"
"""Environment variable: PID of the process that a child is not to outlive."""
_FRAME = re.compile(r'^  File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<function>.+)$')

_running: set["subprocess.Popen[bytes]"] = set()
_ending = threading.Event()


class ChildrenEnded(Exception):
    """This process is about to end."""


def run_child(
    command: Sequence[str], log: Path, timeout_s: float, *, cwd: Path, env: Mapping[str, str]
) -> int | None:
    """Run a process to its end, or to its limit.

    Args:
        log: file to which stdout and stderr are appended.
        timeout_s: limit in seconds; `_GRACE_S` before it, faulthandler dumps all threads into the
            log and the process is over.
        env: the whole environment.
    Returns:
        its exit code, minus the signal's number for a death of a signal; None: it was stopped at
        its limit.
    Raises:
        ChildrenEnded: after `end_children`.
    """
    if _ending.is_set():
        raise ChildrenEnded
    # faulthandler is there from the interpreter's start, also while modules are imported.
    env = {**env, "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1", _PARENT: str(os.getpid())}
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
    _running.add(process)
    try:
        return _wait(process, max(timeout_s - _GRACE_S, timeout_s / 2))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(min(_GRACE_S, timeout_s / 2))
        return None
    finally:
        _end(process)
        _running.discard(process)
        if _ending.is_set():
            raise ChildrenEnded


def _wait(process: "subprocess.Popen[bytes]", timeout_s: float) -> int:
    return process.wait(timeout_s)


def end_children() -> None:
    """End the children for which other threads wait; no other is started in this process."""
    _ending.set()
    for process in tuple(_running):
        _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Kill the process and those that it started, such as a C compiler."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def end_with_parent() -> None:
    """End this child process, from a thread of its own, when the process that started it is gone.
    Does nothing in a process started otherwise."""
    parent = os.environ.get(_PARENT)
    if parent is None or int(parent) != os.getppid():
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(_PARENT_POLL_S)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, name="end with parent", daemon=True).start()


def how_it_ended(code: int) -> str:
    """Describe an exit code in words."""
    if code >= 0:
        return f"ended with {code}"
    try:
        return f"died of {signal.Signals(-code).name}"
    except ValueError:
        return f"died of signal {-code}"


def where_it_was(log: Path, root: Path) -> str:
    """Return the innermost function of this repository that the main thread was in when
    faulthandler last dumped all threads, as "function (file:line)"; empty if the log holds no
    dump."""
    # The dump of the thread that got the signal, which is the main one unless it is busy for good.
    _, found, dump = log.read_text(errors="replace").rpartition("Current thread ")
    if not found:
        return ""
    frames = []
    for line in dump.splitlines()[1:]:
        frame = _FRAME.match(line)
        if frame is None:
            break
        frames.append(frame)
    inside = [
        frame
        for frame in frames
        if Path(frame["file"]).is_relative_to(root) and "site-packages" not in frame["file"]
    ]
    chosen = next(iter(inside or frames), None)
    if chosen is None:
        return ""
    file = Path(chosen["file"])
    return f"{chosen['function']} ({file.relative_to(root) if inside else file}:{chosen['line']})"


def last_lines(log: Path, count: int) -> list[str]:
    return log.read_text(errors="replace").strip().splitlines()[-count:] if log.exists() else []
