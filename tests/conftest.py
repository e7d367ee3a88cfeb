"""Hooks and options of all tests. That `tests` is a package puts the repository's root on the
path, however pytest is started."""

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

# torch reads it on import. Where more processes run than there are cores, threads that wait for
# each other in a loop take five times as long as what they compute.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Servers of tests keep their state there, not among the user's data.
_DATA = tempfile.TemporaryDirectory(prefix="cantata-test-data-")
os.environ["XDG_DATA_HOME"] = _DATA.name


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--summary-to", type=Path, metavar="FILE", help="append the run's last lines to FILE")


def pytest_configure(config: pytest.Config) -> None:
    from tests.support.run_report import register

    register(config, config.getoption("--summary-to"))


ONE_PROCESS = {
    "tests/e2e/": "servers",
    "tests/cluster/harmony/": "the tokenizer of oss-harmony",
    "tests/browser/": "the browser",
}
"""Beginnings of the paths of tests that one process runs, and a name for each: tests that share
fixtures of the session which take longer than they do, and those that use all cores of a small
machine for minutes, which start first."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # a process of pytest -n
        items.sort(key=lambda item: "tests/e2e/" not in item.path.as_posix())


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Let each process of `pytest -n --dist loadfile` run whole files, and all of ONE_PROCESS."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class WholeFiles(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return next((name for path, name in ONE_PROCESS.items() if file.startswith(path)), file)

    return WholeFiles(config, log)
