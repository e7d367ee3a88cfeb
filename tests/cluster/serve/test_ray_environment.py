"""The variables that Ray is started with: the table of docs/operations.md, and what Ray 2.60 makes
of them."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.serve._private import constants

from cluster.serve.ray_environment import FAST_INGRESS, HAPROXY_HARD_STOP_S, ONE_MACHINE_ONLY, RAY_ENVIRONMENT

OPERATIONS = Path(__file__).parents[3] / "docs" / "operations.md"


@pytest.fixture
def as_ray_reads_it(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ray's modules as in a process that was started with our variables."""
    with monkeypatch.context() as patch:
        for name, value in RAY_ENVIRONMENT.items():
            patch.setenv(name, value)
        importlib.reload(constants)
        yield
    importlib.reload(constants)


def test_the_documented_table_is_this_one() -> None:
    rows = re.findall(r"^\| `(RAY_\w+)` \| (\S+) \|", OPERATIONS.read_text(), re.MULTILINE)
    assert dict(rows) == RAY_ENVIRONMENT
    assert len(rows) == len(RAY_ENVIRONMENT)
    assert set(FAST_INGRESS) | ONE_MACHINE_ONLY <= set(RAY_ENVIRONMENT)


@pytest.mark.usefixtures("as_ray_reads_it")
def test_ray_knows_the_names_and_takes_the_values() -> None:
    assert constants.RAY_SERVE_ENABLE_HA_PROXY
    assert constants.RAY_SERVE_THROUGHPUT_OPTIMIZED
    assert constants.RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS
    assert constants.RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S == HAPROXY_HARD_STOP_S
    # What Ray derives from it: how long the port of a gateway that has ended stays unused.
    assert constants.RAY_SERVE_PORT_QUARANTINE_S == HAPROXY_HARD_STOP_S + 30
    ports = (
        constants.RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT - constants.RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT
    )
    assert ports == 1000, "as docs/operations.md says"
