"""The implementations that a test of an operation runs on."""

from collections.abc import Callable, Iterator

import pytest
import torch

from kernels.cpu import native
from tests.support.isas import BF16_ISAS, FP32_ISAS
from tests.support.run_report import NATIVE_ISA

Recorder = Callable[[str, object], None]


@pytest.fixture(params=["reference", *FP32_ISAS])
def implementation(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, record_property: Recorder
) -> Iterator[str]:
    """Run the public functions on the reference in torch, then on the C++ kernels on each
    instruction set of this processor."""
    if request.param == "reference":
        monkeypatch.setattr(native, "shared_library", lambda: None)
        yield request.param
        return
    yield from running(request.param, record_property)


@pytest.fixture(params=native.ISAS)
def isa(request: pytest.FixtureRequest, record_property: Recorder) -> Iterator[str]:
    """Run the test on each instruction set of this processor."""
    yield from running(request.param, record_property)


@pytest.fixture(params=BF16_ISAS)
def bf16_isa(request: pytest.FixtureRequest, record_property: Recorder) -> Iterator[str]:
    """Run the test on each instruction set with bf16 arithmetic."""
    yield from running(request.param, record_property)


@pytest.fixture(params=FP32_ISAS)
def fp32_isa(request: pytest.FixtureRequest, record_property: Recorder) -> Iterator[str]:
    """Run the test on each instruction set that differs in fp32."""
    yield from running(request.param, record_property)


def running(isa: str, record_property: Recorder) -> Iterator[str]:
    """Run the C++ kernels on this instruction set meanwhile; skip the test where the processor
    lacks it."""
    with native.using_isa(isa) as there:
        if not there:
            pytest.skip(f"this processor has no {isa}")
        record_property(NATIVE_ISA, isa)
        yield isa


@pytest.fixture
def _restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
