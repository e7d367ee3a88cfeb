"""Metrics of an engine's steps."""

import time
from collections.abc import Iterable, Mapping

from workers.engine.requests import LiveRequest
from workers.kv_cache.manager import KVCacheManager
from workers.metrics import KV_GROUPS, EngineMetrics
from workers.request import FinishReason
from workers.scheduler.plan import StepPlan
from workers.scheduler.scheduler import Scheduler


class StepStats:
    """Counts steps and measures KV-cache usage. Belongs to the engine's thread.

    Attributes:
        num_steps: number of completed steps.
        kv_usage: fraction of the full group's blocks in use (of the sliding group's, if no layer is
            full), as of the last `look`.
    """

    def __init__(self, metrics: EngineMetrics) -> None:
        self.num_steps = 0
        self.kv_usage = 0.0
        self._metrics = metrics
        self._scheduler: Scheduler
        self._kv: KVCacheManager
        self._capacity: Mapping[str, int] = {}
        self._num_preemptions = 0
        self._last_result_s = 0.0

    def watch(self, scheduler: Scheduler, kv: KVCacheManager, capacity: Mapping[str, int]) -> None:
        """Measure this scheduler and cache from now on.

        Args:
            capacity: number of blocks of each KV group that sequences can have.
        """
        self._scheduler = scheduler
        self._kv = kv
        self._capacity = capacity

    def look(self) -> None:
        """Update `kv_usage`, for other threads."""
        self.kv_usage = self._usage("full" if self._capacity["full"] else "sliding")

    def started(self, plan: StepPlan, requests: Iterable[LiveRequest | None], now: float) -> None:
        """Count requests that leave the queue for the first time.

        Args:
            requests: those of `plan.starts`, in order; None if ended.
        """
        for start, live in zip(plan.starts, requests, strict=True):
            if live is not None and live.waits:
                live.waits = False
                num_cached = plan.num_computed_tokens[plan.seq_ids.index(start.seq_id)]
                self._metrics.queue_seconds.observe(now - live.submitted_s)
                self._metrics.prompt_tokens.inc(start.num_prompt_tokens)
                self._metrics.cached_tokens.inc(min(num_cached, start.num_prompt_tokens))

    def done(self, plan: StepPlan, sent_s: float, num_sampled: int, executor_s: float) -> None:
        """Record a step whose result has been distributed.

        Args:
            sent_s: when it was sent to the ranks.
            executor_s: seconds that the ranks took.
        """
        now = time.monotonic()
        # A step begins when it was sent or, if the ranks were still busy, when the previous step
        # ended.
        total_s = now - max(sent_s, self._last_result_s)
        self._last_result_s = now
        self._metrics.output_tokens.inc(num_sampled)
        self._metrics.step_seconds.observe(total_s)
        self._metrics.schedule_seconds.observe(max(total_s - executor_s, 0.0))
        self._metrics.step_tokens.observe(sum(plan.num_scheduled_tokens))
        self._metrics.step_sequences.observe(len(plan.seq_ids))

    def set_gauges(self, num_running: int, num_waiting: int) -> None:
        """Set the gauges shown between steps."""
        self._metrics.preemptions.inc(self._scheduler.num_preemptions - self._num_preemptions)
        self._num_preemptions = self._scheduler.num_preemptions
        self._metrics.running.set(num_running)
        self._metrics.waiting.set(num_waiting)
        for group in KV_GROUPS:
            self._metrics.kv_usage.labels(group).set(self._usage(group))

    def grammar_compiled(self, seconds: float, succeeded: bool) -> None:
        """Count a grammar that was compiled or refused; called from any thread."""
        if succeeded:
            self._metrics.grammars.compile_seconds.observe(seconds)
        else:
            self._metrics.grammars.refused.inc()

    def masks_computed(self, seconds: float, num_rows: int) -> None:
        """Record the masks of a step; called from the thread that computes them."""
        if num_rows:
            self._metrics.grammars.mask_seconds.observe(seconds)
            self._metrics.grammars.masks.inc(num_rows)

    def grammar_failed(self) -> None:
        """Count a request that its grammar has ended."""
        self._metrics.grammars.failed.inc()

    def drafts_checked(self, num_drafts: int, num_right: int) -> None:
        """Count the drafts of a step."""
        self._metrics.grammars.drafts.inc(num_drafts)
        self._metrics.grammars.right_drafts.inc(num_right)

    def request_ended(self, reason: FinishReason) -> None:
        """Count a request that has ended."""
        self._metrics.requests.labels(reason).inc()

    def ended(self) -> None:
        """Set the gauges of an engine that has ended: nothing is running or in use."""
        self.kv_usage = 0.0
        self._metrics.running.set(0)
        self._metrics.waiting.set(0)
        for group in KV_GROUPS:
            self._metrics.kv_usage.labels(group).set(0)

    def _usage(self, group: str) -> float:
        free = dict(zip(KV_GROUPS, self._kv.num_free_blocks, strict=True))[group]
        capacity = self._capacity[group]
        return 1.0 - free / capacity if capacity else 0.0
