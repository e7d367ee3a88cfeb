"""What the engine makes of its ranks' results, and of their absence, without ranks."""

import threading
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

from tests.support.tiny_model import TINY
from workers.config import EngineConfig, ParallelConfig
from workers.errors import EngineDead
from workers.executor import channel as wire
from workers.executor import launch_processes
from workers.executor.distributed import DistributedExecutor
from workers.executor.launch_processes import ProcessRanks
from workers.rank.process import RankSpec
from workers.scheduler.plan import StepMasks, StepPlan, StepResult
from workers.scheduler.plan_wire import encode_result

STEP_TIMEOUT_S = 30.0


class Sent:
    """The engine's end of a channel to ranks whose answers the test gives."""

    def __init__(self) -> None:
        self.messages: list[tuple[int, bytes]] = []

    def send(self, rank: int, kind: bytes, body: bytes) -> None:
        self.messages.append((rank, kind))


class AtWork:
    """An executor that has started, on a clock that stands still; nothing else runs."""

    def __init__(self) -> None:
        config = EngineConfig(Path("nowhere"), parallel=ParallelConfig(3, None, STEP_TIMEOUT_S))
        self.now = 100.0
        self.failures: list[str] = []
        self.sent = Sent()
        self.executor = DistributedExecutor(config, TINY, ProcessRanks(), clock=lambda: self.now)
        self.executor.on_failure(self.failures.append)
        self.executor._channel = self.sent  # type: ignore[assignment]

    def execute(self, step: int, masks: "Future[StepMasks] | None" = None) -> "Future[StepResult]":
        return self.executor.execute(StepPlan(step, awaits_masks=masks is not None), masks)

    def answer(self, step: int) -> None:
        self.executor._take(wire.RESULT, encode_result(StepResult(step)))

    def fails_after(self, seconds: float) -> bool:
        """Return whether the step timeout will have passed this many seconds from now."""
        self.now += seconds
        self.executor._check_time()
        return bool(self.failures)


def test_the_step_timeout_starts_anew_with_each_result() -> None:
    """Under load a plan is always in flight, so the time of all of them together says nothing."""
    work = AtWork()
    results = [work.execute(0), work.execute(1)]
    assert work.sent.messages == [(rank, wire.PLAN) for rank in range(3)] * 2
    for step in range(10):
        assert not work.fails_after(20)
        work.answer(step)
        results.append(work.execute(step + 2))
    assert [result.result() for result in results[:10]] == [StepResult(step) for step in range(10)]
    assert not work.fails_after(30)
    assert work.fails_after(0.1)
    sentence = work.failures[0]
    assert sentence.startswith("step 10 has no result after 30 s (engine.parallel.step_timeout_s)")
    assert [result.result() for result in results[10:]] == [
        StepResult(step, error=sentence) for step in (10, 11)
    ]


def test_time_without_a_plan_does_not_count_as_a_step() -> None:
    work = AtWork()
    assert not work.fails_after(1000)
    work.execute(0)
    assert not work.fails_after(30)
    work.answer(0)
    assert not work.fails_after(1000)
    work.execute(1)
    assert not work.fails_after(30)


def test_the_result_of_another_step_ends_everything() -> None:
    work = AtWork()
    results = [work.execute(0), work.execute(1)]
    work.answer(1)
    sentence = "rank 0 answered step 1 instead of step 0"
    assert [result.result(0) for result in results] == [StepResult(step, error=sentence) for step in (0, 1)]
    assert work.failures == [sentence]
    assert work.execute(2).result(0).error == sentence


def test_masks_go_to_the_rank_that_samples_once_they_are_there() -> None:
    work = AtWork()
    masks: Future[StepMasks] = Future()
    result = work.execute(0, masks)
    work.execute(1)
    assert work.sent.messages == [(rank, wire.PLAN) for rank in range(3)] * 2
    masks.set_result(StepMasks(0, np.array([0]), np.full((1, 4), 255, np.uint8)))
    assert work.sent.messages[6:] == [(0, wire.MASKS)]
    work.answer(0)
    assert result.result(0) == StepResult(0)


def test_masks_that_fail_end_the_step_by_name() -> None:
    work = AtWork()
    masks: Future[StepMasks] = Future()
    result = work.execute(0, masks)
    masks.set_exception(MemoryError())
    sentence = "the masks of step 0 failed (MemoryError); the engine's log has the details"
    assert result.result(0).error == sentence
    assert work.failures == [sentence]


def test_a_step_that_waits_for_its_masks_says_so() -> None:
    work = AtWork()
    result = work.execute(0, Future())
    assert work.fails_after(31)
    assert (result.result(0).error or "").startswith("step 0 has no masks of its grammars after 30 s")


def test_a_rank_that_hangs_is_not_taken_for_masks_of_the_next_step() -> None:
    work = AtWork()
    there: Future[StepMasks] = Future()
    there.set_result(StepMasks(0, np.array([0]), np.full((1, 4), 255, np.uint8)))
    result = work.execute(0, there)
    work.execute(1, Future())
    assert work.fails_after(31)
    assert (result.result(0).error or "").startswith("step 0 has no result after 30 s")


def test_masks_that_an_engine_leaves_when_it_stops_are_no_failure_of_a_rank(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The shutdown of the executor follows, and is what ends the step."""
    work = AtWork()
    masks: Future[StepMasks] = Future()
    result = work.execute(0, masks)
    masks.set_exception(EngineDead("the engine is shutting down"))
    assert (work.failures, caplog.messages, result.done()) == ([], [], False)


def test_a_rank_may_die_while_another_one_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its watcher then ends all of them, whatever the launching thread is doing."""
    launcher, start = ProcessRanks(), threading.Thread.start

    def late_start(thread: threading.Thread) -> None:
        launcher.end(0.0)
        start(thread)

    def run(spec: RankSpec, started: "Future[object]", on_exit: object) -> None:
        started.set_exception(OSError("no process is wanted here"))

    monkeypatch.setattr(threading.Thread, "start", late_start)
    monkeypatch.setattr(launch_processes, "_run", run)
    spec = RankSpec("{}", 0, wire.Endpoints("a", "b"), "127.0.0.1", 0, 1, 1)
    with pytest.raises(OSError, match="no process is wanted here"):
        launcher.launch(spec, lambda how, crashed: None)
    launcher.end(0.0)
