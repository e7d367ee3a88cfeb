"""Prometheus's view of a served model, with several gateways behind the one address that it
scrapes."""

import shutil
from pathlib import Path

import openai
import pytest

from tests.e2e import scripts
from tests.e2e.conftest import NUM_GATEWAYS
from tests.support.prometheus import prometheus
from tests.support.served import MODEL_NAME, Served
from tests.support.waiting import until

NUM_SCRAPES = 6

pytestmark = [
    pytest.mark.prometheus,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus not installed"),
]


def test_series_go_on_whichever_gateway_answers_a_scrape(server: Served, tmp_path: Path) -> None:
    num_gateways = 1 if server.name == "standalone" else NUM_GATEWAYS
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    for _ in range(4):
        client.chat.completions.create(
            model=MODEL_NAME, messages=[{"role": "user", "content": scripts.GREETING}]
        )
    with prometheus(tmp_path, server.http) as scraper:
        window = f"{NUM_SCRAPES * 10}s"
        scrapes = f'count_over_time(up{{job="cantata"}}[{window}])'
        until(lambda: (scraper.value(f"min({scrapes})") or 0) >= NUM_SCRAPES, 120)
        up = scraper.query('cantata_process_up{process="gateway"}')
        assert list(up.values()) == [1.0] * num_gateways
        # Every scrape had every gateway: no series has a gap, and none is another's.
        counts = scraper.query(f'count_over_time(cantata_process_up{{process="gateway"}}[{window}])')
        assert len(counts) == num_gateways
        (total,) = scraper.query(scrapes).values()
        assert min(counts.values()) >= total - 2
        # Nothing was asked since the first scrape: counters stand still.
        for counter in (
            "cantata_gateway_output_tokens_total",
            "cantata_gateway_requests_total",
            "cantata_engine_output_tokens_total",
        ):
            selected = f'{counter}{{endpoint!="/metrics"}}' if "requests" in counter else counter
            assert scraper.value(f"sum(resets({selected}[{window}]))") == 0
            assert scraper.value(f"sum(increase({selected}[{window}]))") == 0
        assert (scraper.value("sum(cantata_gateway_output_tokens_total)") or 0) > 0
        assert scraper.value("cantata_replicas_wanted") == scraper.value("cantata_replicas_ready") == 1
        assert scraper.query('ALERTS{alertstate=~"pending|firing"}') == {}
