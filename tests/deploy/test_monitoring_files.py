"""Dashboard and alert rules name metrics that exist, and the dashboard shows all of them."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DASHBOARD: dict[str, Any] = json.loads((ROOT / "deploy" / "grafana" / "cantata.json").read_text())
RULES: list[dict[str, Any]] = yaml.safe_load((ROOT / "deploy" / "prometheus" / "rules.yml").read_text())[
    "groups"
][0]["rules"]
METRICS_PAGE = (ROOT / "docs" / "metrics.md").read_text()
DOCUMENTED = set(re.findall(r"^\| `(cantata_\w+)`", METRICS_PAGE, flags=re.MULTILINE))


def metrics(expression: str) -> set[str]:
    return {
        re.sub(r"(_seconds|_tokens|_sequences)_(bucket|sum|count)$", r"\1", name)
        for name in re.findall(r"\bcantata_\w+", expression)
    }


def shown() -> set[str]:
    return {
        name
        for panel in DASHBOARD["panels"]
        for target in panel["targets"]
        for name in metrics(target["expr"])
    }


def test_panels_show_every_documented_metric_and_no_other() -> None:
    assert len(DOCUMENTED) > 20
    assert shown() == DOCUMENTED


def labels_of(metric: str) -> set[str]:
    """Return the metric's labels as docs/metrics.md lists them, which has its own test against the
    registries, and those of the joined page and of histograms."""
    rows = [line.split("|") for line in METRICS_PAGE.splitlines() if line.startswith(f"| `{metric}`")]
    return {*re.findall(r"`(\w+)`", rows[0][2]), "process", "replica", "gateway", "le"}


def used_labels(expression: str) -> set[str]:
    grouped = re.findall(r"\bby \(([\w, ]+)\)", expression)
    selected = re.findall(r"[{,](\w+)(?:=~|!~|!=|=)", expression)
    return {name.strip() for names in grouped for name in names.split(",")} | set(selected)


def test_labels_exist() -> None:
    panels = [
        (target["expr"], target.get("legendFormat", ""))
        for panel in DASHBOARD["panels"]
        for target in panel["targets"]
    ]
    variables = [
        (variable["query"], "") for variable in DASHBOARD["templating"]["list"] if variable["type"] == "query"
    ]
    # `up` is Prometheus's own.
    rules = [(rule["expr"], "") for rule in RULES if metrics(rule["expr"]) or "record" in rule]
    found = 0
    for expression, legend in panels + variables + rules:
        wanted = used_labels(expression) | set(re.findall(r"{{(\w+)}}", legend))
        known = set.union(*(labels_of(metric) for metric in metrics(expression)), set())
        assert wanted <= known, expression
        found += len(wanted - {"le", "process", "replica", "gateway"})
    assert found >= 5


def test_the_dashboard_is_whole() -> None:
    panels = DASHBOARD["panels"]
    assert DASHBOARD["schemaVersion"] >= 36
    assert len({panel["id"] for panel in panels}) == len(panels)
    variables = {variable["name"]: variable["type"] for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"] == "datasource"
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(panels))) - {"__rate_interval"}
    assert used == set(variables)
    for panel in panels:
        assert panel["datasource"]["uid"] == "${datasource}"
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    corners = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(corners) == len(panels)


def test_rules_use_metrics_and_records_that_exist() -> None:
    records = {rule["record"] for rule in RULES if "record" in rule}
    for rule in RULES:
        assert metrics(rule["expr"]) <= DOCUMENTED
        assert set(re.findall(r"\bcantata:[\w:]+", rule["expr"])) <= records
    alerts = [rule["alert"] for rule in RULES if "alert" in rule]
    assert len(set(alerts)) == len(alerts) >= 5


def test_prometheus_loads_the_rules_and_keeps_our_labels() -> None:
    folder = ROOT / "deploy" / "prometheus"
    config = yaml.safe_load((folder / "prometheus.yml").read_text())
    assert all((folder / name).is_file() for name in config["rule_files"])
    (job,) = config["scrape_configs"]
    assert (job["metrics_path"], job["honor_labels"]) == ("/metrics", True)
