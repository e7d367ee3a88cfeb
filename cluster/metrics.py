"""Prometheus metrics of one gateway, and the page that merges them with those of its engines."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families

from cluster.events import FinishReason
from cluster.harmony.header import Repair

_LATENCIES_S = (
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    120.0,
    300.0,
    600.0,
)
_TOKEN_GAPS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class GatewayMetrics:
    """The counters and histograms of a gateway. Label values come from our own code only, never
    from a client; series whose labels are known beforehand exist from the start, at zero."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, registry=self.registry)
        gauge = partial(Gauge, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        self.requests = counter(
            "cantata_gateway_requests",
            "Requests answered, by endpoint and final status.",
            ("endpoint", "status"),
        )
        self.ignored_fields = counter(
            "cantata_gateway_ignored_fields",
            "Fields of requests that this server does not know and ignored, by endpoint.",
            ("endpoint",),
        )
        self.finished_choices = counter(
            "cantata_gateway_finished_choices", "Choices completed, by finish reason.", ("finish_reason",)
        )
        self.in_flight = gauge("cantata_gateway_in_flight_requests", "Choices being generated.")
        self.prompt_tokens = counter(
            "cantata_gateway_prompt_tokens", "Prompt tokens of generations that began."
        )
        self.cached_tokens = counter(
            "cantata_gateway_cached_tokens", "Prompt tokens found in a prefix cache."
        )
        self.output_tokens = counter("cantata_gateway_output_tokens", "Tokens generated, reasoning included.")
        self.reasoning_tokens = counter("cantata_gateway_reasoning_tokens", "Tokens of reasoning.")
        self.time_to_first_token = histogram(
            "cantata_gateway_time_to_first_token_seconds",
            "Time from a request's arrival to its first token.",
            buckets=_LATENCIES_S,
        )
        self.inter_token = histogram(
            "cantata_gateway_inter_token_latency_seconds",
            "Time between two tokens of a choice; tokens that come together share it.",
            buckets=_TOKEN_GAPS_S,
        )
        self.duration = histogram(
            "cantata_gateway_request_duration_seconds",
            "Time from a request's arrival to its end, however it ended.",
            buckets=_LATENCIES_S,
        )
        self.retries = counter(
            "cantata_gateway_retries", "Sequences tried again on another replica, by the refusal.", ("error",)
        )
        self.resumptions = counter(
            "cantata_gateway_resumptions",
            "Sequences that went on at another replica after their first token.",
        )
        self.repairs = counter(
            "cantata_harmony_repairs",
            "Departures of model output from the harmony format, by kind.",
            ("kind",),
        )
        self._add_constraints(counter)
        self._add_continuity(counter)
        for reason in get_args(FinishReason):
            self.finished_choices.labels(reason)
        for kind in get_args(Repair):
            self.repairs.labels(kind)

    def _add_continuity(self, counter: "partial[Counter]") -> None:
        self.restored_reasoning = counter(
            "cantata_gateway_restored_reasoning",
            "Calls of this server that came back without their reasoning: it was kept (hit) or not (miss).",
            ("result",),
        )
        for result in ("hit", "miss"):
            self.restored_reasoning.labels(result)

    def _add_constraints(self, counter: "partial[Counter]") -> None:
        self.structured_requests = counter(
            "cantata_gateway_structured_requests",
            "Requests for a form of the answer, by its kind, or for a call.",
            ("kind",),
        )
        self.reasoning_cuts = counter(
            "cantata_gateway_reasoning_cuts", "Choices whose reasoning was ended by a limit."
        )
        self.schema_fallbacks = counter(
            "cantata_gateway_schema_fallbacks",
            "Tools whose schema could not be enforced, so that their arguments have its types alone or may "
            "be any JSON object; counted once for each set of tools.",
        )
        self.constraints_left_out = counter(
            "cantata_gateway_constraints_left_out",
            "Sequences without the deployment's constraint, which could not be made or run.",
            ("reason",),
        )

    def render(self) -> str:
        """Return the registry in Prometheus' text format."""
        return generate_latest(self.registry).decode()


@dataclass(frozen=True, slots=True)
class Scrape:
    """The metrics of one process.

    Attributes:
        process: `gateway` or `engine`.
        replica: the replica's id; empty for a gateway.
        text: in Prometheus' text format; None if the process did not answer.
        gateway: the gateway's id if there may be several; empty for an engine.
    """

    process: str
    replica: str
    text: str | None
    gateway: str = ""


class FleetView(Protocol):
    """A gateway's view of the processes with which it does not communicate directly."""

    async def gateways(self, own: str) -> Sequence[Scrape]:
        """Return the metrics of all gateways.

        Args:
            own: this gateway's metrics.
        """

    async def wanted_replicas(self, num_listed: int) -> int:
        """Return the number of replicas that there should be.

        Args:
            num_listed: number of replicas this gateway knows, including those that are restarting.
        """


class OneGateway:
    """The FleetView of a single gateway that starts its engines itself."""

    async def gateways(self, own: str) -> Sequence[Scrape]:
        """Return only `own` (see FleetView)."""
        return [Scrape("gateway", "", own)]

    async def wanted_replicas(self, num_listed: int) -> int:
        """Return the number of replicas (see FleetView)."""
        return num_listed


def merge(scrapes: Sequence[Scrape], wanted_replicas: int) -> str:
    """Merge the metrics of all processes into one page.

    Each sample gets the labels `process`, `replica` and `gateway`, each family appears once, and
    `cantata_process_up` reports which processes answered. A text that cannot be parsed counts as no
    answer.

    Args:
        wanted_replicas: number of replicas that there should be.
    """
    families: dict[str, Metric] = {}
    up = GaugeMetricFamily(
        "cantata_process_up",
        "Whether the process answered this scrape with its metrics.",
        labels=("process", "replica", "gateway"),
    )
    num_ready = 0
    for scrape in scrapes:
        parsed = _parse(scrape.text)
        up.add_metric((scrape.process, scrape.replica, scrape.gateway), 0.0 if parsed is None else 1.0)
        num_ready += scrape.process == "engine" and parsed is not None
        for family in parsed or ():
            merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                own = {"process": scrape.process, "replica": scrape.replica, "gateway": scrape.gateway}
                labels = {**sample.labels, **own}
                merged.add_sample(sample.name, labels, sample.value, sample.timestamp, sample.exemplar)
    wanted = GaugeMetricFamily(
        "cantata_replicas_wanted", "Replicas that there should be.", value=wanted_replicas
    )
    ready = GaugeMetricFamily(
        "cantata_replicas_ready", "Replicas that answered this scrape.", value=num_ready
    )
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families([*families.values(), up, wanted, ready]))
    return generate_latest(registry).decode()


class _Families:
    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _parse(text: str | None) -> list[Metric] | None:
    if text is None:
        return None
    try:
        # prometheus_client adds a creation-time gauge for each counter and histogram, for
        # OpenMetrics; it is not used here.
        return [
            family for family in text_string_to_metric_families(text) if not family.name.endswith("_created")
        ]
    except ValueError:
        return None
