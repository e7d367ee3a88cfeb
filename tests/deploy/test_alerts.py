"""When alerts fire and when they do not, as Prometheus itself evaluates
deploy/prometheus/rules.yml."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "deploy" / "prometheus"
CASES = Path(__file__).with_name("rules_test.yml")

pytestmark = [
    pytest.mark.prometheus,
    pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool not installed"),
]


def promtool(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *words], capture_output=True, text=True, timeout=120, check=False)


def test_prometheus_accepts_the_files() -> None:
    found = promtool("check", "config", str(FOLDER / "prometheus.yml"))
    assert found.returncode == 0, found.stdout + found.stderr


def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    cases = tmp_path / "rules_test.yml"
    cases.write_text(CASES.read_text().replace("[RULES]", f"[{FOLDER / 'rules.yml'}]"))
    found = promtool("test", "rules", str(cases))
    assert found.returncode == 0, found.stdout + found.stderr


def test_every_alert_has_a_case_in_which_it_fires() -> None:
    rules = yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"][0]["rules"]
    cases = yaml.safe_load(CASES.read_text())["tests"]
    fired = {test["alertname"] for case in cases for test in case["alert_rule_test"] if test["exp_alerts"]}
    silent = {
        test["alertname"] for case in cases for test in case["alert_rule_test"] if not test["exp_alerts"]
    }
    alerts = {rule["alert"] for rule in rules if "alert" in rule}
    assert fired == alerts
    assert silent == alerts
