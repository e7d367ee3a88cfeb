"""InlineExecutor with a rank whose steps end when the test decides, as on a GPU."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import pytest

from tests.support.tiny_model import TINY
from workers.config import EngineConfig, ParallelConfig
from workers.executor.inline import InlineExecutor
from workers.scheduler.plan import StepMasks, StepPlan, StepResult

TIMEOUT_S = 60.0


class Step:
    def __init__(self, plan: StepPlan) -> None:
        self.end = threading.Event()
        self.awaits_masks = plan.awaits_masks
        self.sampled: list[StepMasks] = []
        self._plan = plan
        self._error: str | None = None

    def sample(self, masks: StepMasks) -> None:
        self.sampled.append(masks)
        self.awaits_masks = False

    def fail(self, sentence: str) -> None:
        self._error, self.awaits_masks = sentence, False
        self.end.set()

    @property
    def done(self) -> bool:
        return self.end.is_set()

    def result(self) -> StepResult:
        assert self.end.wait(TIMEOUT_S)
        assert not self.awaits_masks
        return StepResult(self._plan.step, error=self._error)


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


def executor_of(rank: Rank, monkeypatch: pytest.MonkeyPatch, **settings: object) -> InlineExecutor:
    executor = InlineExecutor(EngineConfig(Path("unused"), **settings), TINY)  # type: ignore[arg-type]
    monkeypatch.setattr(executor, "_rank", rank)
    return executor


def masks_of(step: int) -> StepMasks:
    return StepMasks(step, np.array([0]), np.full((1, 27), 255, np.uint8))


def test_on_a_gpu_the_caller_does_not_wait_for_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may need the result of the step before, which the caller takes. The step after is
    launched when they have come."""
    rank = Rank()
    executor = executor_of(rank, monkeypatch, device="cuda")
    masks: Future[StepMasks] = Future()
    first = executor.execute(StepPlan(0))
    second = executor.execute(StepPlan(1, awaits_masks=True), masks)
    rank.steps[0].end.set()
    assert first.result(TIMEOUT_S).step == 0
    assert not rank.steps[1].sampled
    with ThreadPoolExecutor(1) as thread:
        third = thread.submit(executor.execute, StepPlan(2))
        found = masks_of(1)
        masks.set_result(found)
        result = third.result(TIMEOUT_S)
    assert rank.steps[1].sampled == [found]
    for step in rank.steps:
        step.end.set()
    assert [future.result(TIMEOUT_S).step for future in (second, result)] == [1, 2]
    executor.shutdown()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_masks_that_fail_or_do_not_come_end_the_step_by_name(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = Rank()
    parallel = ParallelConfig(step_timeout_s=0.01)
    executor = executor_of(rank, monkeypatch, device=device, parallel=parallel)
    late = executor.execute(StepPlan(0, awaits_masks=True), Future())
    assert (late.result(TIMEOUT_S).error or "").startswith("step 0 has no masks of its grammars after 0.01 s")
    failed: Future[StepMasks] = Future()
    failed.set_exception(ValueError("secret"))
    error = executor.execute(StepPlan(1, awaits_masks=True), failed).result(TIMEOUT_S).error
    assert error == "the masks of step 1 failed (ValueError); the engine's log has the details"
    executor.shutdown()
