"""Nothing that clients or operators see is different from the recording."""

import json
from pathlib import Path

import pytest

from tests.golden.before import record
from tests.golden.before.compare import report
from tests.golden.before.sections import SECTIONS, versions


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("before")


SLOW = ("served", "offline", "disturbed")
"""Sections with engines of their own: 80 s of processor time together."""


@pytest.mark.parametrize(
    "section", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in SECTIONS]
)
def test_as_before(section: str, folder: Path) -> None:
    text = report(record.load(section), record.run(section, folder))
    if text:
        stored = json.loads((Path(record.__file__).parent / "versions.json").read_text())
        others = {
            name: f"{stored.get(name)} → {version}"
            for name, version in versions().items()
            if stored.get(name) != version
        }
        pytest.fail(
            f"{section}: {text}\nOther versions than recorded: {others or 'none'}.\n"
            f"If the change is meant: python -m tests.golden.before.record {section}",
            pytrace=False,
        )
