"""Puts the repository's root on the path, so that tests can import `tests.support` however pytest is started."""

import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = str(Path(__file__).parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line that says whether the tests on several hosts ran: where the rights are missing they are skipped, which is easily missed."""
    reports = [report for found in terminalreporter.stats.values() for report in found if isinstance(report, pytest.TestReport)]
    # A test that is skipped or fails while it is set up has no call.
    ended = [report for report in reports if "netns" in report.keywords and (report.when == "call" or not report.passed)]
    if not ended:
        return
    counts = Counter(report.outcome for report in ended)
    reasons = {report.longrepr[2].removeprefix("Skipped: ") for report in ended if report.skipped and isinstance(report.longrepr, tuple)}
    said = ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items()))
    terminalreporter.write_line("; ".join([f"tests on several hosts (netns): {said}", *sorted(reasons)]))
