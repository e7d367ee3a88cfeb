"""The progress shown while an engine starts: every rank's own, on a terminal and in a file."""

import io
import re

import pytest

from workers.engine.progress import StartUpProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two ranks that load at the same time."""
    monkeypatch.setattr("sys.stderr", stream)
    progress = StartUpProgress()
    for rank in (0, 1):
        progress(f"load weights, rank {rank}", 0, 0)
    for done in (10, 25, 50):
        progress("load weights, rank 0", done, 50)
        progress("load weights, rank 1", done // 2, 25)
    progress("warm up, rank 0", 0, 0)
    progress.close()
    return [line for line in re.split(r"[\r\n]|\x1b\[A", stream.getvalue()) if line.strip()]


def test_lines_of_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = show(io.StringIO(), monkeypatch)
    assert lines == [
        "load weights, rank 0 ...",
        "load weights, rank 1 ...",
        "load weights, rank 0: 50 of 50 (100 %)",
        "load weights, rank 1: 25 of 25 (100 %)",
        "warm up, rank 0 ...",
    ]


def test_a_terminal_has_a_bar_for_each_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = show(Terminal(), monkeypatch)
    for rank, total in ((0, 50), (1, 25)):
        bars = [line for line in lines if line.startswith(f"load weights, rank {rank}:")]
        counts = [int(found[1]) for bar in bars if (found := re.search(rf"(\d+)/{total}", bar))]
        assert counts[-1] == total
        assert counts == sorted(counts)
    assert "warm up, rank 0 ..." in lines
