"""Runs tests/gpu in several processes on one GPU, since compiling kernels takes a processor core longer than running them takes the GPU.
Those that print times or read how much memory the GPU has free run alone, after the others."""

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = "tests/gpu"
ALONE = "roofline or graphs_keep"
"""In the names of the tests that no other process may disturb."""
# Without the project's own options, which need plugins that a GPU machine may lack.
_PYTEST = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", ".", "-p", "no:cacheprovider", "--disable-warnings"]


def run_tests(root: Path, num_processes: int, timeout_s: float, log: Path, folder: str = FOLDER) -> dict[str, Any]:
    """{"summary", "problems": a line each, "printed": what the tests that run alone print, "failed" if something did}.

    Args:
        log: gets all that pytest prints.
    """
    deadline = time.monotonic() + timeout_s
    command = [*_PYTEST, "--collect-only", "-k", f"not ({ALONE})", folder]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=timeout_s, check=False)
    ids = [line for line in listed.stdout.splitlines() if "::" in line]
    if not ids:
        return {"failed": f"no tests were found: {listed.stdout[-500:]}{listed.stderr[-500:]}"}
    counts: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        shards = [(Path(scratch) / f"{index}.xml", part) for index, part in enumerate(split(ids, num_processes))]
        # Output goes to files: a full pipe that nobody reads would stop a process.
        running = [(xml, part, _start(root, xml, part)) for xml, part in shards]
        for xml, part, process in running:
            try:
                process.wait(max(deadline - time.monotonic(), 1))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                problems.append(f"not done in time: a process with {len(part)} tests from {part[0]} on; {_last_line(xml)}")
                continue
            _count(xml, process.returncode, counts, skipped, problems)
        printed, code = _alone(root, folder, deadline)
        log.write_text("\n".join([*(xml.with_suffix(".txt").read_text() for xml, _ in shards), *printed]))
    if code:
        problems.append(f"the tests that run alone ended with {code}")
    result: dict[str, Any] = {
        "summary": ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items())) + f" of {len(ids)}",
        "problems": problems + [f"skipped {number}: {reason}" for reason, number in skipped.items()],
        "printed": printed,
    }
    return result | ({"failed": f"{len(problems)} problems"} if problems else {})


def split(ids: Sequence[str], num_parts: int) -> list[list[str]]:
    """Neighbours stay together, as they use the same compiled kernels; at most num_parts parts, of about equal size."""
    size = -(-len(ids) // num_parts)
    return [list(ids[start : start + size]) for start in range(0, len(ids), size)]


def _start(root: Path, xml: Path, ids: Sequence[str]) -> "subprocess.Popen[str]":
    with xml.with_suffix(".txt").open("w") as output:
        return subprocess.Popen([*_PYTEST, f"--junitxml={xml}", *ids], cwd=root, stdout=output, stderr=subprocess.STDOUT, text=True)


def _count(xml: Path, code: int, counts: Counter[str], skipped: Counter[str], problems: list[str]) -> None:
    if not xml.exists():
        problems.append(f"a process ended with {code}: {_last_line(xml)}")
        return
    for case in ElementTree.parse(xml).getroot().iter("testcase"):
        outcome = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        counts["passed" if outcome is None else "skipped" if outcome.tag == "skipped" else "failed"] += 1
        if outcome is not None and outcome.tag == "skipped":
            skipped[outcome.get("message", "")] += 1
        elif outcome is not None:
            lines = (outcome.get("message") or "no message").splitlines()
            problems.append(f"{case.get('classname')}::{case.get('name')}: {lines[0][:300]}")


def _alone(root: Path, folder: str, deadline: float) -> tuple[list[str], int]:
    """(what is printed, exit code; 0 where there are none)."""
    try:
        ran = subprocess.run(
            [*_PYTEST, "-k", ALONE, folder],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=max(deadline - time.monotonic(), 1),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return [], 124
    nothing_selected = 5
    return ran.stdout.strip().splitlines(), 0 if ran.returncode == nothing_selected else ran.returncode


def _last_line(xml: Path) -> str:
    lines = xml.with_suffix(".txt").read_text().strip().splitlines()
    return lines[-1] if lines else "nothing was printed"
