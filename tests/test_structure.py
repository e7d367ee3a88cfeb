"""The sizes that keep the code readable: functions, classes, parameters, files. What is larger is
listed with the reason, and leaves the list when it is no more."""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.test_imports import ROOT, sources

MAX_LINES = 60
"""Maximum number of lines of a function outside kernels/."""
MAX_METHODS = 16
MAX_PARAMETERS = 8
MAX_FILE_LINES = 450

_ATTENTION = "attention's tensors and options, as flash-attention's functions have them"
_ONE_KERNEL = "one operation: its Triton kernels and their launcher are read together"

LARGER = {
    "workers/engine/llm.py LLM.__init__": "vLLM's names, an argument each",
    "kernels/attention/__init__.py PagedAttention.__call__": _ATTENTION,
    "kernels/attention/__init__.py paged_attention": _ATTENTION,
    "kernels/attention/paged.py paged_attention": _ATTENTION,
    "kernels/attention/reference.py paged_attention": _ATTENTION,
    "kernels/attention/reference.py check_attention": _ATTENTION,
    "kernels/attention/reference.py _attend": _ATTENTION,
    "kernels/cpu/attention.py paged_attention": _ATTENTION,
    "kernels/attention/paged.py": _ONE_KERNEL,
    "kernels/attention/reference.py": "the reference of three operations and the checks that all share",
    "kernels/sampling/choose.py": _ONE_KERNEL,
}
"""Exceptions: what is larger, and why it may be."""

Definition = ast.FunctionDef | ast.AsyncFunctionDef


def definitions(file: Path) -> Iterator[tuple[str, ast.ClassDef | Definition]]:
    """Yield every class and function of a file with its name, methods after their class's."""
    pending: list[tuple[str, ast.AST]] = [("", ast.parse(file.read_text()))]
    while pending:
        prefix, parent = pending.pop()
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, ast.ClassDef | Definition):
                yield f"{prefix}{node.name}", node
                pending.append((f"{prefix}{node.name}.", node))
            else:
                pending.append((prefix, node))


def num_parameters(function: Definition) -> int:
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return len(named) - (bool(named) and named[0].arg in ("self", "cls"))


def is_triton(function: Definition) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def too_large(file: Path) -> Iterator[tuple[str, str]]:
    path = file.relative_to(ROOT).as_posix()
    if (lines := file.read_text().count("\n")) > MAX_FILE_LINES:
        yield path, f"{lines} lines"
    for name, node in definitions(file):
        if isinstance(node, ast.ClassDef):
            methods = sum(isinstance(member, Definition) for member in node.body)
            if methods > MAX_METHODS:
                yield f"{path} {name}", f"{methods} methods"
            continue
        assert node.end_lineno is not None
        if (lines := node.end_lineno - node.lineno + 1) > MAX_LINES and not path.startswith("kernels/"):
            yield f"{path} {name}", f"{lines} lines"
        if (count := num_parameters(node)) > MAX_PARAMETERS and not is_triton(node):
            yield f"{path} {name}", f"{count} parameters"


def test_nothing_is_larger_than_the_design_allows() -> None:
    found = {name: size for file in sources() if "_pb2" not in file.name for name, size in too_large(file)}
    assert {name: size for name, size in found.items() if name not in LARGER} == {}
    assert sorted(LARGER.keys() - found.keys()) == [], "these are small enough now: take them off the list"


def test_a_set_of_words_is_named_once() -> None:
    """Two aliases for one `Literal` differ after the next change."""
    places: dict[tuple[str, str], list[str]] = {}
    for file in sources():
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("Literal["):
                alias = ast.unparse(node.targets[0]), ast.unparse(node.value)
                places.setdefault(alias, []).append(file.name)
    assert {alias: files for alias, files in places.items() if len(files) > 1} == {}
