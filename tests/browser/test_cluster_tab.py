"""The page's view of the cluster in Chromium."""

import pytest

from tests.support.browser import Page, PageServer
from tests.support.fake_engine import METRICS_TEXT, Script
from tests.support.gateway import turn

pytestmark = pytest.mark.browser

METRICS = """# TYPE cantata_engine_running_requests gauge
cantata_engine_running_requests {running}
# TYPE cantata_engine_waiting_requests gauge
cantata_engine_waiting_requests 2.0
# TYPE cantata_engine_kv_usage_ratio gauge
cantata_engine_kv_usage_ratio{{group="full"}} 0.25
cantata_engine_kv_usage_ratio{{group="sliding"}} 0.5
# TYPE cantata_engine_prompt_tokens_total counter
cantata_engine_prompt_tokens_total {prompt}
# TYPE cantata_engine_cached_tokens_total counter
cantata_engine_cached_tokens_total {cached}
# TYPE cantata_engine_output_tokens_total counter
cantata_engine_output_tokens_total {output}
"""
COUNT_TIMERS = """
const [set, clear] = [window.setTimeout, window.clearTimeout];
window.polls = new Set();
window.setTimeout = (act, wait) => {
  const id = set(() => { window.polls.delete(id); act(); }, wait);
  if (wait >= 2000) window.polls.add(id);
  return id;
};
window.clearTimeout = (id) => { window.polls.delete(id); clear(id); };
"""


def test_the_cluster_live(page: Page, server: PageServer) -> None:
    server.says("Hello", Script(turn(server.encoding, text="Hello there!")))
    server.engine.metrics_text = METRICS.format(running=3, prompt=100, cached=0, output=10)
    try:
        page.open("/#tab=cluster")
        page.driver.execute_script(COUNT_TIMERS)
        page.until(lambda: "Ready" in page.text("#cluster-state"))
        page.until(lambda: page.text("#replicas tr").startswith("r0answers3225 %50 %"))
        server.engine.metrics_text = METRICS.format(running=4, prompt=200, cached=60, output=90)
        page.until(lambda: page.text("#replicas tr").startswith("r0answers4"))
        charts = {chart.get_property("textContent") for chart in page.all(".chart")}
        assert any("Prefix cache hits" in text and "60 %" in text for text in charts), charts
        page.until(lambda: len(page.all(".line[d^=M]")) >= 4)
        labels = [chart.get_attribute("aria-label") or "" for chart in page.all(".plot svg")]
        assert any(label.startswith("KV cache in use: full layers 25 %") for label in labels)
        page.screenshot("cluster-light")
        page.shows(width=390, height=860, theme="dark")
        page.screenshot("cluster-phone-dark")
        server.engine.accepting = False
        page.until(lambda: "Not ready" in page.text("#cluster-state"))
        page.until(lambda: page.driver.execute_script("return window.polls.size") == 1)
        page.click("#tab-chat")
        assert page.driver.execute_script("return window.polls.size") == 0
    finally:
        server.engine.metrics_text = METRICS_TEXT
        server.engine.accepting = True
