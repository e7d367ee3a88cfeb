"""Automata as bytes: equal both ways, named by their content."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from tests.support.automata import automata
from workers.constraint.automaton import AutomatonState, TokenAutomaton
from workers.constraint.codec import ID_BYTES, Constraint, automaton_id, decode, encode

token_id = st.integers(0, 2**32 - 1)


@settings(deadline=None)
@given(automata(token_id), automata(token_id))
def test_an_automaton_comes_back_equal_and_its_id_is_that_of_its_content(
    first: TokenAutomaton, second: TokenAutomaton
) -> None:
    assert decode(encode(first)) == first
    same = decode(encode(first))
    assert Constraint.of(same) == Constraint.of(first)
    assert len(Constraint.of(first).id) == ID_BYTES
    assert (Constraint.of(first).id == Constraint.of(second).id) == (encode(first) == encode(second))


def test_nothing_allowed_is_not_everything_allowed() -> None:
    everything = TokenAutomaton((AutomatonState(None),))
    only_zero = TokenAutomaton((AutomatonState((0,)),))
    assert encode(everything) != encode(only_zero)
    assert decode(encode(everything)).states[0].allowed is None


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"\xff\xff\xff", "not a TokenAutomaton"),
        (b"", "at least one state"),
        (encode(TokenAutomaton((AutomatonState(),)))[:-1] + b"\x05", "not a TokenAutomaton"),
    ],
)
def test_bytes_that_are_no_automaton_are_refused(body: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        decode(body)


def test_an_id_is_a_hash_of_the_bytes() -> None:
    assert automaton_id(b"a") != automaton_id(b"b")
    assert automaton_id(b"a").hex() == "27c35e6e9373877f29e562464e46497e"
