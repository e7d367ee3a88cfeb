"""`python -m tests.support.compare_asserts OLD NEW [--renames FILE]`: what the tests of two git
revisions assert differently.

Compares by syntax, function by function: `assert`, `pytest.raises`, `pytest.fail`, mocks'
`assert_…`, and the values and marks that a test is run with. Layout, comments and what else a test
does are not looked at. Files are followed by git's rename detection; functions that moved or were
renamed are found by name, then by their asserts.

FILE is JSON, applied to OLD: {"modules": {"cluster.router": "cluster.fleet"}, "names":
{"StaticReplicas": "FixedReplicas"}, "files": {"tests/a.py": "tests/b.py"}}; each part may be
missing. Names are whole identifiers or attributes, and whole strings. The exit code is 1 if
anything differs.
"""

import argparse
import ast
import io
import json
import re
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

Asserts = Counter[str]
Key = tuple[str, str]
"""The file, and the function with the classes and functions around it."""

_CHECKS = ("pytest.raises", "pytest.warns", "pytest.fail", "pytest.skip", "pytest.xfail")
_ENOUGH = 0.5
"""Share of asserts in common from which two functions of different names are taken for one."""


@dataclass(frozen=True)
class Renames:
    """Old to new: dotted modules, identifiers, and paths of test files."""

    modules: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    def module(self, dotted: str) -> str:
        """Return the new name of a module or of something in it."""
        for old in sorted(self.modules, key=len, reverse=True):
            if dotted == old or dotted.startswith(f"{old}."):
                return self.modules[old] + dotted.removeprefix(old)
        return dotted

    def name(self, name: str) -> str:
        """Return the new identifier."""
        return self.names.get(name, name)


class _Rename(ast.NodeTransformer):
    def __init__(self, renames: Renames) -> None:
        self._renames = renames

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Name(self._renames.name(node.id), node.ctx)

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        dotted = ast.unparse(node)
        if re.fullmatch(r"[\w.]+", dotted) and self._renames.module(dotted) != dotted:
            return ast.parse(self._renames.module(dotted), mode="eval").body
        return ast.Attribute(self.visit(node.value), self._renames.name(node.attr), node.ctx)

    def visit_keyword(self, node: ast.keyword) -> ast.keyword:
        return ast.keyword(node.arg and self._renames.name(node.arg), self.visit(node.value))

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        if isinstance(node.value, str):
            return ast.Constant(self._renames.name(self._renames.module(node.value)))
        return node


def asserts_of(source: str, renames: Renames | None = None) -> dict[str, Asserts]:
    """Return what each function of a test file asserts, in canonical form, by its qualified
    name."""
    tree = ast.parse(source)
    if renames is not None:
        tree = _Rename(renames).visit(tree)
    found: dict[str, Asserts] = {}
    for name, node in _functions(tree, ""):
        texts = Counter(_texts(node))
        if texts or node.name.startswith("test"):
            found[name] = found.get(name, Counter()) + texts
    return found


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{prefix}{child.name}", child
            yield from _functions(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{prefix}{child.name}.")
        else:
            yield from _functions(child, prefix)


def _texts(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    for decorator in function.decorator_list:
        text = ast.unparse(decorator)
        if "mark." in text:
            yield f"@{text}"
    yield from _in_statements(function.body)


def _in_statements(nodes: "list[ast.stmt] | list[ast.AST]") -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue  # listed by its own name
        if isinstance(node, ast.Assert):
            yield f"assert {ast.unparse(node.test)}"  # without its message, which is not a condition
        elif isinstance(node, ast.Call) and _is_check(ast.unparse(node.func)):
            yield ast.unparse(node)
        yield from _in_statements(list(ast.iter_child_nodes(node)))


def _is_check(called: str) -> bool:
    return called in _CHECKS or called.rpartition(".")[2].startswith("assert_")


def compare(old: Mapping[Key, Asserts], new: Mapping[Key, Asserts], files: Mapping[str, str]) -> list[str]:
    """Return the differences as lines, a function's under its name.

    Args:
        files: new path of a file of `old`; its old one if it is not in here.
    """
    unmatched = dict(new)
    pairs: list[tuple[Key, Key | None]] = []
    missing: list[Key] = []
    for key in old:
        place = (files.get(key[0], key[0]), key[1])
        if unmatched.pop(place, None) is not None:
            pairs.append((key, place))
        else:
            missing.append(key)
    for key in missing:
        found = _moved(key, old[key], unmatched)
        if found is not None:
            del unmatched[found]
        pairs.append((key, found))
    lines: list[str] = []
    for key, place in sorted(pairs, key=lambda pair: pair[0]):
        after = Counter() if place is None else new[place]
        lines += _lines(key, place, old[key], after)
    for place in sorted(unmatched):
        lines += [f"{'::'.join(place)}: new", *(f"  + {text}" for text in sorted(new[place].elements()))]
    return lines


def _moved(key: Key, asserts: Asserts, candidates: Mapping[Key, Asserts]) -> Key | None:
    same_name = [place for place in candidates if place[1].rpartition(".")[2] == key[1].rpartition(".")[2]]
    if same_name:
        return max(same_name, key=lambda place: _in_common(asserts, candidates[place]))
    best = max(candidates, key=lambda place: _in_common(asserts, candidates[place]), default=None)
    return best if best is not None and _in_common(asserts, candidates[best]) >= _ENOUGH else None


def _in_common(left: Asserts, right: Asserts) -> float:
    together = (left | right).total()
    return (left & right).total() / together if together else 0.0


def _lines(key: Key, place: Key | None, before: Asserts, after: Asserts) -> list[str]:
    if place is not None and before == after:
        return []
    where = "gone" if place is None else "differs" if place == key else f"differs, now {'::'.join(place)}"
    removed, added = sorted((before - after).elements()), sorted((after - before).elements())
    return [
        f"{'::'.join(key)}: {where}",
        *(f"  - {text}" for text in removed),
        *(f"  + {text}" for text in added),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Compare two revisions of this repository; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.support.compare_asserts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--renames", type=Path, metavar="FILE", help="JSON with modules, names and files")
    parser.add_argument("--repository", type=Path, default=Path(), help="default: this folder")
    parser.add_argument("--tests", default="tests", help="folder of the tests (default: tests)")
    options = parser.parse_args(arguments)
    renames = Renames(**json.loads(options.renames.read_text())) if options.renames else Renames()
    old = _asserts_at(options.repository, options.old, options.tests, renames)
    new = _asserts_at(options.repository, options.new, options.tests, None)
    files = _moved_files(options.repository, options.old, options.new, options.tests) | dict(renames.files)
    lines = compare(old, new, files)
    print("\n".join([*lines, _summary(old, new, lines)]))
    return int(bool(lines))


def _summary(old: Mapping[Key, Asserts], new: Mapping[Key, Asserts], lines: list[str]) -> str:
    removed, added = (sum(line.startswith(f"  {sign} ") for line in lines) for sign in "-+")
    before, after = (sum(asserts.total() for asserts in revision.values()) for revision in (old, new))
    return f"{before} checks before, {after} after: {removed} removed, {added} added"


def _asserts_at(repository: Path, revision: str, folder: str, renames: Renames | None) -> dict[Key, Asserts]:
    found: dict[Key, Asserts] = {}
    with tarfile.open(fileobj=io.BytesIO(_git(repository, "archive", revision, folder))) as archive:
        for member in archive:
            stream = archive.extractfile(member) if member.isfile() and member.name.endswith(".py") else None
            if stream is not None:
                source = stream.read().decode()
                found |= {
                    (member.name, name): asserts for name, asserts in asserts_of(source, renames).items()
                }
    return found


def _moved_files(repository: Path, old: str, new: str, folder: str) -> dict[str, str]:
    text = _git(
        repository,
        "diff",
        "--find-renames=40%",
        "--name-status",
        "--diff-filter=R",
        "-z",
        old,
        new,
        "--",
        folder,
    ).decode()
    fields = text.split("\0")
    return dict(zip(fields[1::3], fields[2::3], strict=False))


def _git(repository: Path, *words: str) -> bytes:
    return subprocess.run(["git", "-C", str(repository), *words], capture_output=True, check=True).stdout


if __name__ == "__main__":
    sys.exit(main())
