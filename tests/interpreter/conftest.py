"""Triton kernels on CPU tensors, in Triton's interpreter. It is on or off for a whole process, so
these tests run in one of their own: `TRITON_INTERPRET=1 python3 -m pytest tests/interpreter`, which
`make test` does. Elsewhere each module is one skip."""

import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import kernels
from kernels.backend import triton_runs_on

INTERPRETING = triton_runs_on(torch.device("cpu"))

if INTERPRETING:
    import tests.interpreter.emulations
    import tests.interpreter.interpreter  # noqa: F401 - repairs the interpreter
    from tests.interpreter.guards import GuardedAllocations

    # Before a test replaces a function that some of them import by name.
    for found in pkgutil.walk_packages(kernels.__path__, "kernels."):
        if not found.name.endswith("._native"):  # the C++ library, no Python module
            importlib.import_module(found.name)

    # The interpreter's tensors are small: threads cost more than they bring.
    torch.set_num_threads(1)


class _SkippedModule(pytest.Module):
    def collect(self) -> Iterator[pytest.Item]:
        pytest.skip(
            "needs TRITON_INTERPRET=1 (and Triton) from the start of the process", allow_module_level=True
        )


def pytest_configure(config: pytest.Config) -> None:
    # numpy warns where a GPU gives infinity or NaN in silence.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton")


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return None if INTERPRETING else _SkippedModule.from_parent(parent, path=module_path)


@pytest.fixture(autouse=INTERPRETING)
def guarded_allocations() -> Iterator[None]:
    """Fill allocations of kernels' launchers with NaN, and check that nothing is written around
    them."""
    with GuardedAllocations():
        yield
