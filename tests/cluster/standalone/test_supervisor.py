"""Engine children: started, watched, restarted, stopped. The children are small scripts that speak
the engine's start-up protocol."""

import asyncio
import os
import re
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.standalone import supervisor
from cluster.standalone.process_session import end_session, live_members
from cluster.standalone.supervisor import EngineFailed, EngineProcess, watch_children_without_threads
from tests.support.tiny_model import write_tiny_checkpoint
from workers.config import CacheConfig, EngineConfig, ParallelConfig
from workers.config_json import engine_config_to_json
from workers.exit_codes import exit_code_of_crashed_rank

CHILD = """
import json, os, signal, sys
print(json.dumps({"event": "ready", "address": f"127.0.0.1:{os.getpid()}", "start_id": "1"}), flush=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
while True:
    signal.pause()
"""


async def until(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what is waited for happens in another process
            await asyncio.sleep(0.01)


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def is_rank(pid: int) -> bool:
    return b"workers.rank.process" in Path(f"/proc/{pid}/cmdline").read_bytes()


def address(engine: EngineProcess) -> str | None:
    return engine.replica.address if engine.replica else None


def child(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.fixture
async def engine(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[EngineProcess]:
    monkeypatch.setattr(supervisor, "FIRST_BACKOFF_S", 0.01)
    process = EngineProcess("engine", child(CHILD))
    yield process
    await process.stop(5)


async def test_a_child_is_started_and_stopped(engine: EngineProcess) -> None:
    changes: list[str | None] = []
    engine._on_change = lambda: changes.append(address(engine))
    await engine.start(20)
    pid = engine.pid
    assert pid is not None
    assert address(engine) == f"127.0.0.1:{pid}"
    await engine.stop(5)
    assert gone(pid)
    assert engine.pid is None
    assert changes == [f"127.0.0.1:{pid}", None]


async def test_a_dead_child_has_no_address_and_is_replaced(engine: EngineProcess) -> None:
    await engine.start(20)
    addresses: list[str | None] = [address(engine)]
    engine._on_change = lambda: addresses.append(address(engine))
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    await until(lambda: engine.num_restarts == 1)
    assert addresses[1] is None
    assert addresses[2] == address(engine)
    assert address(engine) not in (None, addresses[0])


async def test_a_child_that_cannot_start_again_is_tried_with_growing_pauses(
    engine: EngineProcess, tmp_path: Path
) -> None:
    marker = tmp_path / "broken"
    engine._command = child(f"import os, sys\nif os.path.exists({str(marker)!r}): sys.exit(3)\n" + CHILD)
    await engine.start(20)
    marker.touch()
    first = engine._backoff_s
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    await until(lambda: engine._backoff_s >= 4 * first)
    assert engine.replica is None
    marker.unlink()
    await until(lambda: engine.replica is not None)


async def test_a_child_is_replaced_although_its_supervisor_has_no_memory(
    engine: EngineProcess, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What fails is the look for the child's descendants, then twice the start of a child."""
    failures: list[Exception] = [OSError("Too many open files"), MemoryError(), RuntimeError("no thread")]
    make = asyncio.create_subprocess_exec

    async def no_memory(*arguments: Any, **options: Any) -> Any:
        if failures:
            raise failures.pop()
        return await make(*arguments, **options)

    async def no_files(session: int, timeout_s: float) -> list[int]:
        if len(failures) == 3:
            raise failures.pop(0)
        return await end_session(session, timeout_s)

    await engine.start(20)
    monkeypatch.setattr(asyncio, "create_subprocess_exec", no_memory)
    monkeypatch.setattr(supervisor, "end_session", no_files)
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    await until(lambda: engine.num_restarts == 1)
    assert failures == []
    assert caplog.text.count("engine could not be replaced") == 3


async def test_the_pause_is_bounded(engine: EngineProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "LONGEST_BACKOFF_S", 0.02)
    await engine.start(20)
    for restart in range(3):
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        await until(lambda restart=restart: engine.num_restarts == restart + 1)
        assert engine._backoff_s <= 0.02


async def test_a_first_start_that_fails_is_one_sentence() -> None:
    process = EngineProcess("engine", child("import sys; sys.exit(1)"))
    with pytest.raises(EngineFailed, match=r"^engine did not start \(exit code 1\)$") as failed:
        await process.start(20)
    assert failed.value.explained
    assert process.pid is None
    process = EngineProcess(
        "engine", child(f"import sys; sys.exit({exit_code_of_crashed_rank(signal.SIGABRT)})")
    )
    with pytest.raises(EngineFailed, match=r"^engine did not start \(a rank's signal SIGABRT\)$") as failed:
        await process.start(20)
    assert failed.value.explained
    process = EngineProcess("engine", child("import sys; sys.exit(2)"))
    with pytest.raises(EngineFailed, match=r"^engine did not start \(exit code 2\)$") as failed:
        await process.start(20)
    assert not failed.value.explained
    process = EngineProcess("engine", child("import os; os.abort()"))
    with pytest.raises(EngineFailed, match=r"^engine did not start \(signal SIGABRT\)$") as failed:
        await process.start(20)
    assert not failed.value.explained
    process = EngineProcess("engine", child("import sys; sys.exit(3)"))
    with pytest.raises(EngineFailed) as failed:
        await process.start(20)
    assert (failed.value.code, failed.value.explained) == (3, False), "only with exit code 1 has it said why"


async def test_lines_before_the_message_are_passed_over(engine: EngineProcess) -> None:
    engine._command = child("print('a library says hello\\n{}\\n[1]')\n" + CHILD)
    await engine.start(20)
    assert address(engine) == f"127.0.0.1:{engine.pid}"


async def test_a_start_that_fails_leaves_nothing_that_it_started(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = (
        "import os, subprocess, sys\nsubprocess.Popen(['sleep', '600'])\n"
        f"open({str(pid)!r}, 'w').write(str(os.getpid()))\nsys.exit(1)"
    )
    process = EngineProcess("engine", child(code))
    try:
        with pytest.raises(EngineFailed):
            await process.start(20)
        assert live_members(int(pid.read_text())) == []
    finally:
        await end_session(int(pid.read_text()), 20)


class NoMemory:
    """OomKills of a kernel that has killed what ended by SIGKILL."""

    def explain(self, code: int) -> bool:
        return code == -signal.SIGKILL


async def test_a_start_that_the_kernel_ends_for_want_of_memory_is_explained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code = "import os\nos.kill(os.getpid(), 9)"
    with pytest.raises(EngineFailed, match=r"^engine did not start \(signal SIGKILL\)$"):
        await EngineProcess("engine", child(code)).start(20)
    monkeypatch.setattr(supervisor, "OomKills", NoMemory)
    with pytest.raises(EngineFailed, match=r"SIGKILL, from the kernel.*out of memory.*--kv-cache-memory"):
        await EngineProcess("engine", child(code)).start(20)


async def test_an_engine_that_finds_no_memory_is_replaced_while_it_can_start(
    engine: EngineProcess, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervisor, "OomKills", NoMemory)
    monkeypatch.setattr(supervisor, "LONGEST_BACKOFF_S", 0.02)
    await engine.start(20)
    for restart in range(supervisor.MAX_SAME_CRASHES + 1):
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        await until(lambda restart=restart: engine.num_restarts == restart + 1)
    assert "--kv-cache-memory" in caplog.text
    engine._command = child("import os\nos.kill(os.getpid(), 9)")
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    async with asyncio.timeout(20):
        await engine.given_up.wait()
    assert "--kv-cache-memory" in engine.failure


async def test_an_illegal_instruction_is_explained_and_tried_once(tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    code = f"import os, signal\nopen({str(starts)!r}, 'a').write('x')\nos.kill(os.getpid(), signal.SIGILL)"
    process = EngineProcess("engine", child(code))
    sentence = re.escape("engine did not start (signal SIGILL, an instruction that this processor lacks: ")
    with pytest.raises(
        EngineFailed, match=f"^{sentence}.*--cpu-isa.*CANTATA_CPU_ISA.*portable.*reference"
    ) as failed:
        await process.start(20)
    assert (failed.value.code, failed.value.explained) == (-signal.SIGILL, False)
    assert starts.read_text() == "x"


@pytest.mark.parametrize("own", [True, False])
async def test_a_served_engine_that_only_dies_of_an_instruction_is_given_up(
    engine: EngineProcess, own: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The engine is given up whether or not it serves in between, and whether it dies itself or
    because a rank did."""
    starts = tmp_path / "starts"
    dies = (
        "os.kill(os.getpid(), signal.SIGILL)"
        if own
        else f"os._exit({exit_code_of_crashed_rank(signal.SIGILL)})"
    )
    count = f"\nfile = open({str(starts)!r}, 'a'); file.write('x'); file.close()\n"
    # Each second start serves for a moment.
    die = f"if len(open({str(starts)!r}).read()) % 2: print('{{}}', flush=True)\n{dies}\n"
    await engine.start(20)
    engine._command = child(
        "import os, signal" + count + die.replace("{}", '{"address": "a", "start_id": "1"}')
    )
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGILL)
    async with asyncio.timeout(20):
        await engine.given_up.wait()
    assert engine._watch is not None
    await engine._watch
    assert starts.read_text() == "xxxx"
    assert engine.replica is None
    assert engine.pid is None
    whose = "signal" if own else "a rank's signal"
    assert engine.failure.startswith(
        f"engine crashed 5 times in a row and will not be restarted ({whose} SIGILL, "
    )
    assert "--cpu-isa or CANTATA_CPU_ISA" in engine.failure
    assert engine.failure in caplog.text


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(("number", "given_up"), [(signal.SIGSEGV, True), (signal.SIGKILL, False)])
async def test_the_same_crash_at_start_is_given_up(
    engine: EngineProcess, number: signal.Signals, given_up: bool, own: bool, tmp_path: Path
) -> None:
    starts = tmp_path / "starts"
    await engine.start(20)
    dies = (
        f"os.kill(os.getpid(), {number.value})" if own else f"os._exit({exit_code_of_crashed_rank(number)})"
    )
    engine._command = child(
        f"import os\nfile = open({str(starts)!r}, 'a'); file.write('x'); file.close()\n{dies}"
    )
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGSEGV)  # while it serves, this does not count
    # One that is killed may have been in the way of others, and is tried on.
    await until(lambda: engine.given_up.is_set() or (starts.exists() and len(starts.read_text()) >= 7))
    assert engine.given_up.is_set() == given_up
    if given_up:
        assert len(starts.read_text()) == supervisor.MAX_SAME_CRASHES


async def test_the_signal_of_a_real_rank_reaches_the_supervisor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(supervisor, "MAX_SAME_CRASHES", 1)
    config = EngineConfig(
        write_tiny_checkpoint(tmp_path),
        dtype="float32",
        max_model_len=256,
        cache=CacheConfig(4 << 20),
        parallel=ParallelConfig(3),
    )
    process = EngineProcess(
        "engine", [sys.executable, "-m", "workers.engine", "--config", engine_config_to_json(config)]
    )
    try:
        await process.start(300)
        assert process.pid is not None
        ranks = [pid for pid in live_members(process.pid) if is_rank(pid)]
        assert len(ranks) == 3
        os.kill(ranks[1], signal.SIGILL)
        async with asyncio.timeout(60):
            await process.given_up.wait()
    finally:
        await process.stop(5)
    assert (
        "(a rank's signal SIGILL, an instruction that this processor lacks: set --cpu-isa" in process.failure
    )
    [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.match(
        r"error: rank \d ended with signal SIGILL, an instruction .*CANTATA_CPU_ISA.*reference", line
    )


@pytest.mark.parametrize("name", ["SIGILL", "SIGSEGV", "SIGBUS", "SIGFPE", "SIGABRT"])
async def test_what_is_a_crash(name: str) -> None:
    process, crash = EngineProcess("engine", []), -signal.Signals[name].value
    for other in (1, 3, -signal.SIGKILL, -signal.SIGTERM, None):
        assert not any(process._gives_up(other) for _ in range(2 * supervisor.MAX_SAME_CRASHES))
    assert [process._gives_up(crash) for _ in range(supervisor.MAX_SAME_CRASHES)] == [False] * 4 + [True]
    assert name in process.failure


async def test_crashes_far_apart_are_not_counted(
    engine: EngineProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "STABLE_AFTER_S", 0.0)
    await engine.start(20)
    for restart in range(supervisor.MAX_SAME_CRASHES + 1):
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGILL)
        await until(lambda restart=restart: engine.num_restarts == restart + 1)
        assert engine._backoff_s == 2 * supervisor.FIRST_BACKOFF_S, "the next restart is quick again"
    assert not engine.given_up.is_set()


async def test_a_first_start_that_hangs_is_ended() -> None:
    process = EngineProcess("engine", child("import signal\nwhile True: signal.pause()"))
    start = asyncio.create_task(process.start(0.5))
    await until(lambda: process.pid is not None)
    pid = process.pid
    assert pid is not None
    with pytest.raises(EngineFailed, match="did not start within"):
        await start
    assert gone(pid)


async def test_a_child_that_does_not_end_is_killed() -> None:
    deaf = CHILD.replace("signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))", "").replace(
        "print(", "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint(", 1
    )
    process = EngineProcess("engine", child(deaf))
    await process.start(20)
    pid = process.pid
    assert pid is not None
    await process.stop(0.2)
    assert gone(pid)


async def test_a_cancelled_start_leaves_no_child() -> None:
    process = EngineProcess("engine", child("import signal\nwhile True: signal.pause()"))
    start = asyncio.create_task(process.start(60))
    await until(lambda: process.pid is not None)
    pid = process.pid
    assert pid is not None
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert gone(pid)


async def test_a_talkative_child_does_not_block(engine: EngineProcess, tmp_path: Path) -> None:
    marker = tmp_path / "written"
    talk = f"print('x' * 10_000_000, flush=True)\nopen({str(marker)!r}, 'w').close()\nwhile True:"
    engine._command = child(CHILD.replace("while True:", talk))
    await engine.start(20)
    await until(marker.exists)
    assert address(engine) == f"127.0.0.1:{engine.pid}", "it serves, and is the one that was started"


BEATING = CHILD.replace(
    "    signal.pause()",
    "    time.sleep(0.05); num_beats += 1; print(num_beats, flush=True); open(sys.argv[1], "
    "'w').write(str(num_beats))",
).replace("import json", "num_beats = 0\nimport time, json")


async def test_a_child_without_a_heartbeat_is_killed_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(supervisor, "TURN_S", 0.1)
    beats = tmp_path / "beats"
    process = EngineProcess("engine", [*child(BEATING), str(beats)], heartbeat_timeout_s=3)
    await process.start(20)
    pid = process.pid
    assert pid is not None
    await until(lambda: beats.exists() and int(beats.read_text() or 0) > 80)  # four seconds
    assert process.pid == pid
    os.kill(pid, signal.SIGSTOP)
    await until(lambda: process.num_restarts == 1)
    assert gone(pid)
    assert process.pid not in (None, pid)
    await process.stop(5)


WITH_DESCENDANT = """
import json, os, signal, subprocess, sys
from cluster.standalone.process_session import live_members
left = [pid for session in open(sys.argv[1]).read().split() for pid in live_members(int(session))]
sleeper = subprocess.Popen(["sleep", "600"])
sleeper.send_signal(signal.SIGSTOP)
open(sys.argv[1], "a").write(f"{os.getpid()} ")
print(json.dumps({"event": "ready", "address": str(len(left)), "start_id": "1"}), flush=True)
sleeper.wait()
"""


async def test_what_a_dead_child_has_started_is_gone_before_the_next_one_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is stopped (SIGSTOP) is ended too: it would keep its memory, of a GPU for
    example."""
    monkeypatch.setattr(supervisor, "FIRST_BACKOFF_S", 0.01)
    (tmp_path / "started").touch()
    process = EngineProcess("engine", [*child(WITH_DESCENDANT), str(tmp_path / "started")])
    await process.start(20)
    first = process.pid
    assert first is not None
    assert len(live_members(first)) == 2
    os.kill(first, signal.SIGKILL)
    await until(lambda: process.num_restarts == 1)
    assert address(process) == "0", "the first child's descendant was there when the second one started"
    second = process.pid
    assert second is not None
    await process.stop(0)
    assert live_members(second) == []


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="the kernel has no pidfd")
def test_a_child_s_end_needs_no_thread() -> None:
    """A gateway without memory for a thread must still see that an engine has ended, and start
    another."""

    async def threads_while_a_child_runs() -> tuple[list[str], int]:
        process = await asyncio.create_subprocess_exec("cat", stdin=asyncio.subprocess.PIPE)
        names = [thread.name for thread in threading.enumerate()]
        await process.communicate(b"")
        return names, await process.wait()

    before = [thread.name for thread in threading.enumerate()]
    watch_children_without_threads()
    try:
        names, code = asyncio.run(threads_while_a_child_runs())
    finally:
        if sys.version_info < (3, 12):
            asyncio.set_child_watcher(None)
    assert sorted(names) == sorted(before)
    assert code == 0
