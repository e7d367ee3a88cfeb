"""Hooks and options of all tests. That `tests` is a package puts the repository's root on the
path, however pytest is started."""

import os
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--summary-to", type=Path, metavar="FILE", help="append the run's last lines to FILE")


def pytest_configure(config: pytest.Config) -> None:
    from tests.support.run_report import RunReport

    config.pluginmanager.register(RunReport(os.environ.get("CI") == "true", config.getoption("--summary-to")))


ONE_PROCESS = ("tests/cluster/harmony", "tests/e2e/test_served.py", "tests/e2e/test_scraped.py")
"""What shares fixtures of a session that cost more than running beside each other saves: a folder,
and files."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let each process of `pytest -n` take whole files, whose fixtures are then made once."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        file = item.path.relative_to(config.rootpath).as_posix()
        shared = next((str(Path(name).parent) for name in ONE_PROCESS if file.startswith(name)), None)
        item.add_marker(pytest.mark.xdist_group(shared or file))
