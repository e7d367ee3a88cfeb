"""Two revisions of a small repository's tests: what was moved and renamed is silent, what asserts
less is not."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.support.compare_asserts import main

OLD = """
import pytest
from old.place import thing

@pytest.mark.parametrize("x", [1, 2])
def test_one(x):
    value = thing(x)
    assert value.size == x, "a message"
    assert value.kind == "old.place.Kind"
    with pytest.raises(ValueError):
        thing(None)

class TestTwo:
    def test_in_a_class(self):
        assert thing(5)

def test_gone():
    assert thing(6) == 6
"""
NEW = """
import pytest
from new.place import thing

@pytest.mark.parametrize("x", [1, 2])
def test_one(x):
    value = thing(
        x
    )
    # another layout
    assert value.num_bytes == x
    assert value.kind == "new.place.Kind"
    with pytest.raises(ValueError):
        thing(None)

class TestTwo:
    def test_in_a_class(self):
        assert thing(5)

def test_gone():
    assert thing(6) == 6
"""
RENAMES = {"modules": {"old.place": "new.place"}, "names": {"size": "num_bytes"}}


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    _git(tmp_path, "init", "-q", "-b", "main")
    _commit(tmp_path, "tests/test_a.py", OLD)
    return tmp_path


def _git(folder: Path, *words: str) -> None:
    identity = ("-c", "user.name=Test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "-C", str(folder), *identity, *words], check=True, capture_output=True)


def _commit(folder: Path, name: str, source: str, removed: str | None = None) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(source)
    if removed:
        (folder / removed).unlink()
    _git(folder, "add", "-A")
    _git(folder, "commit", "-q", "-m", "a change")


def _compared(
    folder: Path, capsys: pytest.CaptureFixture[str], renames: object = RENAMES
) -> tuple[int, list[str]]:
    (folder / "renames.json").write_text(json.dumps(renames))
    code = main(["HEAD~1", "HEAD", "--repository", str(folder), "--renames", str(folder / "renames.json")])
    return code, capsys.readouterr().out.splitlines()


def test_layout_moves_and_renames_are_silent(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _commit(repository, "tests/deep/test_b.py", NEW, removed="tests/test_a.py")
    assert _compared(repository, capsys) == (0, ["6 checks before, 6 after: 0 removed, 0 added"])


def test_without_the_renames_they_show(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _commit(repository, "tests/test_a.py", NEW)
    code, lines = _compared(repository, capsys, {})
    assert code == 1
    assert lines == [
        "tests/test_a.py::test_one: differs",
        "  - assert value.kind == 'old.place.Kind'",
        "  - assert value.size == x",
        "  + assert value.kind == 'new.place.Kind'",
        "  + assert value.num_bytes == x",
        "6 checks before, 6 after: 2 removed, 2 added",
    ]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (
            "assert thing(5)",
            "assert thing(4)",
            ["::TestTwo.test_in_a_class: differs", "  - assert thing(5)", "  + assert thing(4)"],
        ),
        (
            "[1, 2]",
            "[1]",
            ["  - @pytest.mark.parametrize('x', [1, 2])", "  + @pytest.mark.parametrize('x', [1])"],
        ),
        (
            "raises(ValueError)",
            "raises(Exception)",
            ["  - pytest.raises(ValueError)", "  + pytest.raises(Exception)"],
        ),
        (
            "def test_gone():\n    assert thing(6) == 6\n",
            "",
            ["::test_gone: gone", "  - assert thing(6) == 6"],
        ),
        ("def test_gone", "def test_new", []),
        ("def test_gone", "@pytest.mark.skip\ndef test_gone", ["  + @pytest.mark.skip"]),
        (
            "class TestTwo",
            "def test_three():\n    assert 3\n\nclass TestTwo",
            ["tests/test_a.py::test_three: new", "  + assert 3"],
        ),
    ],
)
def test_what_differs_is_printed(
    repository: Path, capsys: pytest.CaptureFixture[str], before: str, after: str, expected: list[str]
) -> None:
    assert before in NEW
    _commit(repository, "tests/test_a.py", NEW.replace(before, after))
    code, lines = _compared(repository, capsys)
    assert code == bool(expected)
    for line in expected:
        assert any(line in found for found in lines), lines
    assert len([line for line in lines if line.startswith("  ")]) == len(
        [line for line in expected if line.startswith("  ")]
    )
