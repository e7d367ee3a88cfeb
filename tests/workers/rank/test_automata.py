"""Automata on the device against the host: masks, places, drafts, limits, and their memory."""

from collections.abc import Iterator

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from kernels.automaton import reference
from tests.support.automaton_cases import AutomatonSteps
from workers.rank import automata

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def small_memory() -> Iterator[None]:
    """Let the memory be full often."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(automata, "_LEAST_WORDS", 8)
        yield


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_the_device_follows_automata_as_the_host_does(data: st.DataObject) -> None:
    AutomatonSteps(reference.mask, reference.advance, CPU).run(data)
