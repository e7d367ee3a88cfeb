"""Facts that a run of the tests must not hide: a plugin of pytest that tests/conftest.py registers.

With `CI=true` a test that is skipped fails, unless its reason is one of ALLOWED_SKIPS: a package
that is missing there would take the tests that need it out of every run without a word. At the end
a run prints how the tests of each marker ended, and on which instruction sets the CPU kernels ran;
`--summary-to FILE` appends the same lines to a file, which `make test` prints last.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

ALLOWED_SKIPS = {
    r"this processor has no \w+": "an instruction set: which ones CI's processor has changes",
    r"needs two cores": "a core",
    r"torch finds no CUDA device|needs \d+ GPUs|this host has three GPUs|not an sm_90": "a GPU",
    r"only torch's build for CUDA asks for a Triton": "a GPU",
    r"network and mount namespaces need root|this user may not do it": "the right to make namespaces",
    r"transparent huge pages are off on this system": "a setting of the kernel",
    r"what others do with freed memory is theirs": "another C library",
}
"""The kind of missing thing, by a pattern for the beginning of the reason. No package stands here:
packages that tests need are in scripts/ci_packages.txt."""

MARKERS = ("clients", "npm", "browser", "isa", "netns", "postgresql", "prometheus", "ray", "slow", "gpu")
"""Markers that the last lines count, as declared in pyproject.toml."""

_MARKER = "marker"
"""Name under which the report of a test has its markers."""
NATIVE_ISA, EMULATED_ISA = "isa", "isa_emulated"
"""Names under which a test records the instruction set that it ran on (`record_property`)."""


def is_allowed(reason: str) -> bool:
    """Return whether a test may be skipped for this reason where CI=true."""
    return any(re.match(pattern, reason.removeprefix("Skipped: ")) for pattern in ALLOWED_SKIPS)


def register(config: pytest.Config, summary: Path | None) -> None:
    """Add the plugin to a run.

    Args:
        summary: file to which the last lines are appended; None for no file.
    """
    is_worker = hasattr(config, "workerinput")  # of pytest -n: its controller gets all reports
    config.pluginmanager.register(RunReport(os.environ.get("CI") == "true", None if is_worker else summary))


class RunReport:
    """A plugin that fails skips that CI does not allow and summarises the run.

    Args:
        in_ci: whether skips are failures.
        summary: file to which the last lines are appended; None for no file.
    """

    def __init__(self, in_ci: bool, summary: Path | None) -> None:
        self._in_ci = in_ci
        self._summary = summary

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        # Not report.keywords: a parameter may be called like a marker.
        report.user_properties += [
            (_MARKER, mark.name) for mark in item.iter_markers() if mark.name in MARKERS
        ]
        if not hasattr(report, "wasxfail"):
            self._fail_if_skipped(report)
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
        report = yield
        self._fail_if_skipped(report)
        return report

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        reports = [
            report
            for found in terminalreporter.stats.values()
            for report in found
            if isinstance(report, pytest.TestReport)
        ]
        # A test that is skipped or fails while it is set up has no call.
        ended = [report for report in reports if report.when == "call" or not report.passed]
        lines = list(summary_lines(ended))
        for line in lines:
            terminalreporter.write_line(line)
        if self._summary is not None:
            with self._summary.open("a") as file:
                file.writelines(f"{line}\n" for line in lines)

    def _fail_if_skipped(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if (
            not self._in_ci
            or not report.skipped
            or (reason := skip_reason(report)) is None
            or is_allowed(reason)
        ):
            return
        report.outcome = "failed"
        report.longrepr = (
            f"skipped although CI=true: {reason}\n"
            "A test that needs a Debian package names it in scripts/ci_packages.txt; other reasons belong in "
            "tests/support/run_report.py, ALLOWED_SKIPS."
        )


def skip_reason(report: pytest.TestReport | pytest.CollectReport) -> str | None:
    """Return the reason of a test's skip; None where pytest gives none."""
    return report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else None


def summary_lines(reports: list[pytest.TestReport]) -> Iterator[str]:
    """Return one line for all tests, one for each marker that ran, one for the instruction sets."""
    if not reports:
        return
    files = {report.nodeid.split("::")[0] for report in reports}
    yield f"{os.path.commonpath(files) if len(files) > 1 else files.pop()}: {_outcomes(reports)}"
    for marker in MARKERS:
        if marked := [report for report in reports if (_MARKER, marker) in report.user_properties]:
            reasons = {reason for report in marked if report.skipped and (reason := skip_reason(report))}
            yield "; ".join([f"  marker {marker}: {_outcomes(marked)}", *sorted(reasons)])
    ran: dict[str, set[str]] = defaultdict(set)
    for report in reports:
        if report.passed:
            for name, value in report.user_properties:
                ran[name].add(str(value))
    if ran[NATIVE_ISA] or ran[EMULATED_ISA]:
        from kernels.cpu import native

        missing = set(native.ISAS) - ran[NATIVE_ISA] - ran[EMULATED_ISA]
        parts = ((ran[NATIVE_ISA], "natively"), (ran[EMULATED_ISA], "emulated"), (missing, "not tested"))
        yield "  instruction sets: " + "; ".join(
            f"{how}: {', '.join(sorted(names))}" for names, how in parts if names
        )


def _outcomes(reports: list[pytest.TestReport]) -> str:
    counts = Counter(report.outcome for report in reports)
    return ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items()))
