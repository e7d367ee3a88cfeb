"""The token automaton of a turn: which token ids may come next, so that what a model writes is a
well-formed turn whatever its weights are.

Headers are a regular language over bytes and control tokens. It has the spellings that the models
are known to use: channel or recipient first, calls on `commentary` and `analysis`, a content type
with or without `<|constrain|>` or none. From it follow the ids in each state, in every
tokenization. Bodies are texts without special tokens, some of a grammar; each ends with the one
control token that belongs there.
"""

from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property

from cluster.harmony.encoding import HarmonyEncoding
from cluster.harmony.turn_grammar import TurnGrammar
from cluster.harmony.turn_graph import SPELLINGS, TOKEN, TooManyStates, TurnGraph
from workers.constraint.automaton import MAX_AUTOMATON_STATES, AutomatonState, TokenAutomaton
from workers.errors import InvalidRequest


class TurnAutomata:
    """The automata of turns in one vocabulary. Safe to use from several threads.

    Args:
        vocab_size: the model's, which can be larger than the tokenizer's.
        max_states: maximum number of an automaton's states, which engines accept.
    """

    def __init__(
        self, encoding: HarmonyEncoding, vocab_size: int, max_states: int = MAX_AUTOMATON_STATES
    ) -> None:
        self._encoding = encoding
        self._vocab_size = vocab_size
        self._max_states = max_states

    def prepare(self) -> None:
        """Sort the vocabulary, which takes the most time of the first automaton."""
        _ = self._texts, self._not_text

    def of(self, grammar: TurnGrammar) -> TokenAutomaton:
        """Return the automaton of a turn, which begins after the prompt's `<|start|>assistant`.

        Raises:
            InvalidRequest: the names of the tools take more than `max_states`.
        """
        for spelling in SPELLINGS:
            try:
                graph = TurnGraph(grammar, self._encoding, spelling, self._max_states)
                return _TokenStates(graph, self._texts, self._not_text).automaton(self._max_states)
            except TooManyStates:
                pass
        raise InvalidRequest(
            f"tools has names that are too long together for harmony_constraint 'headers': they take "
            f"more than {self._max_states} states. Send fewer tools or shorter names, or "
            f"harmony_constraint 'off'.",
            "tools",
        )

    @cached_property
    def _texts(self) -> "_Texts":
        ids = range(self._encoding.vocab_size)
        return _Texts(sorted((text, i) for i in ids if (text := self._encoding.token_bytes(i))))

    @cached_property
    def _not_text(self) -> tuple[int, ...]:
        """The ids that no body has: special tokens, and ids without a token."""
        return tuple(i for i in range(self._vocab_size) if not self._encoding.token_bytes(i))


class _Texts:
    """The vocabulary's texts in order.

    Args:
        entries: (bytes, id) of each token with a text, sorted.
    """

    def __init__(self, entries: Sequence[tuple[bytes, int]]) -> None:
        self._texts = [text for text, _ in entries]
        self._ids = [token_id for _, token_id in entries]

    def beginning_with(self, prefix: bytes) -> tuple[bool, list[int]]:
        """Return whether a token's text begins with the prefix, and the ids of those that are
        it."""
        at = bisect_left(self._texts, prefix)
        if at == len(self._texts) or not self._texts[at].startswith(prefix):
            return False, []
        ids = []
        while at < len(self._texts) and self._texts[at] == prefix:
            ids.append(self._ids[at])
            at += 1
        return True, ids


class _TokenStates:
    """The states of a graph that lie between tokens, with the ids that lead from one to the
    next."""

    def __init__(self, turn: TurnGraph, texts: _Texts, not_text: Sequence[int]) -> None:
        self._graph = turn.graph
        self._start = turn.start
        self._texts = texts
        self._not_text = not_text
        self._forbidden: dict[int, tuple[int, ...]] = {}
        self._grammars: dict[str, int] = {}

    def automaton(self, max_states: int) -> TokenAutomaton:
        """Return the automaton over token ids.

        Raises:
            TooManyStates: more than `max_states`.
        """
        order = {self._start: 0}
        pending = [self._start]
        all_steps = []
        for state in pending:  # grows while it is read
            steps = self._steps(state)
            all_steps.append(steps)
            overflow = self._graph.overflows.get(state)
            for following in (*steps.values(), *(() if overflow is None else (overflow,))):
                if following not in order:
                    order[following] = len(order)
                    pending.append(following)
            if len(order) > max_states:
                raise TooManyStates
        states = tuple(self._state(at, steps, order) for at, steps in zip(pending, all_steps, strict=True))
        return TokenAutomaton(states, grammars=tuple(self._grammars))

    def _state(self, state: int, steps: dict[int, int], order: dict[int, int]) -> AutomatonState:
        transitions = tuple((token_id, order[steps[token_id]]) for token_id in sorted(steps))
        at = self._graph.overflows.get(state)
        overflow = None if at is None else order[at]
        body = self._graph.bodies.get(state)
        if body is None:
            return AutomatonState(tuple(sorted(steps)), transitions=transitions, overflow=overflow)
        if body.end not in self._forbidden:
            self._forbidden[body.end] = tuple(i for i in self._not_text if i != body.end)
        return AutomatonState(
            forbidden=self._forbidden[body.end],
            transitions=transitions,
            grammar=None
            if body.grammar is None
            else self._grammars.setdefault(body.grammar, len(self._grammars)),
            counted=body.counted,
            overflow=overflow,
        )

    def _steps(self, state: int) -> dict[int, int]:
        """Return the state after each id that leads to another state."""
        if (body := self._graph.bodies.get(state)) is not None:
            return {body.end: body.next}
        found: dict[int, int] = {}
        pending = [(state, b"")]
        while pending:
            at, text = pending.pop()
            for symbol, following in self._graph.edges[at].items():
                if symbol >= TOKEN:
                    if not text:
                        found[symbol - TOKEN] = following
                    continue
                longer = text + bytes((symbol,))
                more, ids = self._texts.beginning_with(longer)
                found |= dict.fromkeys(ids, following)
                if more:
                    pending.append((following, longer))
        return found
