"""The implementations that a test of an operation runs on."""

from collections.abc import Iterator

import pytest
import torch

from kernels.cpu import native


@pytest.fixture(params=["reference", "portable", "avx2", "avx512"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The public functions run the reference in torch, then the C++ kernels on each instruction set of this processor."""
    if request.param == "reference":
        monkeypatch.setattr(native, "shared_library", lambda: None)
        yield request.param
        return
    with native.using_isa(request.param) as there:
        if not there:
            pytest.skip(f"this processor has no {request.param}")
        yield request.param


@pytest.fixture
def _restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
