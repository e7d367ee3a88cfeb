"""Token automata by Triton kernels, against the host and against the reference."""

from collections.abc import Iterator

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from kernels.automaton import device
from tests.support.automaton_cases import AutomatonSteps, follow_limits

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def small_chunks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "CHUNK", 32)
        yield


@settings(deadline=None, max_examples=15)
@given(st.data())
def test_the_kernels_follow_automata_as_the_host_does(data: st.DataObject) -> None:
    AutomatonSteps(device.mask, device.advance, CPU).run(data)


def test_limits_and_drafts() -> None:
    follow_limits(device.mask, device.advance, CPU)
