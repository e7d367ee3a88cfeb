"""One model and one server of each kind for all end-to-end tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.scripts import SCRIPTS
from tests.support.scripted_checkpoint import write_scripted_checkpoint
from tests.support.served import FAST_INGRESS, MODEL_NAME, Served, serve_run, standalone

NUM_GATEWAYS = 2
"""Number of gateways on Ray."""


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / MODEL_NAME
    write_scripted_checkpoint(path, SCRIPTS)
    return path


@pytest.fixture(scope="session", params=["standalone", pytest.param("serve run", marks=pytest.mark.ray)])
def server(
    request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """The same tests run against both ways of serving."""
    folder = tmp_path_factory.mktemp("server")
    if request.param == "standalone":
        serving = standalone(folder, model)
    else:
        serving = serve_run(folder, model, environment=FAST_INGRESS, gateways=NUM_GATEWAYS)
    with serving as served:
        yield served
