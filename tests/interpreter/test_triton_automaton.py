"""Token automata by Triton kernels, against the host and against the reference."""

from collections.abc import Iterator

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from kernels.automaton import device
from tests.support.automaton_cases import AutomatonSteps

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_chunks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "CHUNK", 32)
        yield


@settings(deadline=None, max_examples=15)
@given(st.data())
def test_the_kernels_follow_automata_as_the_host_does(data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "CHUNK", 32)
        AutomatonSteps(device.mask, device.advance, CPU).run(data)
