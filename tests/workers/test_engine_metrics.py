"""The engine's metrics, read back by prometheus_client's own parser."""

import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from workers.metrics import EngineMetrics, MetricsServer


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_each_object_counts_alone() -> None:
    first, second = EngineMetrics(), EngineMetrics()
    first.output_tokens.inc(5)
    assert samples(first.render())[("cantata_engine_output_tokens_total", ())] == 5
    assert samples(second.render())[("cantata_engine_output_tokens_total", ())] == 0


def test_every_labelled_series_exists_from_the_start() -> None:
    found = samples(EngineMetrics().render())
    for reason in ("stop", "length", "abort", "error"):
        assert found[("cantata_engine_requests_total", (("finish_reason", reason),))] == 0
    for group in ("full", "sliding"):
        assert found[("cantata_engine_kv_usage_ratio", (("group", group),))] == 0


def test_the_scrape_port_serves_the_registry_and_closes() -> None:
    metrics = EngineMetrics()
    metrics.preemptions.inc(3)
    server = MetricsServer(metrics, 0)
    assert server.address.startswith("127.0.0.1:")
    with urllib.request.urlopen(f"http://{server.address}/metrics", timeout=5) as response:
        assert samples(response.read().decode())[("cantata_engine_preemptions_total", ())] == 3
    server.close()
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://{server.address}/metrics", timeout=5)
