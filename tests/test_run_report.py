"""The plugin of pytest that keeps CI from hiding what did not run: in runs of its own, over a few
tests made for it."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support.run_report import ALLOWED_SKIPS, MARKERS, is_allowed

ROOT = Path(__file__).parent.parent

CONFTEST = """
from pathlib import Path
from tests.support.run_report import register

def pytest_configure(config):
    register(config, Path("summary.txt"))
"""
TESTS = """
import pytest

def test_passes(record_property):
    record_property("isa", "portable")
    record_property("isa_emulated", "avx2")

@pytest.mark.parametrize("kind", ["netns"])
def test_is_no_marker(kind): pass

@pytest.mark.isa
def test_allowed(): pytest.skip("this processor has no avx512")

@pytest.mark.netns
def test_package(): pytest.skip("ip not installed")

@pytest.mark.skipif(True, reason="a tool is not there")
def test_marked(): pass

@pytest.mark.xfail
def test_known(): assert False
"""


def run(folder: Path, ci: str, *flags: str) -> tuple[int, str, list[str]]:
    """Return (exit code, output, lines of the summary's file)."""
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_some.py").write_text(TESTS)
    (folder / "test_other.py").write_text('import pytest\npytest.importorskip("not_a_package")\n')
    ran = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-c",
            os.devnull,
            "--rootdir",
            ".",
            "--continue-on-collection-errors",
            *flags,
        ],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CI": ci},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return ran.returncode, ran.stdout, (folder / "summary.txt").read_text().splitlines()


def test_a_skip_fails_in_ci_unless_its_reason_is_allowed(tmp_path: Path) -> None:
    code, output, summary = run(tmp_path, "true")
    assert code == 1
    assert re.search(r"1 failed, 2 passed, 1 skipped, 1 xfailed.*2 errors", output), output
    for reason in ("ip not installed", "a tool is not there", "could not import 'not_a_package'"):
        assert f"skipped although CI=true: {reason}" in output
    assert "although CI=true: this processor" not in output
    assert "scripts/ci_packages.txt" in output
    assert summary == [
        "test_some.py: 2 failed, 2 passed, 2 skipped",
        "  marker isa: 1 skipped; this processor has no avx512",
        "  marker netns: 1 failed",
        summary[3],
    ]
    assert summary[3].startswith("  instruction sets: natively: portable; emulated: avx2; not tested: ")


def test_elsewhere_a_skip_is_a_skip(tmp_path: Path) -> None:
    code, output, summary = run(tmp_path, "", "-n", "2")
    assert code == 0, output
    assert summary[0] == "test_some.py: 2 passed, 4 skipped"  # one summary of both processes
    assert "  marker netns: 1 skipped; ip not installed" in summary


def test_what_may_be_skipped_is_no_package() -> None:
    assert is_allowed("this processor has no amx")
    assert is_allowed("Skipped: needs 2 GPUs, torch finds 0")
    for reason in (
        "no C++ compiler",
        "could not import 'triton'",
        "ip and unshare not installed",
        "the C++ library was not built",
    ):
        assert not is_allowed(reason)
    assert len(ALLOWED_SKIPS) < 10


def test_markers_of_the_summary_and_of_the_packages_are_declared() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"][
        "markers"
    ]
    names = {line.split(":")[0] for line in declared}
    assert names == set(MARKERS)
    listed = [
        line
        for line in (ROOT / "scripts/ci_packages.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert {line.split(":")[0] for line in listed} <= names | {"all"}


def test_packages_that_are_missing_are_named_where_they_cannot_be_installed(tmp_path: Path) -> None:
    """Without rights or without apt the script names the packages to install, and goes on."""
    for tool in ("sed", "dirname", "bash"):
        (tmp_path / tool).symlink_to(f"/usr/bin/{tool}")
    (tmp_path / "id").write_text("#!/usr/bin/env bash\necho 1000\n")
    (tmp_path / "id").chmod(0o755)
    script = ROOT / "scripts/install_ci_packages.sh"
    said = subprocess.run(
        ["/bin/bash", script],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert said.returncode == 0, said.stderr
    assert "apt-get install g++ make" in said.stderr
    assert "qemu-user" in said.stderr


@pytest.mark.parametrize("caller", [".ci/run"])
def test_ci_installs_them(caller: str) -> None:
    assert "scripts/install_ci_packages.sh" in (ROOT / caller).read_text()
