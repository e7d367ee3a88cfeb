"""A token automaton: the token ids that may come next in each state, and the state after each. The
engine knows no harmony; the gateway builds these. `state` runs them, `codec` carries them between
processes."""

from collections.abc import Iterable
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
        grammar: index into `TokenAutomaton.grammars`: the tokens that come in this state, except
            those with a transition, spell a text of this grammar, which begins when the state is
            entered. Those with a transition may come only where the text is complete. None: no
            further restriction.
        counted: tokens that come in this state count against
            `ConstraintLimits.max_counted_tokens`.
        overflow: the state that is entered in place of this one once a limit of the request is
            reached; None: no limit ends this state.
    """

    allowed: tuple[int, ...] | None = None
    forbidden: tuple[int, ...] = ()
    transitions: tuple[tuple[int, int], ...] = ()
    grammar: int | None = None
    counted: bool = False
    overflow: int | None = None


@dataclass(frozen=True, slots=True)
class ConstraintLimits:
    """The limits of one sequence after which its automaton takes `AutomatonState.overflow`.

    Attributes:
        max_counted_tokens: number of tokens in counted states; None: no limit.
        max_length: number of output tokens; None: no limit.
    """

    max_counted_tokens: int | None = None
    max_length: int | None = None


NO_LIMITS = ConstraintLimits()


@dataclass(frozen=True, slots=True)
class TokenAutomaton:
    """States by index; generation starts in `start`. The state is a function of the output tokens
    and the request's limits alone, so it survives preemption and resumption: replay the tokens.

    Attributes:
        grammars: grammars of states, each as llguidance reads it.

    Raises:
        ValueError: no states, an index outside the states or grammars, a state that allows nothing,
            or an overflow that leads to one that has an overflow itself.
    """

    states: tuple[AutomatonState, ...]
    start: int = 0
    grammars: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.states:
            raise ValueError("a token automaton needs at least one state")
        self._check_index(self.start, "the start state")
        for index, state in enumerate(self.states):
            if state.allowed is not None and not state.allowed:
                raise ValueError(f"state {index} allows no token")
            for token_id, target in state.transitions:
                self._check_index(target, f"state {index} leads on token {token_id} to")
            if state.grammar is not None and not 0 <= state.grammar < len(self.grammars):
                raise ValueError(
                    f"state {index} has grammar {state.grammar}, which is not one of the "
                    f"{len(self.grammars)} grammars"
                )
            if state.overflow is not None:
                self._check_index(state.overflow, f"state {index} overflows to")
                if self.states[state.overflow].overflow is not None:
                    raise ValueError(f"state {index} overflows to {state.overflow}, which overflows itself")

    def _check_index(self, state: int, what: str) -> None:
        if not 0 <= state < len(self.states):
            raise ValueError(f"{what} {state}, which is not one of the {len(self.states)} states")


def text_automaton(grammar: str, ends: tuple[int, ...], no_text: Iterable[int]) -> TokenAutomaton:
    """Return the automaton of one text of a grammar, followed by an end token.

    Args:
        ends: the tokens that may end the text.
        no_text: all tokens that are in no text; those of `ends` do not count.
    """
    others = tuple(token_id for token_id in no_text if token_id not in ends)
    text = AutomatonState(forbidden=others, transitions=tuple((end, 1) for end in ends), grammar=0)
    return TokenAutomaton((text, AutomatonState(allowed=ends)), grammars=(grammar,))
