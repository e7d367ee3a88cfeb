"""The step loop: the thread of an engine, which turns requests into steps and results into outputs.

While the ranks compute a step, the engine plans and sends the next one, then waits for the first
one's result, so the ranks never wait for it. An executor that has finished when `execute` returns
gets one plan at a time from the same loop.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass

from workers.engine.grammars import GrammarSteps
from workers.engine.heartbeat import StepLoopWatch
from workers.engine.masks import MaskJob
from workers.engine.requests import Deadlines, RequestBook
from workers.engine.step_stats import StepStats
from workers.engine.stream import Notifier, OutputStream
from workers.errors import CantataError, DeadlineExceeded, EngineDead, InvalidRequest
from workers.executor.base import MAX_IN_FLIGHT, Executor
from workers.out_of_memory import WHAT_HELPS, is_out_of_memory
from workers.request import FinishReason
from workers.scheduler.plan import StepPlan, StepResult
from workers.scheduler.scheduler import Scheduler
from workers.scheduler.sequence import Sequence, SequenceUpdate

logger = logging.getLogger(__name__)

SHUTTING_DOWN = "the engine is shutting down"


@dataclass(frozen=True, slots=True)
class _Flight:
    """A plan in flight; `masks` is None if it awaits none."""

    plan: StepPlan
    sent_s: float
    result: "Future[StepResult]"
    masks: MaskJob | None


class StepLoop:
    """The engine's thread: turns requests into plans, and results into stream outputs.

    Args:
        on_death: called on this thread once it has failed for good and every request has ended.
    Attributes:
        error: why it failed, one sentence; None while it has not.
    """

    def __init__(
        self,
        executor: Executor,
        grammars: GrammarSteps,
        requests: RequestBook,
        stats: StepStats,
        watch: StepLoopWatch,
        *,
        stop_token_ids: tuple[int, ...],
        check_integrity: bool,
        on_death: Callable[[], object],
    ) -> None:
        self.error: str | None = None
        self._executor = executor
        self._grammars = grammars
        self._requests = requests
        self._stats = stats
        self._watch = watch
        self._stop_token_ids = stop_token_ids
        self._check_integrity = check_integrity
        self._on_death = on_death
        self._scheduler: Scheduler
        self._thread = threading.Thread(target=self._run, name="cantata-engine", daemon=True)
        self._deadlines = Deadlines()
        self._touched: dict[int, OutputStream] = {}
        self._flights: deque[_Flight] = deque()

    def start(self, scheduler: Scheduler) -> None:
        """Start the thread; it owns the scheduler from now on."""
        self._scheduler = scheduler
        self._thread.start()

    def join(self, timeout_s: float | None) -> bool:
        """Block until the thread has ended; return whether it has, or was never started."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._step()
        except Exception as error:
            # The edge of the engine's thread: after any failure every request must still get its
            # end.
            self._die(error)
        self._grammars.close(self.error or SHUTTING_DOWN)
        self.end_all()
        self._watch.idle()
        if self.error is not None:
            self._on_death()

    def _wait_for_work(self) -> bool:
        """Sleep while there is no work; return False when the engine is to stop."""
        if self._check_integrity and not self._scheduler.has_work and not self._flights:
            self._scheduler.check_integrity()
        self._watch.idle()
        try:
            return self._requests.wait_for_work(lambda: bool(self._flights) or self._scheduler.has_work)
        finally:
            self._watch.busy()

    def _step(self) -> None:
        started_s = time.monotonic()
        self._drain_inbox()
        self._expire(started_s)
        if self._touched:
            self._publish()  # requests that have ended do not wait for the step
        self._scheduler.propose = None if self._grammars.is_empty else self._grammars.propose
        plan = self._scheduler.schedule()
        if plan is not None:
            self._stats.started(plan, [self._requests.get(start.seq_id) for start in plan.starts], started_s)
            self._stats.look()
            self._requests.let_go((), self._scheduler.num_running)
            with self._watch.step():
                plan, masks = self._grammars.plan(plan)
                result = self._executor.execute(plan, None if masks is None else masks.result)
                self._flights.append(_Flight(plan, started_s, result, masks))
        elif not self._flights:
            # schedule() admits whatever fits an idle cache, and check() refused what does not: the
            # wait would never end.
            if self._scheduler.has_work:
                raise RuntimeError("requests are waiting, but none of them can be scheduled")
            self._set_gauges()
            return
        if plan is None or len(self._flights) == MAX_IN_FLIGHT or self._flights[0].result.done():
            self._land(self._flights.popleft())

    def _land(self, flight: _Flight) -> None:
        """Wait for the oldest step and distribute its results."""
        with self._watch.step():
            result = flight.result.result()
        if result.error is not None:
            raise EngineDead(result.error)
        self._stats.num_steps += 1
        for seq_id, sentence in flight.masks.failed.items() if flight.masks is not None else ():
            failed = self._scheduler.abort(seq_id, sentence, "error")
            if failed is not None:
                self._stats.grammar_failed()
                self._apply(failed, InvalidRequest(sentence, "constraint"))
        for update in self._scheduler.update(result):
            self._apply(update)
        self._grammars.advance()
        self._publish()
        if flight.plan.drafts:
            num_drafts = sum(len(drafts) for _, drafts in flight.plan.drafts)
            self._stats.drafts_checked(num_drafts, len(result.token_ids) - len(result.seq_ids))
        self._stats.done(flight.plan, flight.sent_s, len(result.token_ids), result.elapsed_s)
        self._set_gauges()

    def _drain_inbox(self) -> None:
        submitted, aborts = self._requests.take()
        for live in submitted:
            seq_id = live.stream.seq_id
            if live.deadline_s is not None:
                self._deadlines.add(live.deadline_s, seq_id)
            ended = self._scheduler.add(Sequence(seq_id, live.request, self._stop_token_ids))
            if ended is not None:
                self._apply(ended)
            elif live.prepared is not None:
                self._grammars.begin(seq_id, live.request, live.prepared)
        for abort in aborts:
            aborted = self._scheduler.abort(abort.seq_id, abort.reason)
            if aborted is not None:
                self._apply(aborted)

    def _expire(self, now: float) -> None:
        for seq_id in self._deadlines.expired(now):
            sentence = "the request's deadline passed before its last token"
            expired = self._scheduler.abort(seq_id, sentence)
            if expired is not None:
                self._apply(expired, DeadlineExceeded(sentence))

    def _apply(self, update: SequenceUpdate, failure: CantataError | None = None) -> None:
        """Pass an update to its stream; `_publish` notifies the reader."""
        if update.finish_reason is not None:
            self._grammars.end(update.seq_id)
        elif update.token_ids:
            self._grammars.push(update.seq_id, update.token_ids)
        live = self._requests.get(update.seq_id)
        if live is None:  # ended by a shutdown that did not wait for this step
            return
        stream = live.stream
        self._touched[update.seq_id] = stream
        if update.prompt_logprobs:
            stream.push_prompt(update.prompt_logprobs)
        if update.token_ids:
            stream.push(update.token_ids, update.logprobs, update.num_cached_tokens)
        if update.finish_reason is not None:
            self._end(
                stream,
                update.finish_reason,
                stop_token_id=update.stop_token_id,
                error=update.error,
                failure=failure,
            )

    def _publish(self) -> None:
        """Wake the readers, each once, and release the requests that have ended."""
        self._stats.look()
        self._requests.let_go(self._touched.values(), self._scheduler.num_running)
        _notify(self._touched.values())
        self._touched = {}
        self._deadlines.prune(self._requests.num_live, lambda seq_id: self._requests.get(seq_id) is not None)

    def _set_gauges(self) -> None:
        self._stats.set_gauges(self._requests.num_running, self._requests.num_waiting)

    def _die(self, error: Exception) -> None:
        if isinstance(error, EngineDead):
            sentence = error.message
            logger.error("the engine is dead: %s", sentence)
        else:
            sentence = f"the engine failed ({type(error).__name__}); its log has the details"
            if is_out_of_memory(error):
                sentence = f"the engine ran out of memory: {WHAT_HELPS}"
            logger.error("the engine is dead", exc_info=error)
        self.error = sentence
        self._requests.close(sentence, instead=True)

    def end_all(self) -> None:
        """End the remaining requests: with `error` if the engine died, with `abort` if it was
        stopped."""
        left = self._requests.take_all()
        self._stats.ended()
        sentence = self.error or SHUTTING_DOWN
        for stream in left:
            self._end(
                stream, "error" if self.error else "abort", error=sentence, failure=EngineDead(sentence)
            )
        _notify(left)

    def _end(
        self,
        stream: OutputStream,
        reason: FinishReason,
        *,
        stop_token_id: int | None = None,
        error: str | None = None,
        failure: CantataError | None = None,
    ) -> None:
        if stream.end(reason, stop_token_id=stop_token_id, error=error, failure=failure):
            self._stats.request_ended(reason)


def _notify(streams: Iterable[OutputStream]) -> None:
    """Call each reader once, however many of its streams have output."""
    by_notifier: dict[Notifier, list[OutputStream]] = {}
    for stream in streams:
        by_notifier.setdefault(stream.notifier, []).append(stream)
    for notifier, news in by_notifier.items():
        notifier.notify(news)
