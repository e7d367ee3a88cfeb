"""The merged page, and a check that docs/metrics.md has every metric and no other."""

import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from cluster.metrics import GatewayMetrics, Scrape, merge
from workers.metrics import EngineMetrics

JOINED = {"cantata_process_up", "cantata_replicas_wanted", "cantata_replicas_ready"}
"""Names of metrics that only the joined page has."""
DOC = Path(__file__).parents[2] / "docs" / "metrics.md"


def families(registry: CollectorRegistry) -> set[str]:
    return {
        f"{family.name}_total" if family.type == "counter" else family.name for family in registry.collect()
    }


def test_the_documentation_lists_exactly_what_is_exported() -> None:
    documented = set(re.findall(r"^\| `(cantata_[a-z_]+)`", DOC.read_text(), flags=re.MULTILINE))
    exported = families(GatewayMetrics().registry) | families(EngineMetrics().registry) | JOINED
    assert documented == exported


def test_labels_are_documented() -> None:
    gateway = GatewayMetrics()
    gateway.requests.labels("x", "200")
    gateway.retries.labels("x")
    rows = {
        line.split("`")[1]: line for line in DOC.read_text().splitlines() if line.startswith("| `cantata_")
    }
    for registry in (gateway.registry, EngineMetrics().registry):
        for family in registry.collect():
            row = rows.get(family.name) or rows[f"{family.name}_total"]
            for label in {label for sample in family.samples for label in sample.labels} - {"le"}:
                assert f"`{label}`" in row, f"{family.name} has the label {label}"


def test_histograms_of_two_processes_keep_their_buckets() -> None:
    first, second = GatewayMetrics(), GatewayMetrics()
    first.duration.observe(0.3)
    second.duration.observe(3.0)
    second.duration.observe(4.0)
    page = merge(
        [Scrape("gateway", "", each.render(), name) for name, each in (("a", first), ("b", second))], 2
    )
    parsed = {family.name: family for family in text_string_to_metric_families(page)}
    samples = parsed["cantata_gateway_request_duration_seconds"].samples
    counts = {sample.labels["gateway"]: sample.value for sample in samples if sample.name.endswith("_count")}
    assert counts == {"a": 1, "b": 2}
    buckets = [
        sample.value
        for sample in samples
        if sample.name.endswith("_bucket") and sample.labels["gateway"] == "b"
    ]
    assert buckets == sorted(buckets)
    assert buckets[-1] == 2
    assert not [name for name in parsed if name.endswith("_created")]


@pytest.mark.parametrize("text", [None, "this is { not an exposition", '# TYPE a counter\na{b="c 1\n'])
def test_a_process_without_metrics_is_down_and_harms_nobody(text: str | None) -> None:
    good = GatewayMetrics()
    page = merge([Scrape("gateway", "", good.render()), Scrape("engine", "r1", text)], 2)
    parsed = {family.name: family for family in text_string_to_metric_families(page)}
    up = {sample.labels["process"]: sample.value for sample in parsed["cantata_process_up"].samples}
    assert up == {"gateway": 1, "engine": 0}
    assert "cantata_gateway_in_flight_requests" in parsed


def test_label_values_are_escaped() -> None:
    page = merge([Scrape("engine", 'a"b\\c\nd', "# TYPE x gauge\nx 1\n")], 2)
    (sample,) = next(family for family in text_string_to_metric_families(page) if family.name == "x").samples
    assert sample.labels["replica"] == 'a"b\\c\nd'
