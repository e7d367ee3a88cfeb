"""Detection of a hang, and of pauses that are not one."""

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.fake_executor import MODEL, FakeExecutor
from tests.support.waiting import until
from workers.config import EngineConfig, ParallelConfig
from workers.engine import heartbeat
from workers.engine.engine import Engine
from workers.engine.heartbeat import BEAT_S, StepLoopWatch, beat, say_to
from workers.engine.stream import ThreadReader
from workers.errors import ConfigError
from workers.request import EngineRequest, SamplingParams

CONFIG = EngineConfig(Path("nowhere"))
LONG_PROMPT = EngineRequest("r", tuple(range(1, 400)), SamplingParams(max_tokens=3, ignore_eos=True))


class Running:
    """An engine whose steps wait for a gate, on a clock that stands still."""

    def __init__(self, config: EngineConfig = CONFIG) -> None:
        self.now = 100.0
        self.executor = FakeExecutor()
        self.engine = Engine(config, MODEL, self.executor)
        self.engine.watch._clock = lambda: self.now
        self.engine.start()

    def submit(self) -> Callable[[], object]:
        reader = ThreadReader()
        stream = self.engine.submit(LONG_PROMPT, reader)
        return lambda: list(reader.read([stream]))


@pytest.fixture
def running() -> Iterator[Running]:
    running = Running()
    yield running
    running.executor.gate.set()
    running.engine.shutdown()


async def beats_go_on(watch: StepLoopWatch, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Return whether three heartbeats come; False: none came in many turns."""
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.001)
    num_beats, turns = 0, 0

    def say() -> None:
        nonlocal num_beats
        num_beats += 1

    beating = asyncio.create_task(beat(watch, say))
    async with asyncio.timeout(20):
        while num_beats < 3 and turns < 50:
            await asyncio.sleep(0.001)
            turns += 1
    beating.cancel()
    return num_beats >= 3


async def test_a_step_of_a_minute_is_no_hang(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    running.executor.gate.clear()
    finish = running.submit()
    assert await asyncio.to_thread(running.executor.entered.wait, 20)
    for _ in range(7):
        running.now += 10.0
        assert running.engine.watch.stalled_s == 0.0
    assert await beats_go_on(running.engine.watch, monkeypatch)
    running.executor.gate.set()
    await asyncio.to_thread(finish)
    until(lambda: running.engine.watch._stalls_at_s is None, 20)  # it waits for the next request
    running.now += 3600.0
    assert running.engine.watch.stalled_s == 0.0


async def test_a_step_loop_that_is_stuck_between_steps_hangs(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, stuck = threading.Event(), threading.Event()
    schedule = running.engine._scheduler.schedule

    def stick() -> object:
        entered.set()
        assert stuck.wait(30)
        return schedule()

    monkeypatch.setattr(running.engine._scheduler, "schedule", stick)
    finish = running.submit()
    assert await asyncio.to_thread(entered.wait, 20)
    running.now += BEAT_S
    assert running.engine.watch.stalled_s == BEAT_S
    running.now += 60.0
    assert running.engine.watch.stalled_s == 60.0 + BEAT_S
    assert not await beats_go_on(running.engine.watch, monkeypatch)
    stuck.set()
    await asyncio.to_thread(finish)


@pytest.mark.parametrize(
    ("device", "tensor", "limited"),
    [("cpu", 1, False), ("cpu", 2, False), ("cuda", 1, True), ("cuda:1", 1, True), ("cuda", 2, False)],
)
def test_a_step_of_a_gpu_in_the_engine_s_process_has_a_limit(device: str, tensor: int, limited: bool) -> None:
    parallel = ParallelConfig(tensor, step_timeout_s=30.0)
    watch = Engine(replace(CONFIG, device=device, parallel=parallel), MODEL, FakeExecutor()).watch
    now = 0.0
    watch._clock = lambda: now
    with watch.step():
        now = 29.0
        assert watch.stalled_s == 0.0
        now = 45.0
        assert watch.stalled_s == (15.0 if limited else 0.0)


def test_a_heartbeat_that_is_not_read_blocks_nothing() -> None:
    reading, writing = os.pipe()
    say = say_to(writing, b"x" * 999 + b"\n")
    for _ in range(200):  # more than a pipe holds
        say()
    lines = os.read(reading, 1 << 20)
    assert len(lines) >= 1000
    assert set(lines.splitlines()) == {b"x" * 999}, "only whole lines"
    os.close(reading)
    say()  # into a pipe that none reads
    os.close(writing)


@pytest.mark.parametrize("seconds", [1.0, float("nan"), float("inf")])
def test_the_limit_is_longer_than_a_beat(seconds: float) -> None:
    with pytest.raises(ConfigError, match="heartbeat_timeout_s must be at least 2"):
        EngineConfig(Path("nowhere"), heartbeat_timeout_s=seconds)
