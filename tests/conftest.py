"""Hooks and options of all tests. That `tests` is a package puts the repository's root on the
path, however pytest is started."""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--summary-to", type=Path, metavar="FILE", help="append the run's last lines to FILE")


def pytest_configure(config: pytest.Config) -> None:
    from tests.support.run_report import register

    register(config, config.getoption("--summary-to"))


ONE_PROCESS = {"tests/e2e/": "servers", "tests/cluster/harmony/": "the tokenizer of oss-harmony"}
"""Beginnings of the paths of tests that one process runs, and a name for each: tests that share
fixtures of the session which take longer than they do, and those that use all cores of a small
machine for minutes, which start first."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let each process of `pytest -n` run whole files."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        file = item.path.relative_to(config.rootpath).as_posix()
        group = next((name for path, name in ONE_PROCESS.items() if file.startswith(path)), file)
        item.add_marker(pytest.mark.xdist_group(group))
    if hasattr(config, "workerinput"):  # a process of pytest -n
        items.sort(key=lambda item: "tests/e2e/" not in item.path.as_posix())
