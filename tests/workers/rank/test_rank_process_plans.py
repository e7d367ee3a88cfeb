"""The order of launches and results in a rank's loop, with steps whose length the test sets."""

from collections import deque

import pytest

from workers.executor import channel as wire
from workers.rank import process as rank_process
from workers.rank.process import EngineLink, EngineLost, Stopped
from workers.rank.rank import LaunchedStep
from workers.scheduler.plan import StepPlan, StepResult
from workers.scheduler.plan_wire import decode_result, encode_plan


class Step(LaunchedStep):
    def __init__(self, plan: StepPlan, log: list[str]) -> None:
        self.finished = False
        self._pending = None
        self._plan, self._log = plan, log

    @property
    def done(self) -> bool:
        return self.finished

    def result(self) -> StepResult:
        assert self.finished
        self._log.append(f"result {self._plan.step}")
        return StepResult(self._plan.step)


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
    the oldest step on the GPU."""

    def __init__(self, rank: Rank, script: list[int | str]) -> None:
        self._rank, self._script = rank, deque(script)
        self.sent: list[int] = []

    def receive(self, timeout_s: float) -> tuple[bytes, bytes] | None:
        entry = self._script.popleft()
        if entry == "stop":
            return wire.STOP, b""
        if entry == "finish":
            next(step for step in self._rank.steps if not step.finished).finished = True
            return None
        assert isinstance(entry, int)
        return wire.PLAN, encode_plan(StepPlan(entry))

    def send(self, kind: bytes, body: bytes) -> None:
        assert kind == wire.RESULT
        self.sent.append(decode_result(body).step)


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
