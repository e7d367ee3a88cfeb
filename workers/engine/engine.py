"""The engine: one thread that turns requests into steps. It owns the scheduler; other threads talk
to it through a bounded inbox.

While the ranks compute a step, the engine plans and sends the next one, then waits for the first
one's result: the ranks need not wait for it. An executor that is done when `execute` returns gets
one plan at a time by the same loop.
"""

import heapq
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass

from workers.config import EngineConfig, ModelConfig, check_max_model_len
from workers.engine.heartbeat import StepLoopWatch
from workers.engine.stream import Notifier, OutputStream
from workers.errors import CantataError, ConfigError, DeadlineExceeded, EngineDead, Overloaded, RankCrashed
from workers.executor.base import MAX_IN_FLIGHT, Executor, ExecutorInfo
from workers.kv_cache.manager import KVCacheManager
from workers.metrics import KV_GROUPS, EngineMetrics
from workers.out_of_memory import WHAT_HELPS, is_out_of_memory
from workers.request import EngineLoad, EngineRequest, FinishReason
from workers.scheduler.plan import StepPlan, StepResult
from workers.scheduler.scheduler import Scheduler
from workers.scheduler.sequence import Sequence, SequenceUpdate

logger = logging.getLogger(__name__)

_STOP_TIMEOUT_S = 60.0
"""How long `shutdown` waits for a step in flight."""


@dataclass(slots=True)
class _Live:
    """A request that has not ended. `waits` until its first step."""

    request: EngineRequest
    stream: OutputStream
    submitted_s: float
    deadline_s: float | None
    waits: bool = True


@dataclass(frozen=True, slots=True)
class _Flight:
    """A plan on its way."""

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
        max_model_len: tokens of a sequence at most, prompt and output; known once the engine has
            started.
        watch: whether the step loop hangs.
    Raises:
        ConfigError: max_model_len is set to more than the model's context.
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
        self._check_integrity = check_integrity
        self._on_death = on_death
        self._scheduler: Scheduler
        self._kv: KVCacheManager
        self._capacity: dict[str, int] = {}
        # Ranks in processes of their own are watched by their executor, on a CPU a step may take
        # minutes.
        watched = config.parallel.tensor == 1 and not config.device.startswith("cpu")
        self.watch = StepLoopWatch(config.parallel.step_timeout_s if watched else None)
        self._thread = threading.Thread(target=self._run, name="cantata-engine", daemon=True)
        # Engine thread only.
        self._deadlines: list[tuple[float, int]] = []
        self._num_preemptions = 0
        self._touched: dict[int, OutputStream] = {}
        self._flights: deque[_Flight] = deque()
        self._last_result_s = 0.0
        self._num_steps = 0
        # Guarded by _changed, which is notified on every change that somebody may wait for.
        self._changed = threading.Condition()
        self._inbox: deque[_Live] = deque()
        self._aborts: deque[tuple[int, str]] = deque()
        self._live: dict[int, _Live] = {}
        self._next_seq_id = 0
        self._num_running = 0
        self._kv_usage = 0.0
        self._refusal: str | None = "the engine has not started"
        self._stopping = False
        self._executor_error: str | None = None
        self._error: str | None = None

    def start(self) -> ExecutorInfo:
        """Load the model and start the loop; blocks until requests can come.

        Raises:
            CheckpointError, ConfigError: one sentence for the user.
        """
        self._executor.on_failure(self._note_executor_failure)
        info = self._executor.start()
        self.max_model_len = info.max_model_len
        try:
            self._kv = KVCacheManager(
                num_full_blocks=info.num_full_blocks,
                num_sliding_blocks=info.num_sliding_blocks,
                window=self._model.sliding_window,
                prefix_caching=self._config.cache.prefix_caching,
            )
            self._scheduler = Scheduler(self._config.scheduler, self._kv, max_model_len=self.max_model_len)
        except ConfigError:
            self._executor.shutdown()
            raise
        self._capacity = {
            "full": max(info.num_full_blocks - 1, 0),
            "sliding": max(info.num_sliding_blocks - 1, 0),
        }
        self._refusal = None
        self._thread.start()
        return info

    def submit(self, request: EngineRequest, notifier: Notifier) -> OutputStream:
        """Take a request that passed `workers.rpc.validate.check_request`; its stream ends with
        exactly one finish reason.

        Raises:
            InvalidRequest, ContextLengthExceeded: it could never run here.
            Overloaded: the inbox is full.
            EngineDead: the engine is draining, stopped or dead.
        """
        if self._refusal is None:
            self._scheduler.check(request)
        now = time.monotonic()
        with self._changed:
            if self._refusal is not None:
                raise EngineDead(self._refusal)
            if len(self._live) - self._num_running >= self._config.scheduler.max_waiting_requests:
                self.metrics.refused.inc()
                raise Overloaded(
                    f"{self._config.scheduler.max_waiting_requests} requests wait already; try again later"
                )
            stream = OutputStream(request.request_id, self._next_seq_id, notifier)
            self._next_seq_id += 1
            live = _Live(
                request, stream, now, None if request.deadline_s is None else now + request.deadline_s
            )
            self._live[stream.seq_id] = live
            self._inbox.append(live)
            self._changed.notify_all()
        return stream

    def abort(self, stream: OutputStream, reason: str = "the client left") -> None:
        """End a request with reason `abort`, between two steps; nothing happens if it has ended."""
        with self._changed:
            if stream.seq_id in self._live:
                self._aborts.append((stream.seq_id, reason))
                self._changed.notify_all()

    def load(self) -> EngineLoad:
        """How busy the engine is now."""
        with self._changed:
            return EngineLoad(
                num_running=self._num_running,
                num_waiting=max(len(self._live) - self._num_running, 0),
                kv_usage=self._kv_usage,
                accepting=self._refusal is None,
            )

    @property
    def num_steps(self) -> int:
        """Steps done so far."""
        return self._num_steps

    @property
    def error(self) -> str | None:
        """Why the engine died; None while it has not."""
        return self._error

    @property
    def crash(self) -> RankCrashed | None:
        """The crash of a rank of which the engine died; None: it has not, or of something else.
        Final after `shutdown`."""
        return self._executor.crash if self._error is not None else None

    def wait_stopped(self, timeout_s: float | None = None) -> bool:
        """Block until the loop has ended, by shutdown or by death; whether it has."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def drain(self, grace_s: float) -> int:
        """Take no more requests and wait for the live ones; after `grace_s` seconds abort those
        left. Returns how many these were."""
        with self._changed:
            if self._refusal is None:
                self._refusal = "the engine is shutting down"
            self._changed.wait_for(lambda: not self._live, timeout=max(grace_s, 0.0))
            left = list(self._live)
            reason = f"the engine is shutting down and its grace period of {grace_s:g} s is over"
            self._aborts.extend((seq_id, reason) for seq_id in left)
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._live, timeout=_STOP_TIMEOUT_S)
        return len(left)

    def shutdown(self) -> None:
        """Stop after the step in flight; live requests end with `abort`. Idempotent."""
        with self._changed:
            if self._refusal is None:
                self._refusal = "the engine is shutting down"
            self._stopping = True
            self._changed.notify_all()
        if self._thread.ident is not None and not self.wait_stopped(_STOP_TIMEOUT_S):
            logger.error(
                "the step in flight has not ended after %g s; its requests are ended without it",
                _STOP_TIMEOUT_S,
            )
            self._end_all()
        self._executor.shutdown()

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._step()
        except Exception as error:
            # The edge of the engine's thread: whatever broke, no request may be left without an
            # end.
            self._die(error)
        self._end_all()
        self.watch.idle()
        if self._error is not None:
            self._on_death()

    def _wait_for_work(self) -> bool:
        """Sleep while there is nothing to do; False once the engine is to stop."""
        if self._check_integrity and not self._scheduler.has_work and not self._flights:
            self._scheduler.check_integrity()
        with self._changed:
            self.watch.idle()
            self._changed.wait_for(
                lambda: (
                    self._stopping
                    or self._executor_error
                    or self._inbox
                    or self._aborts
                    or self._flights
                    or self._scheduler.has_work
                )
            )
            self.watch.busy()
            if self._executor_error is not None and not self._stopping:
                raise EngineDead(self._executor_error)
            return not self._stopping

    def _note_executor_failure(self, sentence: str) -> None:
        with self._changed:
            self._executor_error = sentence
            self._changed.notify_all()

    def _step(self) -> None:
        started_s = time.monotonic()
        self._drain_inbox()
        self._expire(started_s)
        if self._touched:
            self._publish()  # those that ended do not wait for the step
        plan = self._scheduler.schedule()
        if plan is not None:
            self._note_started(plan, started_s)
            with self.watch.step():
                self._flights.append(_Flight(plan, started_s, self._executor.execute(plan)))
        elif not self._flights:
            # schedule() admits whatever fits an idle cache, and check() refused what does not:
            # waiting on would be for ever.
            if self._scheduler.has_work:
                raise RuntimeError("requests wait, but none of them can be scheduled")
            self._set_gauges()
            return
        if plan is None or len(self._flights) == MAX_IN_FLIGHT or self._flights[0].result.done():
            self._land(self._flights.popleft())

    def _land(self, flight: _Flight) -> None:
        """Wait for the oldest step and hand out what it brought."""
        with self.watch.step():
            result = flight.result.result()
        if result.error is not None:
            raise EngineDead(result.error)
        self._num_steps += 1
        for update in self._scheduler.update(result):
            self._apply(update)
        self._publish()
        now = time.monotonic()
        # A step begins when it was sent or, if the ranks were busy with the one before, when that
        # one ended.
        step_s = now - max(flight.sent_s, self._last_result_s)
        self._last_result_s = now
        self._measure(flight.plan, len(result.token_ids), step_s, result.elapsed_s)

    def _drain_inbox(self) -> None:
        with self._changed:
            submitted, aborts = list(self._inbox), list(self._aborts)
            self._inbox.clear()
            self._aborts.clear()
        for live in submitted:
            seq_id = live.stream.seq_id
            if live.deadline_s is not None:
                heapq.heappush(self._deadlines, (live.deadline_s, seq_id))
            ended = self._scheduler.add(Sequence(seq_id, live.request, self._model.stop_token_ids))
            if ended is not None:
                self._apply(ended)
        for seq_id, reason in aborts:
            aborted = self._scheduler.abort(seq_id, reason)
            if aborted is not None:
                self._apply(aborted)

    def _expire(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            _, seq_id = heapq.heappop(self._deadlines)
            sentence = "the request's deadline passed before its last token"
            expired = self._scheduler.abort(seq_id, sentence)
            if expired is not None:
                self._apply(expired, DeadlineExceeded(sentence))

    def _note_started(self, plan: StepPlan, now: float) -> None:
        """Count what leaves the queue for the first time."""
        for start in plan.starts:
            live = self._live.get(start.seq_id)
            if live is not None and live.waits:
                live.waits = False
                num_cached = plan.num_computed_tokens[plan.seq_ids.index(start.seq_id)]
                self.metrics.queue_seconds.observe(now - live.submitted_s)
                self.metrics.prompt_tokens.inc(start.num_prompt_tokens)
                self.metrics.cached_tokens.inc(min(num_cached, start.num_prompt_tokens))
        with self._changed:
            self._take_snapshot()

    def _apply(self, update: SequenceUpdate, failure: CantataError | None = None) -> None:
        """Hand an update to its stream; the reader hears of it in `_publish`."""
        live = self._live.get(update.seq_id)
        if live is None:  # ended by a shutdown that did not wait for this step
            return
        stream = live.stream
        self._touched[update.seq_id] = stream
        if update.token_id is not None:
            stream.push(update.token_id, update.logprobs, update.num_cached_tokens)
        if update.finish_reason is not None:
            self._end(
                stream,
                update.finish_reason,
                stop_token_id=update.stop_token_id,
                error=update.error,
                failure=failure,
            )

    def _publish(self) -> None:
        """Wake the readers, each once, and let go of the requests that ended."""
        with self._changed:
            for seq_id, stream in self._touched.items():
                if stream.ended:
                    self._live.pop(seq_id, None)
            self._take_snapshot()
            self._changed.notify_all()
        _notify(self._touched.values())
        self._touched = {}
        if len(self._deadlines) > 2 * len(self._live) + 64:
            self._deadlines = [entry for entry in self._deadlines if entry[1] in self._live]
            heapq.heapify(self._deadlines)

    def _take_snapshot(self) -> None:
        """Copy for other threads what only this one may read; the caller holds the lock."""
        self._num_running = self._scheduler.num_running
        self._kv_usage = self._group_usage("full" if self._capacity["full"] else "sliding")

    def _group_usage(self, group: str) -> float:
        free = dict(zip(KV_GROUPS, self._kv.num_free_blocks, strict=True))[group]
        capacity = self._capacity[group]
        return 1.0 - free / capacity if capacity else 0.0

    def _measure(self, plan: StepPlan, num_sampled: int, total_s: float, executor_s: float) -> None:
        self.metrics.output_tokens.inc(num_sampled)
        self.metrics.step_seconds.observe(total_s)
        self.metrics.schedule_seconds.observe(max(total_s - executor_s, 0.0))
        self.metrics.step_tokens.observe(sum(plan.num_scheduled_tokens))
        self.metrics.step_sequences.observe(len(plan.seq_ids))
        self._set_gauges()

    def _set_gauges(self) -> None:
        self.metrics.preemptions.inc(self._scheduler.num_preemptions - self._num_preemptions)
        self._num_preemptions = self._scheduler.num_preemptions
        self.metrics.running.set(self._num_running)
        self.metrics.waiting.set(self.load().num_waiting)
        for group in KV_GROUPS:
            self.metrics.kv_usage.labels(group).set(self._group_usage(group))

    def _die(self, error: Exception) -> None:
        if isinstance(error, EngineDead):
            sentence = error.message
            logger.error("the engine is dead: %s", sentence)
        else:
            sentence = f"the engine failed ({type(error).__name__}); its log has the details"
            if is_out_of_memory(error):
                sentence = f"the engine has no memory left: {WHAT_HELPS}"
            logger.error("the engine is dead", exc_info=error)
        with self._changed:
            self._error = sentence
            self._refusal = sentence

    def _end_all(self) -> None:
        """End what is left: with `error` if the engine died, with `abort` if it was told to
        stop."""
        with self._changed:
            left = [live.stream for live in self._live.values()]
            self._live.clear()
            self._inbox.clear()
            self._num_running = 0
            self._kv_usage = 0.0
            self._changed.notify_all()
        self.metrics.running.set(0)
        self.metrics.waiting.set(0)
        for group in KV_GROUPS:
            self.metrics.kv_usage.labels(group).set(0)
        sentence = self._error or "the engine is shutting down"
        for stream in left:
            self._end(
                stream, "error" if self._error else "abort", error=sentence, failure=EngineDead(sentence)
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
            self.metrics.requests.labels(reason).inc()


def _notify(streams: Iterable[OutputStream]) -> None:
    """One call for each reader, however many of its streams have news."""
    by_notifier: dict[Notifier, list[OutputStream]] = {}
    for stream in streams:
        by_notifier.setdefault(stream.notifier, []).append(stream)
    for notifier, news in by_notifier.items():
        notifier.notify(news)
