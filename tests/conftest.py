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
