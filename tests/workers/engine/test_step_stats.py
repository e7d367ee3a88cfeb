"""The values of an engine's metrics of steps and of requests that leave the queue."""

from types import SimpleNamespace
from typing import cast

import pytest

from workers.engine import step_stats
from workers.engine.requests import LiveRequest
from workers.engine.step_stats import StepStats
from workers.engine.stream import OutputStream, ThreadReader
from workers.kv_cache.manager import KVCacheManager
from workers.metrics import EngineMetrics
from workers.request import EngineRequest, SamplingParams
from workers.scheduler.plan import SequenceStart, StepPlan
from workers.scheduler.scheduler import Scheduler


def sums(metrics: EngineMetrics, *names: str) -> list[float | None]:
    """Return the sums of histograms."""
    return [metrics.registry.get_sample_value(f"cantata_engine_{name}_sum") for name in names]


def test_a_step_lasts_from_the_end_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.3
    monkeypatch.setattr(step_stats, "time", SimpleNamespace(monotonic=lambda: now))
    metrics = EngineMetrics()
    stats = StepStats(metrics)
    names = ("step_duration_seconds", "schedule_duration_seconds", "step_tokens", "step_sequences")
    stats.done(StepPlan(0, seq_ids=(1, 2), num_scheduled_tokens=(5, 1)), 100.0, 1, 0.25)
    assert sums(metrics, *names) == pytest.approx([0.3, 0.05, 6, 2])
    now = 100.5  # it was sent before the first had ended
    stats.done(StepPlan(1, seq_ids=(1, 2, 3), num_scheduled_tokens=(1, 1, 1)), 100.2, 3, 0.2)
    assert sums(metrics, *names) == pytest.approx([0.5, 0.05, 9, 5])
    now = 103.0  # after a pause
    stats.done(StepPlan(2, seq_ids=(1,), num_scheduled_tokens=(1,)), 102.0, 1, 0.4)
    assert sums(metrics, *names) == pytest.approx([1.5, 0.65, 10, 6])
    assert metrics.registry.get_sample_value("cantata_engine_output_tokens_total") == 5


def test_a_request_is_counted_when_it_leaves_the_queue() -> None:
    """The third is resumed: its output is no prompt, though it was found in the cache. The second
    has ended meanwhile."""
    metrics = EngineMetrics()
    prompts = {4: (10, 0), 5: (20, 16), 6: (30, 48)}  # seq_id: (prompt tokens, tokens found)
    live = {
        seq_id: LiveRequest(
            EngineRequest("r", (1,) * num_prompt, SamplingParams()),
            OutputStream("r", seq_id, ThreadReader()),
            submitted_s=98.0 + seq_id / 8,
            deadline_s=None,
        )
        for seq_id, (num_prompt, _) in prompts.items()
        if seq_id != 5
    }
    plan = StepPlan(
        0,
        starts=tuple(
            SequenceStart(seq_id, (1,) * 60, num_prompt, SamplingParams())
            for seq_id, (num_prompt, _) in prompts.items()
        ),
        seq_ids=(3, 4, 5, 6),
        num_computed_tokens=(99, 0, 16, 48),
        num_scheduled_tokens=(1, 10, 4, 1),
    )
    stats = StepStats(metrics)
    for _ in range(2):  # a sequence that lost its blocks starts again
        stats.started(plan, [live.get(seq_id) for seq_id in prompts], now=100.0)
    value = metrics.registry.get_sample_value
    assert value("cantata_engine_prompt_tokens_total") == 40
    assert value("cantata_engine_cached_tokens_total") == 30
    assert value("cantata_engine_queue_duration_seconds_count") == 2
    assert sums(metrics, "queue_duration_seconds") == pytest.approx([1.5 + 1.25])


def test_gauges_show_what_they_are_named_for() -> None:
    metrics = EngineMetrics()
    stats, scheduler = StepStats(metrics), SimpleNamespace(num_preemptions=3)
    kv = SimpleNamespace(num_free_blocks=(6, 9))
    stats.watch(cast(Scheduler, scheduler), cast(KVCacheManager, kv), {"full": 8, "sliding": 10})
    value = metrics.registry.get_sample_value
    for scheduler.num_preemptions in (3, 4):
        stats.set_gauges(num_running=2, num_waiting=5)
        assert value("cantata_engine_preemptions_total") == scheduler.num_preemptions
    assert value("cantata_engine_running_requests") == 2
    assert value("cantata_engine_waiting_requests") == 5
    usage = "cantata_engine_kv_usage_ratio"
    assert value(usage, {"group": "full"}) == pytest.approx(0.25)
    assert value(usage, {"group": "sliding"}) == pytest.approx(0.1)
