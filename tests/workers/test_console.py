"""Printing never raises and never waits: full disks, pipes without a reader, pipes that are not
read, closed descriptors."""

import contextlib
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.waiting import until
from workers.console import QueuedOutput

LIMIT_S = 60


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Yield the reading and writing end of a small pipe."""
    reading, writing = os.pipe()
    yield reading, writing
    for end in (reading, writing):
        with contextlib.suppress(OSError):
            os.close(end)


def fill(writing: int) -> int:
    """Write until no byte more fits; returns how many did."""
    os.set_blocking(writing, False)
    count = 0
    try:
        while True:
            count += os.write(writing, b"x")
    except BlockingIOError:
        pass
    os.set_blocking(writing, True)
    return count


def read_until(reading: int, end: bytes) -> bytes:
    data = b""
    while not data.endswith(end):
        data += os.read(reading, 65536)
    return data


def test_what_is_printed_comes_out_in_order(pipe: tuple[int, int]) -> None:
    output = QueuedOutput(pipe[1])
    for index in range(1000):
        print(index, "ü", file=output, flush=True)
    assert output.drain(LIMIT_S)
    assert read_until(pipe[0], "999 ü\n".encode()).decode() == "".join(
        f"{index} ü\n" for index in range(1000)
    )
    assert output.num_dropped_lines == 0


def test_an_unread_pipe_holds_nothing_up(pipe: tuple[int, int]) -> None:
    full = fill(pipe[1])
    output = QueuedOutput(pipe[1], max_bytes=1000)
    for _ in range(10_000):  # would block for good
        print("a line of thirty characters ..", file=output, flush=True)
    assert output.num_dropped_lines > 9000
    assert not output.drain(0.01)
    kept = ["a line of thirty characters .."] * (10_000 - output.num_dropped_lines)
    assert read_until(pipe[0], b"..\n")[full:].decode().splitlines() == kept
    assert output.drain(LIMIT_S)
    print("the end of one that is lost", file=output)  # taken is what begins with a line
    print("it goes on", file=output)
    note = f"cantata: {10_001 - len(kept)} lines of this log could not be written and were dropped"
    assert read_until(pipe[0], b"it goes on\n").decode().splitlines() == [note, "it goes on"]


def test_a_pipe_without_a_reader(pipe: tuple[int, int]) -> None:
    os.close(pipe[0])
    output = QueuedOutput(pipe[1])
    print("one\ntwo", file=output)
    assert output.drain(LIMIT_S)
    assert output.num_dropped_lines == 2


def test_a_full_disk() -> None:
    with open("/dev/full", "wb") as full:
        output = QueuedOutput(full.fileno())
        print("one", file=output)
        assert output.drain(LIMIT_S)
        assert output.num_dropped_lines == 1


def test_a_descriptor_that_another_process_made_non_blocking(pipe: tuple[int, int]) -> None:
    os.set_blocking(pipe[1], False)
    output = QueuedOutput(pipe[1])
    output.write("y" * 500_000 + "\n")
    assert read_until(pipe[0], b"\n") == b"y" * 500_000 + b"\n"


PROGRAM = """
    import logging, sys, threading
    from pathlib import Path
    from workers.console import keep_output_from_failing
    keep_output_from_failing()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO)
    from tqdm import tqdm
    tqdm.write("progress", file=sys.stderr)
    for _ in range(20_000):
        logging.info("a log line")
        print("an error", file=sys.stderr, flush=True)
        print("an answer", flush=True)
    Path(sys.argv[1]).touch()
"""


def program(code: str, done: Path) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code), str(done)]


@pytest.mark.parametrize("where", ["/dev/full", "closed", "no-reader", "not-read"])
def test_a_process_that_prints_there_runs_to_its_end(
    where: str, tmp_path: Path, pipe: tuple[int, int]
) -> None:
    done = tmp_path / "done"
    if where == "not-read":
        fill(pipe[1])
    elif where == "no-reader":
        os.close(pipe[0])
    command = program(PROGRAM, done)
    if where == "closed":
        command = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command]
    with open("/dev/full", "wb") as full:
        target = full.fileno() if where == "/dev/full" else pipe[1]
        assert subprocess.run(command, stdout=target, stderr=target, timeout=60).returncode == 0
    assert done.exists()


def test_the_end_of_a_log_is_not_lost(tmp_path: Path) -> None:
    """Neither an exception's traceback nor what is printed before `os._exit`."""
    code = (
        "import os, sys\nfrom workers.console import keep_output_from_failing, "
        "drain_output\nkeep_output_from_failing()\n"
    )
    failed = subprocess.run(
        program(f"{code}print('last words')\nraise KeyError('x')", tmp_path),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert failed.returncode == 1
    assert failed.stdout == "last words\n"
    assert failed.stderr.endswith("KeyError: 'x'\n")
    left = subprocess.run(
        program(f"{code}print('last words', file=sys.stderr)\ndrain_output()\nos._exit(3)", tmp_path),
        capture_output=True,
        timeout=60,
    )
    assert (left.returncode, left.stderr) == (3, b"last words\n")


def test_closed_descriptors_are_not_given_to_sockets(tmp_path: Path) -> None:
    code = """
        import os, sys, socket
        from pathlib import Path
        from workers.console import keep_output_from_failing
        keep_output_from_failing()
        Path(sys.argv[1]).write_text(str(min(socket.socket().fileno() for _ in range(1))))
    """
    result = tmp_path / "number"
    subprocess.run(["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *program(code, result)], timeout=60, check=True)
    assert int(result.read_text()) > 2


def test_a_signal_handler_may_print_while_its_thread_prints(pipe: tuple[int, int]) -> None:
    output = QueuedOutput(pipe[1])
    with output._changed:
        print("inside", file=output)
    until(lambda: output.drain(0), LIMIT_S)
    assert read_until(pipe[0], b"\n") == b"inside\n"
