"""A Prometheus server of a test's own, which scrapes one address each second and evaluates the
project's rules."""

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import yaml

from tests.support.waiting import until

FOLDER = Path(__file__).parents[2] / "deploy" / "prometheus"


@dataclass
class Prometheus:
    """A running server."""

    http: httpx.Client

    def query(self, expression: str) -> dict[frozenset[tuple[str, str]], float]:
        """Return the values of an instant query by their labels."""
        answer = self.http.get("/api/v1/query", params={"query": expression}).raise_for_status().json()
        found = answer["data"]["result"]
        return {frozenset(entry["metric"].items()): float(entry["value"][1]) for entry in found}

    def value(self, expression: str) -> float | None:
        """Return the one value of an instant query; None if there is none."""
        values = list(self.query(expression).values())
        assert len(values) <= 1, values
        return values[0] if values else None


@contextmanager
def prometheus(folder: Path, target: str) -> Iterator[Prometheus]:
    """Run deploy/prometheus/prometheus.yml against `target` (host:port), scraping each second."""
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(FOLDER / name) for name in config["rule_files"]]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [
        "prometheus",
        f"--config.file={file}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
    ]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        with httpx.Client(
            base_url=f"http://{address}", transport=httpx.HTTPTransport(retries=20), timeout=30
        ) as http:
            # It listens, and answers 503, before its storage is open.
            until(lambda: http.get("/-/ready").status_code == 200, 60)
            yield Prometheus(http)
    finally:
        process.terminate()
        process.wait(60)
