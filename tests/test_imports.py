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
        "cluster/frontend/grpc_reflection.py",
        "cluster/frontend/grpc_handlers.py",
        "cluster/fleet/client.py",
        "cluster/serve/gateway.py",
    ),
    "fastapi": ("cluster/frontend/", "cluster/serve/"),
    "sqlalchemy": ("cluster/state/",),
    "alembic": ("cluster/state/",),
    "torch": ("kernels/", "workers/"),
    "zmq": ("workers/executor/",),
}

FOLDERS = {
    "workers": {"workers.constraint"},
    "workers.constraint": {"workers"},
    "workers.grammars": {"workers"},
    "workers.parallel": {"workers", "kernels"},
    "workers.kv_cache": {"workers", "kernels", "kernels.attention", "workers.parallel"},
    "workers.scheduler": {"workers", "workers.constraint", "workers.kv_cache"},
    "workers.model": {"workers", "kernels.*", "workers.kv_cache", "workers.parallel"},
    "workers.rank": {
        *("workers", "kernels.*", "workers.constraint", "workers.kv_cache", "workers.model"),
        *("workers.parallel", "workers.rank.recorded", "workers.scheduler"),
    },
    "workers.rank.recorded": {"workers", "kernels.*", "workers.model", "workers.rank"},
    "workers.executor": {
        "workers",
        "workers.kv_cache",
        "workers.parallel",
        "workers.rank",
        "workers.scheduler",
    },
    "workers.rpc": {"workers", "workers.constraint"},
    "workers.engine": {
        *("workers", "workers.constraint", "workers.executor", "workers.grammars", "workers.kv_cache"),
        *("workers.rpc", "workers.scheduler"),
    },
    "cluster.harmony": {"cluster", "workers", "workers.constraint", "workers.grammars"},
    "cluster.grammars": {"cluster", "workers", "workers.constraint", "workers.grammars"},
    "cluster.fleet": {"cluster", "workers", "workers.rpc"},
    "cluster.generation": {
        *("cluster", "cluster.fleet", "cluster.grammars", "cluster.harmony", "workers"),
        *("workers.constraint", "workers.grammars", "workers.rpc"),
    },
    "cluster.state": {"cluster", "workers"},
    "cluster.state.migrations": {"cluster.state"},
    "cluster.state.migrations.versions": set(),
    "cluster.frontend": {
        *("cluster", "cluster.frontend.anthropic", "cluster.frontend.responses", "cluster.generation"),
        *("cluster.harmony", "cluster.rpc", "cluster.state", "workers", "workers.grammars"),
        "workers.rpc",
    },
    "cluster.frontend.anthropic": {
        *("cluster", "cluster.frontend", "cluster.generation", "cluster.harmony", "workers"),
        "workers.rpc",
    },
    "cluster.frontend.responses": {
        *("cluster", "cluster.frontend", "cluster.generation", "cluster.harmony", "cluster.state"),
        *("workers", "workers.grammars"),
    },
    "cluster.standalone": {
        *("cluster", "cluster.fleet", "cluster.frontend", "cluster.generation", "cluster.harmony"),
        *("cluster.state", "workers", "workers.rpc"),
    },
    "cluster.serve": {
        *("cluster", "cluster.fleet", "cluster.frontend", "cluster.rpc", "workers", "workers.engine"),
        "cluster.state",
        *("workers.executor", "workers.kv_cache", "workers.model", "workers.parallel", "workers.rpc"),
    },
    "cluster.commands": {
        *("cluster.harmony", "workers", "workers.kv_cache", "workers.model", "workers.parallel"),
    },
    "cluster.commands.bench": {"cluster", "workers", "workers.engine"},
}
"""Folders that each folder may import beside itself: of its own process, and what is pure."""

MODULES = {
    "workers.config": {"kernels.formats"},  # names of number formats, without torch
    # the experts' format is the stored one
    "workers.model_config": {"workers.model.safetensors_files", "workers.model.tensor_specs"},
    "workers.engine.llm": {"kernels.formats"},
    "workers.engine.engine": {"workers.model.sizes"},  # arithmetic, for the summary
    "workers.constraint.codec": {"workers.rpc.engine_pb2"},  # the one codec, of both wires
    "workers.rank.process": {"workers.executor.channel"},  # the rank's end of it
    "workers.engine.server": {"workers.model.stored_model", "workers.rank.rank"},  # fingerprint, Progress
    "workers.engine.step_profile": {"kernels.cpu.profile", "kernels.cpu.roofline"},
    "cluster.fleet.client": {"workers.engine.access"},
    "cluster.fleet.dispatch": {"workers.kv_cache.prefix_cache"},  # the same hashes
    "cluster.frontend.app": {"cluster.fleet.status"},  # for /ready and /metrics
    "cluster.serve.preflight": {"cluster.commands.gpus"},
}
"""Modules that single modules may import beside."""


def imported_modules(file: Path) -> Iterator[str]:
    """Yield the modules of ours that a file imports."""
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [
                name if is_module(name := f"{node.module}.{alias.name}") else node.module
                for alias in node.names
            ]
        yield from (name for name in names if name.split(".")[0] in LAYERS)


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def folder_of(module: str) -> str:
    """Return `a.b` for the module a.b.c, and for the package a.b itself."""
    return module if (ROOT / module.replace(".", "/")).is_dir() else module.rpartition(".")[0]


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_import_what_they_may(folder: str) -> None:
    allowed = FOLDERS[folder] | {folder}
    for file in sorted((ROOT / folder.replace(".", "/")).glob("*.py")):
        own = f"{folder}.{file.stem}"
        for module in imported_modules(file):
            where = folder_of(module)
            fine = where in allowed or f"{where.split('.')[0]}.*" in allowed
            assert fine or module in MODULES.get(own, ()), f"{own} imports {module}"


def test_every_folder_has_its_row() -> None:
    folders = {".".join(file.relative_to(ROOT).parent.parts) for file in sources()}
    assert {name for name in folders if not name.startswith("kernels")} == {
        *FOLDERS,
        *("cluster", "cluster.rpc"),  # what puts the parts together, and generated stubs
    }


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
