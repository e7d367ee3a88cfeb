"""Prometheus metrics of one engine. Each object has its own registry, so that two engines in one
process stay separate."""

import threading
from functools import partial
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, start_http_server

from workers.request import FinishReason

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
KV_GROUPS = ("full", "sliding")
FINISH_REASONS: tuple[FinishReason, ...] = ("stop", "length", "abort", "error")


class GrammarMetrics:
    """The metrics of grammars, and of the tokens that they force."""

    def __init__(self, registry: CollectorRegistry) -> None:
        counter = partial(Counter, registry=registry)
        histogram = partial(Histogram, registry=registry)
        self.compile_seconds = histogram(
            "cantata_engine_grammar_compile_duration_seconds",
            "Time of compiling one grammar.",
            buckets=_SECONDS,
        )
        self.refused = counter("cantata_engine_refused_grammars", "Grammars that could not be compiled.")
        self.failed = counter(
            "cantata_engine_failed_grammars", "Requests ended because their grammar could not go on."
        )
        self.mask_seconds = histogram(
            "cantata_engine_mask_duration_seconds",
            "Time of computing the masks of one step.",
            buckets=(0.0001, 0.00025, 0.0005, *_SECONDS),
        )
        self.masks = counter("cantata_engine_masks", "Masks computed, one for each token of a grammar.")
        self.drafts = counter("cantata_engine_draft_tokens", "Forced tokens fed ahead, to be checked.")
        self.right_drafts = counter("cantata_engine_accepted_draft_tokens", "Those that were right.")


class EngineMetrics:
    """The metrics of an engine. All series exist from the start, at zero, so that rates are correct
    from the first request."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, registry=self.registry)
        gauge = partial(Gauge, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        self.requests = counter(
            "cantata_engine_requests", "Requests that ended, by finish reason.", ("finish_reason",)
        )
        self.refused = counter(
            "cantata_engine_refused_requests", "Requests refused because the queue was full."
        )
        self.undecodable = counter(
            "cantata_engine_undecodable_messages", "Calls whose message could not be decoded."
        )
        self.prompt_tokens = counter("cantata_engine_prompt_tokens", "Prompt tokens of admitted requests.")
        self.cached_tokens = counter(
            "cantata_engine_cached_tokens", "Prompt tokens found in the prefix cache."
        )
        self.output_tokens = counter("cantata_engine_output_tokens", "Tokens sampled.")
        self.preemptions = counter(
            "cantata_engine_preemptions", "Sequences that lost their KV blocks and wait."
        )
        self.waiting = gauge("cantata_engine_waiting_requests", "Requests accepted but not running.")
        self.running = gauge("cantata_engine_running_requests", "Requests running.")
        self.kv_usage = gauge(
            "cantata_engine_kv_usage_ratio", "Share of a KV group's blocks in use.", ("group",)
        )
        self.step_seconds = histogram(
            "cantata_engine_step_duration_seconds", "Time of one step, schedule to publish.", buckets=_SECONDS
        )
        self.schedule_seconds = histogram(
            "cantata_engine_schedule_duration_seconds",
            "Time of one step outside the executor.",
            buckets=(0.00005, 0.0001, 0.00025, 0.0005, *_SECONDS),
        )
        self.step_tokens = histogram(
            "cantata_engine_step_tokens", "Tokens computed in a step.", buckets=_TOKENS
        )
        self.step_sequences = histogram(
            "cantata_engine_step_sequences", "Sequences in a step.", buckets=_TOKENS
        )
        self.queue_seconds = histogram(
            "cantata_engine_queue_duration_seconds",
            "Time from submission to the first step.",
            buckets=_SECONDS,
        )
        self.grammars = GrammarMetrics(self.registry)
        for reason in FINISH_REASONS:
            self.requests.labels(reason)
        for group in KV_GROUPS:
            self.kv_usage.labels(group)

    def render(self) -> str:
        """Return the registry in Prometheus' text format."""
        return generate_latest(self.registry).decode()


class MetricsServer:
    """A scrape port, on loopback unless another address is given.

    Raises:
        OSError: the port is in use.
    """

    def __init__(self, metrics: EngineMetrics, port: int, host: str = "127.0.0.1") -> None:
        self._server: WSGIServer
        self._thread: threading.Thread
        self._server, self._thread = start_http_server(port, host, metrics.registry)
        self.address = f"{host}:{self._server.server_port}"

    def close(self) -> None:
        """Stop serving; return when the port is free."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
