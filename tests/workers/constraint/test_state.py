"""The state of a sequence in its automaton: transitions, limits, overflow."""

from tests.support.host_automaton import ConstraintState
from workers.constraint.automaton import NO_LIMITS, AutomatonState, ConstraintLimits, TokenAutomaton
from workers.constraint.codec import encode
from workers.constraint.state import AutomatonTables

THINKS, ANSWERS, OVER = 0, 1, 2
TABLES = AutomatonTables(
    encode(
        TokenAutomaton(
            (
                AutomatonState(transitions=((9, ANSWERS),), counted=True, overflow=ANSWERS),
                AutomatonState(transitions=((9, THINKS), (8, OVER))),
                AutomatonState(),
            )
        )
    )
)


def states(tokens: tuple[int, ...], limits: ConstraintLimits = NO_LIMITS) -> list[int]:
    state = ConstraintState(TABLES, (), limits)
    found = [state.place.state]
    for token_id in tokens:
        state.push(token_id)
        found.append(state.place.state)
    return found


def test_without_limits_a_state_lasts_until_its_transition() -> None:
    assert states((1, 2, 9, 3, 8)) == [THINKS, THINKS, THINKS, ANSWERS, ANSWERS, OVER]


def test_only_tokens_of_counted_states_count() -> None:
    limits = ConstraintLimits(max_counted_tokens=3)
    # Two are counted, then two of the answer are not, then the third ends the state.
    assert states((1, 9, 5, 9, 1, 7), limits) == [0, 0, 1, 1, 0, ANSWERS, ANSWERS]


def test_a_limit_of_none_overflows_at_once() -> None:
    assert states((4,), ConstraintLimits(max_counted_tokens=0)) == [ANSWERS, ANSWERS]
    assert states((4,), ConstraintLimits(max_length=0)) == [ANSWERS, ANSWERS]


def test_all_output_tokens_count_for_the_length() -> None:
    limits = ConstraintLimits(max_length=4)
    assert states((9, 5, 9, 1, 1), limits) == [THINKS, ANSWERS, ANSWERS, THINKS, ANSWERS, ANSWERS]


def test_a_resumed_sequence_is_where_it_was() -> None:
    limits = ConstraintLimits(3, 7)
    tokens = (1, 9, 5, 9, 1, 7)
    for count in range(len(tokens) + 1):
        resumed = ConstraintState(TABLES, tokens[:count], limits)
        assert resumed.after(tokens[count:]) == ConstraintState(TABLES, tokens, limits).place
