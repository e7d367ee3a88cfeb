"""The engine: one thread that turns requests into steps. It owns the scheduler; other threads
communicate with it through a bounded inbox.

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

from workers.config import EngineConfig, ModelConfig, check_max_model_len
from workers.engine.heartbeat import StepLoopWatch
from workers.engine.requests import Deadlines, RequestBook
from workers.engine.step_stats import StepStats
from workers.engine.stream import Notifier, OutputStream
from workers.errors import CantataError, ConfigError, DeadlineExceeded, EngineDead, Overloaded, RankCrashed
from workers.executor.base import MAX_IN_FLIGHT, Executor, ExecutorInfo
from workers.kv_cache.manager import KVCacheManager
from workers.metrics import EngineMetrics
from workers.out_of_memory import WHAT_HELPS, is_out_of_memory
from workers.request import EngineLoad, EngineRequest, FinishReason
from workers.scheduler.plan import StepPlan, StepResult
from workers.scheduler.scheduler import Scheduler
from workers.scheduler.sequence import Sequence, SequenceUpdate

logger = logging.getLogger(__name__)

_SHUTTING_DOWN = "the engine is shutting down"
_STOP_TIMEOUT_S = 60.0
"""Seconds for which `shutdown` waits for a step in flight."""


@dataclass(frozen=True, slots=True)
class _Flight:
    """A plan in flight."""

    plan: StepPlan
    sent_s: float
    result: "Future[StepResult]"


class Engine:
    """Runs requests on an executor. All methods may be called from any thread.

    Args:
        executor: not yet started; the engine starts it and shuts it down.
        check_integrity: assert the scheduler's invariants whenever the engine becomes idle (tests,
            debugging).
        on_death: called on the engine's thread once the engine has failed for good and every
            request has ended.
    Attributes:
        max_model_len: maximum tokens of a sequence, prompt and output; known once the engine has
            started.
        watch: detects whether the step loop hangs.
    Raises:
        ConfigError: max_model_len exceeds the model's context.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: ModelConfig,
        executor: Executor,
        *,
        metrics: EngineMetrics | None = None,
        check_integrity: bool = False,
        on_death: Callable[[], object] = lambda: None,
    ) -> None:
        check_max_model_len(config, model)
        self.metrics = metrics or EngineMetrics()
        self.max_model_len: int
        self.vocab_size = model.vocab_size
        self._config = config
        self._model = model
        self._executor = executor
        self._scheduler: Scheduler
        self._requests = RequestBook(config.scheduler.max_waiting_requests)
        self._stats = StepStats(self.metrics)
        # Ranks in their own processes are watched by their executor; on a CPU a step may take
        # minutes.
        watched = config.parallel.tensor == 1 and not config.device.startswith("cpu")
        self.watch = StepLoopWatch(config.parallel.step_timeout_s if watched else None)
        self._loop = StepLoop(
            executor,
            self._requests,
            self._stats,
            self.watch,
            stop_token_ids=model.stop_token_ids,
            check_integrity=check_integrity,
            on_death=on_death,
        )

    def start(self) -> ExecutorInfo:
        """Load the model and start the loop; block until requests are accepted.

        Raises:
            CheckpointError, ConfigError: one sentence for the user.
        """
        self._executor.on_failure(self._requests.end_wait)
        info = self._executor.start()
        self.max_model_len = info.max_model_len
        try:
            kv = KVCacheManager(
                num_full_blocks=info.num_full_blocks,
                num_sliding_blocks=info.num_sliding_blocks,
                window=self._model.sliding_window,
                prefix_caching=self._config.cache.prefix_caching,
            )
            self._scheduler = Scheduler(self._config.scheduler, kv, max_model_len=self.max_model_len)
        except ConfigError:
            self._executor.shutdown()
            raise
        capacity = {
            "full": max(info.num_full_blocks - 1, 0),
            "sliding": max(info.num_sliding_blocks - 1, 0),
        }
        self._stats.watch(self._scheduler, kv, capacity)
        self._requests.open()
        self._loop.start(self._scheduler)
        return info

    def submit(self, request: EngineRequest, notifier: Notifier) -> OutputStream:
        """Accept a request that passed `workers.rpc.validate.check_request`; its stream ends with
        exactly one finish reason.

        Raises:
            InvalidRequest, ContextLengthExceeded: the request could never run here.
            Overloaded: the inbox is full.
            EngineDead: the engine is draining, stopped or dead.
        """
        if self._requests.refusal is None:
            self._scheduler.check(request)
        try:
            return self._requests.submit(request, notifier)
        except Overloaded:
            self.metrics.refused.inc()
            raise

    def abort(self, stream: OutputStream, reason: str = "the client left") -> None:
        """End a request with reason `abort` between two steps; do nothing if it has ended."""
        self._requests.abort(stream.seq_id, reason)

    def load(self) -> EngineLoad:
        """Return the engine's current load."""
        return EngineLoad(
            num_running=self._requests.num_running,
            num_waiting=self._requests.num_waiting,
            kv_usage=self._stats.kv_usage,
            accepting=self._requests.refusal is None,
        )

    @property
    def num_steps(self) -> int:
        """Number of completed steps."""
        return self._stats.num_steps

    @property
    def error(self) -> str | None:
        """Reason for the engine's death; None while it is alive."""
        return self._loop.error

    @property
    def crash(self) -> RankCrashed | None:
        """The crash of a rank that ended the engine; None if it is alive or died of another cause.
        Final after `shutdown`."""
        return self._executor.crash if self.error is not None else None

    def wait_stopped(self, timeout_s: float | None = None) -> bool:
        """Block until the loop has ended, by shutdown or by death; return whether it has."""
        return self._loop.join(timeout_s)

    def drain(self, grace_s: float) -> int:
        """Refuse new requests and wait for the live ones; after `grace_s` seconds abort the rest.
        Return the number aborted."""
        self._requests.close(_SHUTTING_DOWN)
        self._requests.wait_until_none(max(grace_s, 0.0))
        num_left = self._requests.abort_all(
            f"the engine is shutting down and its grace period of {grace_s:g} s is over"
        )
        self._requests.wait_until_none(_STOP_TIMEOUT_S)
        return num_left

    def shutdown(self) -> None:
        """Stop after the step in flight; live requests end with `abort`. Idempotent."""
        self._requests.close(_SHUTTING_DOWN)
        self._requests.end_wait()
        if not self.wait_stopped(_STOP_TIMEOUT_S):
            logger.error(
                "the step in flight did not end within %g s; its requests are ended without it",
                _STOP_TIMEOUT_S,
            )
            self._loop.end_all()
        self._executor.shutdown()


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
        plan = self._scheduler.schedule()
        if plan is not None:
            self._stats.started(plan, [self._requests.get(start.seq_id) for start in plan.starts], started_s)
            self._stats.look()
            self._requests.let_go((), self._scheduler.num_running)
            with self._watch.step():
                self._flights.append(_Flight(plan, started_s, self._executor.execute(plan)))
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
        for update in self._scheduler.update(result):
            self._apply(update)
        self._publish()
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
        sentence = self.error or _SHUTTING_DOWN
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
