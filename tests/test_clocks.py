"""Durations, deadlines and order come from monotonic clocks.

The time of day jumps: an operator sets it, a virtual machine wakes up.
"""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_imports import ROOT, sources

TIME_OF_DAY = {
    "time": {"time", "time_ns", "ctime", "localtime", "gmtime", "strftime"},
    "datetime": {"now", "utcnow", "today"},
    "date": {"today"},
}
OF_FILES = {"st_mtime", "st_mtime_ns", "st_ctime", "st_ctime_ns", "getmtime"}
"""Ages of files are counted from the time of day."""
SHOWN = {
    "assembly.py": 1,  # `created` of a model
    "running.py": 1,  # `created` of an answer
    "clock.py": 1,  # when stored objects expire, for processes and hosts that come later
    "views.py": 1,  # `created_at` and `completed_at` of a response
    "prompts.py": 1,  # the date that the model is told
    "serve.py": 1,  # when a benchmark began
    "offline.py": 1,
}
"""How often the product's files, by name, read the time of day, to show it to a user."""
OF_C = ("system_clock", "gettimeofday", "CLOCK_REALTIME", "wait_until", "pthread_cond_timedwait")


def readings(file: Path) -> Iterator[int]:
    """Yield the lines that read the time of day."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute):
            owner = node.value
            name = (
                owner.id
                if isinstance(owner, ast.Name)
                else owner.attr
                if isinstance(owner, ast.Attribute)
                else ""
            )
            if node.attr in OF_FILES or node.attr in TIME_OF_DAY.get(name, ()):
                yield node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module == "time":
            yield from (node.lineno for alias in node.names if alias.name in TIME_OF_DAY["time"])


def test_the_time_of_day_is_only_shown() -> None:
    found = {file: list(readings(file)) for file in sources()}
    counts: Counter[str] = Counter()
    for file, lines in found.items():
        counts[file.name] += len(lines)
    assert +counts == SHOWN, {str(file): lines for file, lines in found.items() if lines}


@pytest.mark.parametrize(
    "file",
    sorted((ROOT / "kernels").rglob("*.cpp")) + sorted((ROOT / "kernels").rglob("*.h")),
    ids=lambda file: file.name,
)
def test_nor_do_the_kernels_read_it(file: Path) -> None:
    assert [name for name in OF_C if name in file.read_text()] == []


@pytest.mark.parametrize(
    "line",
    [
        "time.time() - begin",
        "datetime.datetime.now(datetime.UTC)",
        "datetime.date.today()",
        "path.stat().st_mtime",
        "from time import time",
    ],
)
def test_each_way_to_read_it_is_found(tmp_path: Path, line: str) -> None:
    (tmp_path / "code.py").write_text(line)
    assert list(readings(tmp_path / "code.py")) == [1]
