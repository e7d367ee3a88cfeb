"""InlineExecutor with a rank whose steps end when the test decides, as on a GPU."""

import threading
from concurrent.futures import wait
from pathlib import Path

import pytest

from tests.support.tiny_model import TINY
from workers.config import EngineConfig
from workers.executor.inline import InlineExecutor
from workers.scheduler.plan import StepPlan, StepResult

TIMEOUT_S = 60.0


class Step:
    awaits_masks = False

    def __init__(self, plan: StepPlan) -> None:
        self.end = threading.Event()
        self._plan = plan

    @property
    def done(self) -> bool:
        return self.end.is_set()

    def result(self) -> StepResult:
        assert self.end.wait(TIMEOUT_S)
        return StepResult(self._plan.step)


class Rank:
    def __init__(self) -> None:
        self.steps: list[Step] = []

    def launch(self, plan: StepPlan) -> Step:
        self.steps.append(Step(plan))
        return self.steps[-1]

    def close(self) -> None:
        pass


def test_the_next_plan_is_taken_while_the_device_runs_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    executor = InlineExecutor(EngineConfig(Path("unused")), TINY)
    rank = Rank()
    monkeypatch.setattr(executor, "_rank", rank)
    futures = [executor.execute(StepPlan(step)) for step in (0, 1)]
    assert not any(future.done() for future in futures)
    for step in rank.steps:
        step.end.set()
    assert not wait(futures, TIMEOUT_S).not_done
    assert [future.result().step for future in futures] == [0, 1]
    executor.shutdown()
    assert executor.execute(StepPlan(2)).result(TIMEOUT_S).error == "the executor has shut down"
