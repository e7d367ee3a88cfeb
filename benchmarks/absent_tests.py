"""A plugin of pytest (`-p benchmarks.absent_tests`): tests/gpu launch their kernels on a GPU that
is not here, for `--pack-cache`.

Tensors have no memory, so nothing is tested: all numbers are zero, comparisons with what is
expected hold, assertions are left out. Where a test ends with an error all the same, what it has
launched before is compiled.
"""

import os
import tempfile
from collections.abc import Callable, Generator
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import pytest
import torch

from benchmarks.absent_gpu import META, can_build_launchers, fake_driver, meta_as
from benchmarks.gpu_tests import ROOT, run_tests
from kernels.moe import reference

TARGET = "GPU_CHECK_ABSENT_TARGET"
"""Environment variable: a target such as "sm_90"."""
LONGEST_S = 7200.0
"""Maximum seconds for all tests together."""
_cpu, _tolist = torch.Tensor.cpu, torch.Tensor.tolist


def launch_tests(target: str, num_processes: int, cache: Path) -> str:
    """Have the kernels that tests/gpu launch compiled into Triton's cache; return a sentence about
    it."""
    env = os.environ | {TARGET: target, "TRITON_CACHE_DIR": str(cache), "TRITON_STORE_BINARY_ONLY": "1"}
    # Without assertions.
    env |= {"PYTHONOPTIMIZE": "1", "PYTEST_ADDOPTS": f"-p {__name__} --assert=plain"}
    with tempfile.TemporaryDirectory() as out:
        found = run_tests(ROOT, Path(out), num_processes, LONGEST_S, env)
    return f"tests that were followed to their end: {found.get('summary', found.get('failed'))}"


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.device == META else _cpu(tensor)


def _zero(read: Callable[[torch.Tensor], float], value: float) -> Callable[[torch.Tensor], float]:
    """Read as `read` does; return the value for a tensor without memory."""
    return lambda tensor: value if tensor.device == META else read(tensor)


_NOTHING_IS_READ = (
    (torch.cuda, "is_available", lambda: True),
    (torch.cuda, "current_device", lambda: 0),
    (torch.cuda, "_sleep", lambda cycles: None),
    (torch.Tensor, "cpu", _to_host),
    (torch.Tensor, "__int__", _zero(torch.Tensor.__int__, 0)),
    (torch.Tensor, "__float__", _zero(torch.Tensor.__float__, 0.0)),
    (torch.Tensor, "item", _zero(torch.Tensor.item, 0)),
    (
        torch.Tensor,
        "tolist",
        lambda tensor: _tolist(torch.zeros_like(tensor, device="cpu") if tensor.device == META else tensor),
    ),
    (torch, "equal", lambda left, right: True),
    (torch.testing, "assert_close", lambda *args, **options: None),
    # Its result is only compared.
    (reference, "fused_experts", lambda x, *args, **options: torch.zeros_like(x)),
)


@pytest.hookimpl(wrapper=True)
def pytest_cmdline_main(config: pytest.Config) -> Generator[None, int, int]:
    with ExitStack() as stack:
        target = os.environ[TARGET]
        stack.enter_context(fake_driver(target, build_launchers=can_build_launchers()))
        stack.enter_context(meta_as(target))
        for owner, name, replacement in _NOTHING_IS_READ:
            stack.enter_context(mock.patch.object(owner, name, replacement))
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        assert isinstance(item, pytest.Function)
        for fixture in item._fixtureinfo.name2fixturedefs.get("device", ()):
            fixture.func = lambda: META  # type: ignore[misc]
