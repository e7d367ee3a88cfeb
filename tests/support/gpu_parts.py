"""Parts of benchmarks/gpu_check.py, run in this process, and the limits of those in others."""

import json
import subprocess
from collections.abc import Callable

import pytest

from benchmarks import gpu_children
from benchmarks.gpu_attempts import Attempts, Result
from benchmarks.gpu_parts import Options
from tests.support.waiting import until


def measured(part: Callable[[Options, Attempts], None], options: Options) -> Result:
    """Return the results of the part, as a report reads them."""
    attempts = Attempts(options.device)
    part(options, attempts)
    return dict(json.loads(json.dumps(attempts.result)))


class Limits:
    """Time limits of a check's processes, reached by a condition in place of the clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def reached_when(self, condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
        """Set the condition: a process that is there when it holds has reached its limit."""

        def wait(process: "subprocess.Popen[bytes]", limit_s: float) -> int:
            until(lambda: condition() or process.poll() is not None, timeout_s)
            if process.poll() is None:
                raise subprocess.TimeoutExpired(process.args, limit_s)
            return process.returncode

        self._monkeypatch.setattr(gpu_children, "_wait", wait)
