"""A token automaton: the token ids that may come next in each state, and the state after each. The
engine knows no harmony; the gateway builds these. `state` runs them, `codec` carries them between
processes."""

from dataclasses import dataclass

MAX_AUTOMATON_STATES = 8192
"""Maximum number of states that an engine accepts. Checking that many takes 0.1 s, once for each
automaton. A tool's name takes about two states for each of its characters."""


@dataclass(frozen=True, slots=True)
class AutomatonState:
    """One state. A token is allowed if it is in `allowed`, or if `allowed` is None and it is not in
    `forbidden`.

    Attributes:
        allowed: ids that may come next; None for all ids that are not forbidden.
        forbidden: ids that may not come next; read only if `allowed` is None.
        transitions: (token id, next state index); any other allowed token stays in this state. If
            there are several for one token id, the first counts.
    """

    allowed: tuple[int, ...] | None = None
    forbidden: tuple[int, ...] = ()
    transitions: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class TokenAutomaton:
    """States by index; generation starts in `start`. The state is a function of the output tokens
    alone, so it survives preemption and resumption: replay the tokens.

    Raises:
        ValueError: no states, an index outside the states, or a state that allows nothing.
    """

    states: tuple[AutomatonState, ...]
    start: int = 0

    def __post_init__(self) -> None:
        if not self.states:
            raise ValueError("a token automaton needs at least one state")
        if not 0 <= self.start < len(self.states):
            raise ValueError(f"start state {self.start} is not one of the {len(self.states)} states")
        for index, state in enumerate(self.states):
            if state.allowed is not None and not state.allowed:
                raise ValueError(f"state {index} allows no token")
            for token_id, target in state.transitions:
                if not 0 <= target < len(self.states):
                    raise ValueError(
                        f"state {index} leads on token {token_id} to {target}, which is not one of the "
                        f"{len(self.states)} states"
                    )
