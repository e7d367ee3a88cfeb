"""Random token automata."""

from dataclasses import replace

import hypothesis.strategies as st

from workers.constraint.automaton import AutomatonState, TokenAutomaton


@st.composite
def automata(draw: st.DrawFn, token_id: st.SearchStrategy[int]) -> TokenAutomaton:
    count = draw(st.integers(1, 4))
    grammars = draw(st.lists(st.sampled_from(['{"regex": "a"}', "start: /b/"]), max_size=2))
    grammar = st.none() | st.integers(0, len(grammars) - 1) if grammars else st.none()
    index = st.integers(0, count - 1)
    state = st.builds(
        AutomatonState,
        allowed=st.none() | st.lists(token_id, min_size=1, max_size=4).map(tuple),
        forbidden=st.lists(token_id, max_size=6).map(tuple),
        transitions=st.lists(st.tuples(token_id, index), max_size=4).map(tuple),
        grammar=grammar,
        counted=st.booleans(),
    )
    states = draw(st.lists(state, min_size=count, max_size=count))
    overflow = draw(st.none() | st.tuples(index, index))
    if overflow is not None and overflow[0] != overflow[1]:
        states[overflow[0]] = replace(states[overflow[0]], overflow=overflow[1])
    return TokenAutomaton(tuple(states), draw(index), tuple(grammars))
