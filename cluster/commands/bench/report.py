"""The figures of a benchmark from its request records, as a table and as JSON.

Definitions (vLLM `bench serve`, `calculate_metrics`), over the requests that got a complete answer:

- TTFT, time to first token: from sending to the first chunk with output.
- ITL, inter-token latency: the times between consecutive chunks with output, of all requests
  together. A chunk may hold several tokens.
- TPOT, time per output token: (latency - TTFT) / (output tokens - 1), one value per request with at
  least two tokens.
- latency (vLLM: E2EL): from sending to the last chunk with a choice.
- throughput: answers, output tokens, prompt and output tokens, each divided by the duration of the
  run.
- percentiles: linear interpolation (numpy's default).

Output tokens are the server's own count (`usage`). If it sends none, chunks are counted;
`num_without_usage` is the number of such requests.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import orjson

from cluster.commands.bench.client import RequestRecord

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Distribution:
    """Statistics of a set of times, in seconds."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of the run; part of the JSON, so that it can be repeated.

    Attributes:
        concurrency: requests in flight; None if they are sent at `request_rate` per second
            regardless of those running.
        input_len: prompt tokens requested from the random dataset; None with a file.
        dataset: `random` or the file's name.
    """

    base_url: str
    endpoint: str
    model: str
    num_prompts: int
    concurrency: int | None
    request_rate: float | None
    dataset: str
    input_len: int | None
    output_len: int
    ignore_eos: bool
    temperature: float | None
    seed: int
    warmup: int
    timeout_s: float
    max_time_s: float


@dataclass(frozen=True, slots=True)
class Report:
    """The result of a run; the JSON file has exactly these fields.

    Attributes:
        started_at: UTC, ISO 8601.
        duration_s: from the first request sent to the end of the last.
        num_completed, num_failed, num_not_sent: add up to settings.num_prompts; those not sent were
        cut off by max_time_s.
        errors: failed requests by kind: `http_<status>`, `connect`, `disconnected`, `timeout`,
            `stream_error` (an error event in the stream), `bad_response`, `empty`, `cut_off` (still
            running at max_time_s).
        error_examples: the first failure of each kind in one sentence.
        num_without_usage: completed requests whose output tokens were counted as chunks.
        num_chunks: number of chunks with output.
        peak_concurrency: maximum number of requests in flight.
        ttft_s, itl_s, tpot_s, latency_s: null without a value.
    """

    format_version: int
    started_at: str
    settings: Settings
    duration_s: float
    num_completed: int
    num_failed: int
    num_not_sent: int
    errors: dict[str, int]
    error_examples: dict[str, str]
    num_without_usage: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    num_chunks: int
    peak_concurrency: int
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    ttft_s: Distribution | None
    itl_s: Distribution | None
    tpot_s: Distribution | None
    latency_s: Distribution | None

    def to_json(self) -> bytes:
        return orjson.dumps(asdict(self), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def summarise(records: Sequence[RequestRecord], settings: Settings, started_at: str) -> Report:
    """Compute the report from a run's records, without warm-up requests."""
    completed = [record for record in records if record.error is None]
    failed = [record for record in records if record.error is not None]
    duration = max((record.ended for record in records), default=0.0) - min(
        (record.started for record in records), default=0.0
    )
    prompt_tokens = sum(record.prompt_tokens or 0 for record in completed)
    output_tokens = sum(map(num_output_tokens, completed))
    return Report(
        format_version=FORMAT_VERSION,
        started_at=started_at,
        settings=settings,
        duration_s=duration,
        num_completed=len(completed),
        num_failed=len(failed),
        num_not_sent=settings.num_prompts - len(records),
        errors=dict(sorted(Counter(str(record.error) for record in failed).items())),
        error_examples={str(record.error): record.detail for record in reversed(failed)},
        num_without_usage=sum(record.output_tokens is None for record in completed),
        prompt_tokens=prompt_tokens,
        cached_tokens=sum(record.cached_tokens or 0 for record in completed),
        output_tokens=output_tokens,
        num_chunks=sum(len(record.chunk_times) for record in completed),
        peak_concurrency=_peak_concurrency(records),
        requests_per_s=_rate(len(completed), duration),
        output_tokens_per_s=_rate(output_tokens, duration),
        total_tokens_per_s=_rate(prompt_tokens + output_tokens, duration),
        ttft_s=distribution(
            record.chunk_times[0] - record.started for record in completed if record.chunk_times
        ),
        itl_s=distribution(gap for record in completed for gap in np.diff(record.chunk_times)),
        tpot_s=distribution(_times_per_output_token(completed)),
        latency_s=distribution(record.ended - record.started for record in completed),
    )


def num_output_tokens(record: RequestRecord) -> int:
    """Return the server's count of output tokens, or the number of chunks."""
    return len(record.chunk_times) if record.output_tokens is None else record.output_tokens


def table(report: Report) -> str:
    """Return the report as a table, with times in milliseconds."""
    lines = [
        f"{'completed':<28}{report.num_completed} of {report.settings.num_prompts}",
        *(
            f"{'failed: ' + kind:<28}{count}   {report.error_examples[kind]}"
            for kind, count in report.errors.items()
        ),
        *([f"{'not sent (--max-time)':<28}{report.num_not_sent}"] if report.num_not_sent else []),
        f"{'duration':<28}{report.duration_s:.2f} s",
        f"{'peak concurrency':<28}{report.peak_concurrency}",
        f"{'prompt tokens':<28}{report.prompt_tokens} ({report.cached_tokens} cached)",
        f"{'output tokens':<28}{report.output_tokens} in {report.num_chunks} chunks",
        *(
            [f"{'counted by chunks':<28}{report.num_without_usage} requests: no usage"]
            if report.num_without_usage
            else []
        ),
        f"{'requests/s':<28}{report.requests_per_s:.2f}",
        f"{'output tokens/s':<28}{report.output_tokens_per_s:.1f}",
        f"{'prompt + output tokens/s':<28}{report.total_tokens_per_s:.1f}",
        "",
        f"{'ms':<28}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}{'max':>10}",
    ]
    for name, values in (
        ("time to first token", report.ttft_s),
        ("inter-token latency", report.itl_s),
        ("time per output token", report.tpot_s),
        ("latency", report.latency_s),
    ):
        cells = ["-"] * 5 if values is None else [f"{value * 1e3:.2f}" for value in asdict(values).values()]
        lines.append(f"{name:<28}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


def _times_per_output_token(records: Iterable[RequestRecord]) -> Iterable[float]:
    for record in records:
        tokens = num_output_tokens(record)
        if tokens > 1 and record.chunk_times:
            yield (record.ended - record.chunk_times[0]) / (tokens - 1)


def distribution(values: Iterable[float]) -> Distribution | None:
    """Return the statistics of the values; None without a value."""
    array = np.fromiter(values, dtype=np.float64)
    if not len(array):
        return None
    p50, p90, p99 = np.percentile(array, (50, 90, 99)).tolist()
    return Distribution(float(array.mean()), p50, p90, p99, float(array.max()))


def _rate(count: int, duration_s: float) -> float:
    return count / duration_s if duration_s > 0 else 0.0


def _peak_concurrency(records: Sequence[RequestRecord]) -> int:
    # At equal times an end is counted before a start.
    changes = sorted([(record.started, 1) for record in records] + [(record.ended, -1) for record in records])
    peak = running = 0
    for _, change in changes:
        running += change
        peak = max(peak, running)
    return peak
