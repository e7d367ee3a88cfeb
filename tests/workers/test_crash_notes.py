"""What a crashed process leaves for its successor, where no parent is told the signal. The
processes are real, and crash by real signals."""

import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.support.waiting import until
from workers import crash_notes
from workers.crash_notes import CrashNotes
from workers.errors import RankCrashed
from workers.exit_codes import MAX_SAME_CRASHES

CHILD = """
import os, sys
from pathlib import Path
from workers.crash_notes import CrashNotes
CrashNotes(Path(sys.argv[1])).begin()
def last_function(number):
    os.kill(os.getpid(), number)
last_function(int(sys.argv[2]))
"""


def crash(file: Path, number: signal.Signals) -> None:
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(file), str(number.value)],
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert child.returncode == -number, child.stderr


def begin(file: Path) -> None:
    """Begin as a process that comes later, without changing how this one crashes."""
    notes = CrashNotes(file)
    enabled = crash_notes.faulthandler.is_enabled()
    try:
        notes.begin()
    finally:
        if notes._own is not None:
            notes._own.close()
        if enabled:
            crash_notes.faulthandler.enable(sys.__stderr__)
        else:
            crash_notes.faulthandler.disable()


@pytest.fixture(autouse=True)
def no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Timer:
        def __init__(self, *_: object) -> None: ...
        def start(self) -> None: ...

    monkeypatch.setattr(crash_notes, "threading", type("threading", (), {"Timer": Timer}))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "notes" / "configuration"


def test_an_illegal_instruction_is_told_and_not_tried_for_ever(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begin(file)
    assert caplog.text == ""
    crash(file, signal.SIGILL)
    note = file.read_bytes()
    for number in range(1, MAX_SAME_CRASHES + 1):
        file.write_bytes(note * number)
        caplog.clear()
        if number < MAX_SAME_CRASHES:
            begin(file)
        else:
            with pytest.raises(
                RankCrashed, match=r"crashed 5 times in a row .*signal SIGILL.*CANTATA_CPU_ISA"
            ):
                begin(file)
        (line,) = caplog.messages
        assert line.startswith("a process that ran here before crashed (signal SIGILL, an instruction that")
        assert "in last_function" in line
    begin(file.with_name("another configuration"))


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGBUS", "SIGFPE", "SIGABRT"])
def test_another_crash_is_told_once(name: str, file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A request may be its cause. It ends a row of illegal instructions."""
    caplog.set_level(logging.INFO)
    illegal = b"Fatal Python error: Illegal instruction\n"
    file.parent.mkdir()
    file.write_bytes(illegal * (MAX_SAME_CRASHES - 1))
    crash(file, signal.Signals[name])
    begin(file)
    (line,) = caplog.messages
    assert f"(signal {name})" in line
    file.write_bytes(file.read_bytes() + illegal)
    begin(file)


def test_a_process_that_runs_for_long_ends_the_row(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.parent.mkdir()
    file.write_bytes(b"Fatal Python error: Illegal instruction\n" * (MAX_SAME_CRASHES - 1))
    monkeypatch.setattr(crash_notes, "threading", threading)
    monkeypatch.setattr(crash_notes, "STABLE_AFTER_S", 0.01)
    noted_in: list[Any] = []
    monkeypatch.setattr(crash_notes.faulthandler, "enable", lambda *args, **_: noted_in.extend(args))
    notes = CrashNotes(file)
    notes.begin()
    until(lambda: os.path.getsize(file) == 0, 20)
    assert noted_in == [notes._own]


def test_a_process_runs_without_notes_where_they_cannot_be_written(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file.parent.write_text("a file instead of the folder")
    begin(file)
    (line,) = caplog.messages
    assert line == f"a crash of this process cannot be noted in {file}: File exists"


def test_what_else_is_in_the_file_is_no_crash(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file.parent.mkdir()
    file.write_bytes(b"\xff\nFatal Python error: a new kind\n  File x\n" + b"\0" * 100)
    begin(file)
    assert caplog.text == ""
