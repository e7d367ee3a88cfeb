"""Runs tests/gpu in several processes on one GPU, since compiling kernels takes a processor core
longer than running them takes the GPU. Those that print times or read how much memory the GPU has
free run alone, after the others.

Each process writes the results as they come to OUT/tests.jsonl (`gpu_test_results.py`). One that
ends before its tests are through, because it died or CUDA's context was lost, is followed by
another with those that are left.
"""

import importlib.util
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_children import (
    RESULTS,
    end_children,
    how_it_ended,
    last_lines,
    run_child,
    where_it_was,
)
from workers.cores import usable_cores

FOLDER = "tests/gpu"
ALONE = ("roofline", "graphs_keep")
"""Parts of the names of tests that no other process may disturb."""
ALONE_SHARE = 0.25
"""Share of the time kept for the tests that run alone."""
COLLECT_S = 90.0
"""Seconds in which pytest has to list the tests: it imports torch and Triton once."""
LEAST_S = 5.0
"""Minimum seconds left for starting a process."""
WEIGHTS = Path(__file__).parent / "gpu_test_weights.json"
"""Seconds of a case, by test: file's name, two colons, function's name. Written by `python3 -m
benchmarks.gpu_test_weights TESTS.JSONL`."""
DEFAULT_WEIGHT = 0.5
"""Weight, in seconds, of a test that is not among them."""
ROOT = Path(__file__).parent.parent
# Without the project's own options, which need plugins that a GPU machine may lack.
PYTEST = [
    sys.executable,
    "-m",
    "pytest",
    "-q",
    "-c",
    os.devnull,
    "--rootdir",
    ".",
    "-p",
    "no:cacheprovider",
    "--disable-warnings",
]


def run_tests(
    root: Path,
    out: Path,
    num_processes: int,
    timeout_s: float,
    env: Mapping[str, str],
    folder: str = FOLDER,
    selected: str = "",
) -> dict[str, Any]:
    """Run the tests; return {"summary", "problems": a line each, "printed": output of the tests
    that run alone, "advice", "failed" if there was a failure}.

    Args:
        out: folder that gets tests.jsonl, and in tests/ the output of each process.
        selected: an expression for pytest's -k.
    """
    if importlib.util.find_spec("pytest") is None:
        return {"failed": f"pytest is not installed for {sys.executable}: pip install pytest"}
    deadline = time.monotonic() + timeout_s
    results, logs = out / "tests.jsonl", out / "tests"
    logs.mkdir(exist_ok=True)
    results.write_bytes(b"")
    threads = max(1, usable_cores() // num_processes)
    # The plugin is here, whatever the folder that is tested.
    path = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    env = {
        **env,
        RESULTS: str(results),
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": path,
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    ids = _listed(root, logs / "collected.txt", min(COLLECT_S, timeout_s), env, folder, selected)
    if isinstance(ids, str):
        return {"failed": ids}
    alone = [id for id in ids if any(word in id for word in ALONE)]
    together = [id for id in ids if id not in alone]
    before_alone = deadline - (ALONE_SHARE * timeout_s if alone else 0)
    shards = [
        _Shard(root, part, logs / f"process{index}.txt", results, env)
        for index, part in enumerate(deal(together, num_processes))
    ]
    with ThreadPoolExecutor(max(1, len(shards))) as pool:
        try:
            list(pool.map(lambda shard: shard.run(before_alone), shards))
        except KeyboardInterrupt:
            # The pool waits for its threads.
            end_children()
            raise
    last = _Shard(root, alone, logs / "alone.txt", results, env)
    last.run(deadline)
    (out / "tests.txt").write_text(
        "\n".join(shard.log.read_text(errors="replace") for shard in (*shards, last) if shard.log.exists())
    )
    found = _summary(results, len(ids), [problem for shard in (*shards, last) for problem in shard.problems])
    return found | {"printed": last_lines(last.log, 200)}


def so_far(out: Path) -> dict[str, Any]:
    """Return the results of `run_tests` so far, when it is interrupted."""
    results = out / "tests.jsonl"
    return _summary(results, None, []) if results.exists() else {}


def _listed(
    root: Path, log: Path, timeout_s: float, env: Mapping[str, str], folder: str, selected: str
) -> list[str] | str:
    """Return the tests' ids, or the reason for which there are none."""
    log.unlink(missing_ok=True)
    command = [*PYTEST, "--collect-only", *(["-k", selected] if selected else []), folder]
    code = run_child(command, log, timeout_s, cwd=root, env=env)
    printed = log.read_text(errors="replace")
    ids = [line for line in printed.splitlines() if "::" in line and not line.startswith((" ", "ERROR"))]
    if code is None:
        return (
            f"no tests were listed within {timeout_s:.0f} s: pytest was in "
            f"{where_it_was(log, root) or 'an unknown place'}"
        )
    return ids if ids else f"no tests were found, pytest {how_it_ended(code)}: {printed[-1000:]}"


def deal(ids: Sequence[str], num_parts: int, weights: Mapping[str, float] | None = None) -> list[list[str]]:
    """Return at most num_parts parts of about equal weight, the heaviest tests first to whichever
    part has least.

    Each part is in the order of `ids`, but begins at another place: neighbours use the same
    kernels, and when a part comes to them another has compiled them.
    """
    weights = _weights() if weights is None else weights
    parts: list[list[int]] = [[] for _ in range(min(num_parts, len(ids)))]
    loads = [0.0] * len(parts)
    heavy_first = sorted(range(len(ids)), key=lambda index: -_weight(ids[index], weights))
    for index in heavy_first:
        lightest = loads.index(min(loads))
        parts[lightest].append(index)
        loads[lightest] += _weight(ids[index], weights)
    dealt = []
    for number, part in enumerate(parts):
        ordered = sorted(part)
        start = number * len(ordered) // len(parts)
        dealt.append([ids[index] for index in (*ordered[start:], *ordered[:start])])
    return dealt


def _weight(test_id: str, weights: Mapping[str, float]) -> float:
    return weights.get(name_of_test(test_id), DEFAULT_WEIGHT)


def name_of_test(test_id: str) -> str:
    """Return the name under which WEIGHTS has the test."""
    file, _, test = test_id.partition("::")
    return f"{Path(file).name}::{test.partition('[')[0]}"


def _weights() -> dict[str, float]:
    return dict(json.loads(WEIGHTS.read_text()))


@dataclass(slots=True)
class _Shard:
    """Tests that run one after the other.

    Attributes:
        log: file for pytest's output, of all its processes.
        problems: a line each: deaths, and tests for which there was no time.
    """

    root: Path
    ids: list[str]
    log: Path
    results: Path
    env: Mapping[str, str]
    problems: list[str] = field(default_factory=list)

    def run(self, deadline: float) -> None:
        """Run until all tests are through or the time is over."""
        self.log.unlink(missing_ok=True)
        left = self.ids
        while left:
            seconds = deadline - time.monotonic()
            if seconds < LEAST_S:
                self.problems.append(f"not done in time: {len(left)} tests, the first of which is {left[0]}")
                return
            code = run_child(
                [*PYTEST, "-p", "benchmarks.gpu_test_results", *left],
                self.log,
                seconds,
                cwd=self.root,
                env=self.env,
            )
            lines = read_lines(self.results)
            ended = {line["test"] for line in lines if "test" in line}
            left, before = [id for id in left if id not in ended], left
            begun = {line["began"] for line in lines if "began" in line}
            at = next((id for id in left if id in begun), None)
            if code is None:
                where = where_it_was(self.log, self.root)
                self.problems.append(
                    f"not done in time: stopped in {at or 'no test'}{f', {where},' if where else ''} with "
                    f"{len(left)} tests of "
                    f"{len(self.ids)} left; {self.log.name} has where each thread was"
                )
                return
            if at is not None:
                self.problems.append(
                    f"{at}: its process {how_it_ended(code)}: {' | '.join(last_lines(self.log, 3))[-500:]}"
                )
                left = [id for id in left if id != at]
            elif left == before:
                self.problems.append(
                    f"{len(left)} tests did not run: pytest {how_it_ended(code)}: "
                    f"{' | '.join(last_lines(self.log, 4))[-500:]}"
                )
                return


def read_lines(results: Path) -> list[dict[str, Any]]:
    """Return all results but a last one that was not written to its end."""
    return [json.loads(line) for line in results.read_text().splitlines() if line.endswith("}")]


def _summary(results: Path, num_listed: int | None, problems: list[str]) -> dict[str, Any]:
    ended = [line for line in read_lines(results) if "test" in line]
    counts = Counter(line["outcome"] for line in ended)
    skipped = Counter(line["said"] for line in ended if line["outcome"] == "skipped")
    failed = [line for line in ended if line["outcome"] == "failed"]
    problems = [f"{line['test']}: {line['said']}" for line in failed] + problems
    of = "" if num_listed is None else f" of {num_listed}"
    result: dict[str, Any] = {
        "summary": ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items())) + of,
        "problems": problems + [f"skipped {number}: {reason}" for reason, number in skipped.items()],
        "advice": advice([line["test"] for line in failed]),
    }
    return result | ({"failed": f"{len(problems)} problems"} if problems else {})


def advice(failed: Sequence[str]) -> list[str]:
    """Return commands that narrow a failure of the experts' kernels down, if some of these tests
    are of them."""
    moe = [id for id in failed if "moe" in id.partition("::")[0]]
    if not moe:
        return []
    pytest = " ".join(["python3 -m pytest -q -c /dev/null --rootdir . -p no:cacheprovider", f'"{moe[0]}"'])
    sanitizer = "PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool"
    return [
        "The experts' kernels without a pipeline; a race between a load and its use if this passes: "
        "`python3 -m benchmarks.gpu_check --only tests --tests moe --moe-num-stages 1 --out "
        "gpu-check-one-stage`",
        f"Reads and writes out of bounds: `{sanitizer} memcheck {pytest}`",
        f"Races in shared memory: `{sanitizer} racecheck {pytest}`",
    ]
