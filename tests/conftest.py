"""Puts the repository's root on the path, so that tests can import `tests.support` however pytest is started."""

import os
import sys
from pathlib import Path

import pytest

ROOT = str(Path(__file__).parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--summary-to", type=Path, metavar="FILE", help="append the run's last lines to FILE")


def pytest_configure(config: pytest.Config) -> None:
    from tests.support.run_report import RunReport

    config.pluginmanager.register(RunReport(os.environ.get("CI") == "true", config.getoption("--summary-to")))
