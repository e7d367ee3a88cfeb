"""The order of launches and results in a rank's loop, with steps whose length the test sets."""

import time
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest

from workers.executor import channel as wire
from workers.rank import process as rank_process
from workers.rank.process import EngineLink, EngineLost, Stopped
from workers.rank.rank import LaunchedStep
from workers.scheduler.plan import StepMasks, StepPlan, StepResult
from workers.scheduler.plan_wire import decode_result, encode_masks, encode_plan


class Step(LaunchedStep):
    def __init__(self, plan: StepPlan, log: list[str]) -> None:
        self.finished = False
        self._plan, self._log = plan, log
        self._waits = plan.awaits_masks
        self._error: str | None = None

    @property
    def awaits_masks(self) -> bool:
        return self._waits

    def sample(self, masks: StepMasks) -> None:
        self._log.append(f"sample {self._plan.step} with {masks.rows.tolist()}")
        self._waits = False

    def fail(self, sentence: str) -> None:
        self._error, self._waits, self.finished = sentence, False, True

    @property
    def done(self) -> bool:
        return self.finished and not self._waits

    def result(self) -> StepResult:
        assert self.done
        self._log.append(f"result {self._plan.step}")
        return StepResult(self._plan.step, error=self._error)


class Rank:
    def __init__(self, log: list[str]) -> None:
        self.steps: list[Step] = []
        self._log = log

    def launch(self, plan: StepPlan) -> Step:
        self._log.append(f"launch {plan.step}")
        self.steps.append(Step(plan, self._log))
        return self.steps[-1]


class Channel:
    """A channel that delivers a script, one entry a call: a step number is that plan, "finish" ends
    the oldest step on the GPU, "awaits 2" is plan 2, which awaits masks, and "masks 2" are these.
    After its end nothing comes, and `sleep` passes the time."""

    def __init__(self, rank: Rank, script: list[int | str]) -> None:
        self._rank, self._script = rank, deque(script)
        self.sent: list[int] = []
        self.errors: list[str] = []
        self.now_s = 0.0
        self.num_looks = 0

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def receive(self, timeout_s: float) -> tuple[bytes, bytes] | None:
        if not self._script:
            self.num_looks += 1
            assert self.num_looks < 1000, "the rank's thread never rests"
            return None
        entry = self._script.popleft()
        if entry == "stop":
            return wire.STOP, b""
        if entry == "finish":
            next(step for step in self._rank.steps if not step.finished).finished = True
            return None
        if isinstance(entry, int):
            return wire.PLAN, encode_plan(StepPlan(entry))
        kind, step = entry.split()
        if kind == "awaits":
            return wire.PLAN, encode_plan(StepPlan(int(step), awaits_masks=True))
        assert kind == "masks"
        return wire.MASKS, encode_masks(StepMasks(int(step), np.array([3]), np.full((1, 4), 255, np.uint8)))

    def send(self, kind: bytes, body: bytes) -> None:
        assert kind == wire.RESULT
        result = decode_result(body)
        self.sent.append(result.step)
        if result.error is not None:
            self.errors.append(result.error)
            self._script.append("stop")


def run(script: list[int | str], number: int = 0) -> tuple[list[str], list[int]]:
    log: list[str] = []
    rank = Rank(log)
    channel = Channel(rank, script)
    with pytest.raises(Stopped):
        rank_process._run_plans(number, rank, channel, EngineLink(channel, 60), 30.0)
    return log, channel.sent


def test_a_plan_that_comes_while_the_gpu_runs_is_launched_at_once() -> None:
    log, sent = run([0, 1, "finish", 2, "finish", "finish", "stop"])
    assert log == ["launch 0", "launch 1", "result 0", "launch 2", "result 1", "result 2"]
    assert sent == [0, 1, 2]


def test_results_do_not_wait_for_the_next_plan() -> None:
    log, sent = run([0, "finish", 1, "finish", "stop"])
    assert log == ["launch 0", "result 0", "launch 1", "result 1"]
    assert sent == [0, 1]


def test_other_ranks_take_their_results_but_are_silent() -> None:
    log, sent = run([0, 1, "finish", "finish", "stop"], number=1)
    assert log == ["launch 0", "launch 1", "result 0", "result 1"]
    assert sent == []


def test_a_step_waits_for_its_masks_and_the_result_before_is_sent_meanwhile() -> None:
    log, sent = run([0, "awaits 1", "finish", "masks 1", "finish", "stop"])
    assert log == ["launch 0", "launch 1", "result 0", "sample 1 with [3]", "result 1"]
    assert sent == [0, 1]


def test_the_next_plan_may_come_before_the_masks() -> None:
    log, sent = run([0, "awaits 1", "finish", "awaits 2", "masks 1", "masks 2", "finish", "finish", "stop"])
    assert log == [
        *("launch 0", "launch 1", "result 0", "sample 1 with [3]", "launch 2", "sample 2 with [3]"),
        *("result 1", "result 2"),
    ]
    assert sent == [0, 1, 2]


def test_a_step_without_its_masks_fails_in_time_and_its_thread_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    rank = Rank(log)
    channel = Channel(rank, ["awaits 0"])
    clocks = SimpleNamespace(sleep=channel.sleep, perf_counter=time.perf_counter)
    monkeypatch.setattr(rank_process, "time", clocks)
    with pytest.raises(Stopped):
        rank_process._run_plans(0, rank, channel, EngineLink(channel, 60, lambda: channel.now_s), 0.01)
    assert channel.sent == [0]
    assert channel.errors[0].startswith(
        "step 0 has no masks of its grammars after 0.01 s (engine.parallel.step_timeout_s)"
    )


class Silence:
    """A channel on which an engine sends a script, and time that passes while the rank listens."""

    def __init__(self, script: list[bytes | None]) -> None:
        self._script = deque(script)
        self.now_s = 0.0

    def receive(self, timeout_s: float) -> tuple[bytes, bytes] | None:
        said = self._script.popleft()
        self.now_s += timeout_s if said is None else 0.0
        return None if said is None else (said, b"")


def listen(script: list[bytes | None]) -> tuple[tuple[bytes, bytes], float]:
    channel = Silence(script)
    # 2.5 s of silence are too much, and a look takes one second.
    return EngineLink(channel, 2.5, lambda: channel.now_s).wait(), channel.now_s


def test_an_engine_that_says_nothing_for_too_long_is_lost() -> None:
    with pytest.raises(EngineLost):
        listen([None, None, None])
    assert listen([None, None, wire.PLAN]) == ((wire.PLAN, b""), 2.0)
    assert listen([None, None, wire.ALIVE, None, None, wire.ALIVE, wire.PLAN]) == ((wire.PLAN, b""), 4.0)
    with pytest.raises(EngineLost):
        listen([wire.ALIVE, None, None, None])
