"""Figures from records whose times are made up, against values worked out by hand."""

import statistics

import numpy as np
import pytest

from cluster.commands.bench.client import RequestRecord
from cluster.commands.bench.report import Settings, summarise
from cluster.commands.bench.workload import arrival_times

SETTINGS = Settings(
    base_url="http://127.0.0.1:8000",
    endpoint="chat",
    model="m",
    num_prompts=4,
    concurrency=2,
    request_rate=None,
    dataset="random",
    input_len=8,
    output_len=4,
    ignore_eos=False,
    temperature=None,
    seed=0,
    warmup=0,
    timeout_s=1.0,
    max_time_s=1.0,
)


def record(
    started: float, chunks: list[float], ended: float, tokens: int | None = None, error: str | None = None
) -> RequestRecord:
    return RequestRecord(
        started,
        [started + time for time in chunks],
        started + ended,
        prompt_tokens=5,
        output_tokens=tokens,
        error=error,
    )


def test_definitions() -> None:
    records = [
        record(100.0, [0.5, 0.6, 0.9], 1.0, tokens=6),
        record(100.5, [0.25, 0.5], 0.5, tokens=None),
        record(101.0, [0.75], 1.0, tokens=1),
        record(100.9, [0.1], 9.1, tokens=50, error="timeout"),
    ]
    report = summarise(records, SETTINGS, "2026-01-01T00:00:00+00:00")
    assert report.duration_s == pytest.approx(10.0)
    assert (report.num_completed, report.num_failed, report.num_not_sent) == (3, 1, 0)
    assert (report.prompt_tokens, report.output_tokens, report.num_chunks) == (15, 6 + 2 + 1, 6)
    assert report.requests_per_s == pytest.approx(0.3)
    assert report.output_tokens_per_s == pytest.approx(0.9)
    assert report.total_tokens_per_s == pytest.approx(2.4)
    # 100-101, 100.5-101, 101-102 and 100.9-110: the end at 101 comes before the start at 101.
    assert report.peak_concurrency == 3
    assert report.ttft_s is not None
    assert report.ttft_s.mean == pytest.approx((0.5 + 0.25 + 0.75) / 3)
    assert report.ttft_s.p50 == pytest.approx(0.5)
    assert report.ttft_s.p90 == pytest.approx(0.7)
    assert report.ttft_s.p99 == pytest.approx(0.745)
    assert report.ttft_s.max == pytest.approx(0.75)
    assert report.itl_s is not None
    assert report.itl_s.mean == pytest.approx((0.1 + 0.3 + 0.25) / 3)
    assert report.itl_s.p50 == pytest.approx(0.25)
    # One value a request with two tokens or more: (1.0 - 0.5) / 5 and (0.5 - 0.25) / 1.
    assert report.tpot_s is not None
    assert report.tpot_s.mean == pytest.approx((0.1 + 0.25) / 2)
    assert report.latency_s is not None
    assert report.latency_s.mean == pytest.approx(2.5 / 3)


def test_percentiles_agree_with_the_statistics_module() -> None:
    times = np.random.default_rng(0).exponential(size=101).tolist()
    report = summarise([record(0.0, [time], time, tokens=1) for time in times], SETTINGS, "")
    hundredths = statistics.quantiles(times, n=100, method="inclusive")
    assert report.ttft_s is not None
    for value, percent in ((report.ttft_s.p50, 50), (report.ttft_s.p90, 90), (report.ttft_s.p99, 99)):
        assert value == pytest.approx(hundredths[percent - 1], rel=1e-12)


def test_no_records_are_no_figures() -> None:
    report = summarise([], SETTINGS, "")
    assert (report.num_not_sent, report.duration_s, report.requests_per_s, report.ttft_s) == (
        4,
        0.0,
        0.0,
        None,
    )


def test_arrivals_are_a_seeded_poisson_process_of_the_rate() -> None:
    times = arrival_times(4000, 50.0, seed=3)
    gaps = np.diff(times)
    assert times == arrival_times(4000, 50.0, seed=3)
    assert times != arrival_times(4000, 50.0, seed=4)
    assert times[-1] == pytest.approx(80.0)
    assert gaps.min() > 0
    # Exponential gaps: the standard deviation equals the mean (within 5 % for 4000), and a fraction
    # 1/e is longer than the mean.
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.08)
    assert (gaps > gaps.mean()).mean() == pytest.approx(np.exp(-1), abs=0.03)
