"""An executor without a model, which takes the next plan while it runs one, as a GPU does."""

import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from threading import Thread

import numpy as np
import numpy.typing as npt
from torch import Tensor

from workers.errors import RankCrashed
from workers.executor.base import ExecutorInfo
from workers.scheduler.masks import wait_for_masks
from workers.scheduler.plan import StepMasks, StepPlan, StepResult

_MASKS_TIMEOUT_S = 60.0


class PretendedExecutor:
    """An executor whose steps take a fixed time and then wait for their masks.

    Args:
        num_blocks: of each group of the KV cache.
        step_s: duration of a step.
    Attributes:
        most_in_flight: largest number of plans without a result.
        num_steps: number of steps that have ended.
        waits_s: for each step with masks, the seconds that it waited for them.
    """

    def __init__(self, *, max_model_len: int, num_blocks: int, step_s: float = 0.0) -> None:
        self.crash: RankCrashed | None = None
        self.most_in_flight = self.num_steps = 0
        self.waits_s: list[float] = []
        self._info = ExecutorInfo("none", "none", 1, max_model_len, num_blocks, num_blocks, 0, 0, {}, {})
        self._step_s = step_s
        self._num_prompt_tokens: dict[int, int] = {}
        self._in_flight = 0
        self._plans: queue.SimpleQueue[
            tuple[StepPlan, Future[StepMasks] | None, Future[StepResult]] | None
        ] = queue.SimpleQueue()
        self._thread = Thread(target=self._run, daemon=True)

    def draw(self, seq_id: int, position: int, bits: npt.NDArray[np.uint8] | None) -> int:
        """Return the token of a sequence at an output position.

        Args:
            bits: the tokens of its mask, one bit each; None: it has no mask.
        """
        raise NotImplementedError

    def begin(self, plan: StepPlan) -> None:
        """Take in what is new in a plan; called before its tokens are drawn."""

    def start(self) -> ExecutorInfo:
        self._thread.start()
        return self._info

    def on_failure(self, callback: Callable[[str], None]) -> None:
        pass

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        raise NotImplementedError("there is no model")

    def execute(self, plan: StepPlan, masks: "Future[StepMasks] | None" = None) -> "Future[StepResult]":
        future: Future[StepResult] = Future()
        self._in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self._in_flight)
        self._plans.put((plan, masks, future))
        return future

    def shutdown(self) -> None:
        self._plans.put(None)
        self._thread.join(_MASKS_TIMEOUT_S)

    def _run(self) -> None:
        ends_s = 0.0
        while (entry := self._plans.get()) is not None:
            plan, masks, future = entry
            ends_s = max(ends_s, time.perf_counter()) + self._step_s
            time.sleep(max(ends_s - time.perf_counter(), 0.0))
            try:
                found = None
                if masks is not None:
                    waited = time.perf_counter()
                    found = wait_for_masks(plan.step, masks, _MASKS_TIMEOUT_S)
                    self.waits_s.append(time.perf_counter() - waited)
                    ends_s = max(ends_s, time.perf_counter())
                result = self._result(plan, found)
            except Exception as error:
                result = StepResult(plan.step, error=str(error))
            self.num_steps += 1
            self._in_flight -= 1
            future.set_result(result)

    def _result(self, plan: StepPlan, masks: StepMasks | None) -> StepResult:
        for start in plan.starts:
            self._num_prompt_tokens[start.seq_id] = start.num_prompt_tokens
        self.begin(plan)
        bits = {} if masks is None else dict(zip(masks.rows.tolist(), masks.bits, strict=True))
        drafts = dict(plan.drafts)
        tokens: dict[int, list[int]] = {}
        row = 0
        for index, (seq_id, computed, scheduled, samples) in enumerate(
            zip(plan.seq_ids, plan.num_computed_tokens, plan.num_scheduled_tokens, plan.samples, strict=True)
        ):
            if samples:
                guessed = drafts.get(index, ())
                first = computed + scheduled - len(guessed) - self._num_prompt_tokens[seq_id]
                tokens[seq_id] = []
                for nth, guess in enumerate((*guessed, None)):
                    tokens[seq_id].append(self.draw(seq_id, first + nth, bits.get(row + nth)))
                    if tokens[seq_id][-1] != guess:
                        break
                row += 1 + len(guessed)
        flat = tuple(token_id for found in tokens.values() for token_id in found)
        counts = tuple(map(len, tokens.values())) if drafts else ()
        return StepResult(plan.step, tuple(tokens), flat, num_tokens=counts)
