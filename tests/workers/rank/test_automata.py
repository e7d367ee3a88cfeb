"""Automata on the device against the host: masks, places, drafts, limits, and their memory."""

from collections.abc import Iterator

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from kernels.automaton import reference
from kernels.automaton.layout import AutomatonRows, Row
from kernels.cpu import automaton as cpp
from kernels.cpu import native
from kernels.sampling import SamplingBatch, sample
from tests.support.automaton_cases import AutomatonSteps, follow_limits
from workers.constraint.automaton import AutomatonState, TokenAutomaton
from workers.constraint.codec import Constraint
from workers.rank import automata
from workers.rank.automata import Automata
from workers.request import SamplingParams
from workers.scheduler.plan import SequenceStart

CPU = torch.device("cpu")
VOCAB = 100
ANY = TokenAutomaton((AutomatonState(),))
ONE_THEN_TWO = TokenAutomaton((AutomatonState((1,), transitions=((1, 1),)), AutomatonState((2,))))


@pytest.fixture(scope="module", autouse=True)
def small_memory() -> Iterator[None]:
    """Let the memory be full often."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(automata, "_LEAST_WORDS", 8)
        yield


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_the_reference_follows_automata_as_the_host_does(data: st.DataObject) -> None:
    AutomatonSteps(reference.mask, reference.advance, CPU).run(data)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_cpp_follows_automata_as_the_host_does(data: st.DataObject) -> None:
    if native.shared_library() is None:
        pytest.skip("this installation has no C++ kernels")
    AutomatonSteps(cpp.mask, cpp.advance, CPU).run(data)


def test_limits_and_drafts() -> None:
    follow_limits(reference.mask, reference.advance, CPU)
    if native.shared_library() is not None:
        follow_limits(cpp.mask, cpp.advance, CPU)


def held(*constrained: TokenAutomaton) -> Automata:
    """Return the automata, each with a sequence in the slot of its index."""
    found = Automata(len(constrained), CPU)
    constraints = [Constraint.of(automaton) for automaton in constrained]
    found.update([(constraint.id, constraint.body) for constraint in constraints], [])
    for slot, constraint in enumerate(constraints):
        found.start(slot, SequenceStart(slot, (1,), 1, SamplingParams(seed=0), constraint=constraint.id))
    return found


def rows_of(found: Automata, *slots: int) -> AutomatonRows:
    rows = found.rows(np.array(slots), np.zeros(len(slots), dtype=np.int64))
    assert rows is not None
    return found.on_device(torch.from_numpy(rows))


def test_memory_is_used_again() -> None:
    """Automata come and go; what stays is moved."""
    found = held(ONE_THEN_TWO)
    largest = 0
    for count in range(1, 40):
        others = [Constraint.of(TokenAutomaton((AutomatonState(tuple(range(count, count + 50))),)))]
        found.update([(other.id, other.body) for other in others], [])
        largest = max(largest, len(found.on_device(torch.zeros(0)).words))
        found.update([], [other.id for other in others])
    assert largest < 200
    logits = torch.zeros(1, VOCAB)
    reference.mask(logits, rows_of(found, 0))
    assert logits.isfinite()[0].nonzero()[:, 0].tolist() == [1]


def test_an_argument_that_is_wrong_is_named() -> None:
    found = rows_of(held(ANY, ONE_THEN_TWO), 0, 1)
    assert found.num_rows == 2
    for vector in (Row.ROW, Row.SLOT, Row.BASE):
        for value in (-1, 10_000):
            wrong = AutomatonRows(found.words, found.places, found.rows.clone())
            wrong.rows[vector, 1] = value
            with pytest.raises(ValueError, match=rf"automaton\.rows\[{vector.name}\]"):
                sample(torch.zeros(2, VOCAB), SamplingBatch(automaton=wrong))
    for wrong in (
        AutomatonRows(found.words.long(), found.places, found.rows),
        AutomatonRows(found.words, found.places[:, :1], found.rows),
        AutomatonRows(found.words, found.places, found.rows[:9]),
    ):
        with pytest.raises(ValueError, match=r"automaton\.(words|places|rows) must be contiguous"):
            wrong.check_shapes()
