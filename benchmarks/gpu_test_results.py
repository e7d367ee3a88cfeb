"""A plugin of pytest (`-p benchmarks.gpu_test_results`): writes a line of JSON as each test begins
and as it ends, so that a process which is stopped or dies leaves its results, and ends the run once
CUDA's context is lost, since no later test could pass.

    {"began": ID}
    {"test": ID, "outcome": "passed" | "failed" | "skipped", "seconds": of all phases,
     "said": first line of a failure or a skip's reason}
"""

import json
import os
from pathlib import Path

import pytest

from benchmarks.gpu_children import RESULTS, end_with_parent
from benchmarks.moe_stages import apply_from_environment

_LONGEST = 500
"""Maximum number of characters of a test's message."""


def pytest_configure(config: pytest.Config) -> None:
    end_with_parent()
    apply_from_environment()
    config.pluginmanager.register(_Results(Path(os.environ[RESULTS])), "gpu test results")


class _Results:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._outcome, self._said, self._seconds = "passed", "", 0.0

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._outcome, self._said, self._seconds = "passed", "", 0.0
        self._write({"began": nodeid})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds += report.duration
        if report.failed and self._outcome != "failed":
            self._outcome, self._said = "failed", _failure(report)
        elif report.skipped and isinstance(report.longrepr, tuple):
            self._outcome, self._said = "skipped", report.longrepr[2].removeprefix("Skipped: ")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> object:
        result = yield
        seconds = round(self._seconds, 3)
        self._write(
            {"test": item.nodeid, "outcome": self._outcome, "seconds": seconds, "said": self._said[:_LONGEST]}
        )
        if self._outcome == "failed" and context_is_lost():
            item.session.shouldstop = "CUDA's context is lost: the remaining tests run in a new process"
        return result

    def _write(self, line: dict[str, object]) -> None:
        # One write, which no other process comes between.
        with self._path.open("ab", buffering=0) as file:
            file.write(json.dumps(line).encode() + b"\n")


def context_is_lost() -> bool:
    """Return `gpu_attempts.is_context_lost` for the device in use; a process that has not imported
    torch has no context to lose."""
    import sys

    if "torch" not in sys.modules:
        return False
    import torch

    from benchmarks.gpu_attempts import is_context_lost

    return torch.cuda.is_initialized() and is_context_lost(torch.device("cuda", torch.cuda.current_device()))


def _failure(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash is not None else report.longrepr).strip().split("\n")[0]
