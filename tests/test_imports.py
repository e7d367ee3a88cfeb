"""Imports go one way, cluster → workers → kernels, and each library appears only where the design
puts it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("kernels", "workers", "cluster")

ALLOWED_IN = {
    "ray": ("cluster/serve/", "cluster/cli.py", "workers/executor/launch_ray.py"),
    "grpc": (
        "workers/rpc/",
        "cluster/rpc/",
        "workers/engine/server.py",
        "workers/engine/access.py",
        "cluster/frontend/grpc_api.py",
        "cluster/frontend/grpc_handlers.py",
        "cluster/fleet/client.py",
        "cluster/serve/gateway.py",
    ),
    "fastapi": ("cluster/frontend/", "cluster/serve/"),
    "torch": ("kernels/", "workers/"),
    "zmq": ("workers/executor/",),
}

NOT_IMPORTED_BY = {
    "workers/kv_cache/": ("workers.scheduler", "workers.rank", "workers.engine", "workers.executor"),
    "workers/scheduler/": ("workers.rank", "workers.engine", "workers.executor"),
    "workers/constraint/": ("workers.scheduler", "workers.rank", "workers.engine", "workers.executor"),
}
"""Folders whose modules know nothing of these."""


def imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module


def sources() -> list[Path]:
    return [file for layer in LAYERS for file in sorted((ROOT / layer).rglob("*.py"))]


@pytest.mark.parametrize("file", sources(), ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_follow_the_design(file: Path) -> None:
    path = file.relative_to(ROOT).as_posix()
    layer = LAYERS.index(path.split("/")[0])
    for module in imports(file):
        top = module.split(".")[0]
        if top in LAYERS:
            assert LAYERS.index(top) <= layer, (
                f"{path} imports {module}: imports go cluster → workers → kernels"
            )
        if top in ALLOWED_IN:
            assert path.startswith(ALLOWED_IN[top]), (
                f"{path} imports {module}, which belongs in {', '.join(ALLOWED_IN[top])}"
            )
        for folder, unknown in NOT_IMPORTED_BY.items():
            assert not (path.startswith(folder) and module.startswith(unknown)), f"{path} imports {module}"


def test_no_relative_imports() -> None:
    for file in sources():
        for node in ast.walk(ast.parse(file.read_text())):
            assert not (isinstance(node, ast.ImportFrom) and node.level), (
                f"{file.relative_to(ROOT)} has a relative import"
            )


@pytest.mark.parametrize("folder", ["tests", "benchmarks"])
def test_folders_are_regular_packages(folder: str) -> None:
    """Without an `__init__.py`, a package called tests or benchmarks anywhere on the path is found
    in their place, and two modules of one name in two folders are one to pytest."""
    folders = {file.parent for file in (ROOT / folder).rglob("*.py")}
    assert [
        str(found.relative_to(ROOT)) for found in sorted(folders) if not (found / "__init__.py").exists()
    ] == []
