"""docs/clients.md shows the first part of each program."""

import re

import pytest

from tests.clients.test_clients import FOLDER, NODE_PROGRAMS, PYTHON_PROGRAMS, ROOT

END = "The documentation shows all of the above."
EXAMPLE = re.compile(r"\]\(\.\./tests/clients/programs/(\S+)\)[^`]*```\w+\n(.*?)```", re.S)
FILES = [program.file for program in (*PYTHON_PROGRAMS, *NODE_PROGRAMS)]


def test_every_program_is_run_and_documented() -> None:
    documented = [file for file, _ in EXAMPLE.findall((ROOT / "docs/clients.md").read_text())]
    assert sorted(documented) == sorted(FILES)
    assert {path.name for path in FOLDER.glob("*_chat.*")} == set(FILES)


@pytest.mark.parametrize("file", FILES)
def test_the_documented_example_is_what_runs(file: str) -> None:
    head_end = '"""\n\n' if file.endswith(".py") else "\n\n"
    _, rest = (FOLDER / file).read_text().split(head_end, 1)
    example, _ = re.split(rf"\n(?:#|//) {re.escape(END)}\n", rest)
    documented = dict(EXAMPLE.findall((ROOT / "docs/clients.md").read_text()))
    assert documented[file] == f"{example}\n"
