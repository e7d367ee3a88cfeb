"""Random token automata."""

import hypothesis.strategies as st

from workers.constraint.automaton import AutomatonState, TokenAutomaton


@st.composite
def automata(draw: st.DrawFn, token_id: st.SearchStrategy[int]) -> TokenAutomaton:
    count = draw(st.integers(1, 4))
    index = st.integers(0, count - 1)
    state = st.builds(
        AutomatonState,
        allowed=st.none() | st.lists(token_id, min_size=1, max_size=4).map(tuple),
        forbidden=st.lists(token_id, max_size=6).map(tuple),
        transitions=st.lists(st.tuples(token_id, index), max_size=4).map(tuple),
    )
    states = draw(st.lists(state, min_size=count, max_size=count))
    return TokenAutomaton(tuple(states), draw(index))
