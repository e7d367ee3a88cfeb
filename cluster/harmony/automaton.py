"""The token automaton of a turn: which token ids may come next, so that what a model writes is a
well-formed turn whatever its weights are.

Headers are a regular language over bytes and control tokens. It has the spellings that the models
are known to use: channel or recipient first, calls on `commentary` and `analysis`, a content type
with or without `<|constrain|>` or none. From it follow the ids in each state, in every
tokenization. Bodies are free but for special tokens; each ends with the one control token that
belongs there.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from cluster.harmony.encoding import HarmonyEncoding
from cluster.harmony.message import FUNCTIONS
from workers.constraint.automaton import MAX_AUTOMATON_STATES, AutomatonState, TokenAutomaton
from workers.errors import InvalidRequest

HarmonyConstraint = Literal["off", "headers"]
"""How far a turn is constrained: not at all, or to well-formed headers and ends of messages."""
Calls = Literal["allowed", "required", "forbidden"]

_ROLE = "assistant"
_CONTENT_TYPES = ("json", "code")
_CONSTRAINED_TYPES = (*_CONTENT_TYPES, "JSON")

_Symbol = int
"""A byte, or 256 plus the id of a control token."""
_CONTROL = 256


@dataclass(frozen=True, slots=True)
class TurnGrammar:
    """What a turn may consist of.

    Attributes:
        tools: names of the functions that may be called.
        calls: `required`: the turn ends in a call.
    """

    tools: tuple[str, ...] = ()
    calls: Calls = "forbidden"

    def __post_init__(self) -> None:
        assert self.tools or self.calls == "forbidden"


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

    def of(self, grammar: TurnGrammar) -> TokenAutomaton:
        """Return the automaton of a turn, which begins after the prompt's `<|start|>assistant`.

        Raises:
            InvalidRequest: the names of the tools take more than `max_states`.
        """
        headers = _Headers(grammar, self._encoding, self._max_states)
        return _TokenStates(headers, self._texts, self._not_text).automaton()

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


@dataclass(slots=True)
class _Body:
    """The state of a body.

    Attributes:
        end: the id that ends it.
        next: state after its end.
    """

    end: int
    next: int


@dataclass(slots=True)
class _Graph:
    """A deterministic automaton over symbols.

    Attributes:
        edges: of each state, the next state by symbol. Bodies have none.
        bodies: the states that are bodies.
    """

    edges: list[dict[_Symbol, int]] = field(default_factory=list)
    bodies: dict[int, _Body] = field(default_factory=dict)

    def state(self) -> int:
        """Add a state."""
        self.edges.append({})
        return len(self.edges) - 1

    def path(self, start: int, symbols: Sequence[_Symbol], end: int | None = None) -> int:
        """Add a path along these symbols, as far as it is not there; return its last state.

        Args:
            end: the last state; None: one of its own.
        """
        state = start
        for symbol in symbols[:-1]:
            state = self._step(state, symbol, None)
        return self._step(state, symbols[-1], end)

    def join(self, state: int, other: int) -> None:
        """Let what begins in the other state begin in this one too."""
        assert not self.edges[state].keys() & self.edges[other].keys(), "two paths begin alike"
        self.edges[state] |= self.edges[other]

    def _step(self, state: int, symbol: _Symbol, end: int | None) -> int:
        following = self.edges[state].get(symbol)
        if following is None:
            following = self.edges[state][symbol] = self.state() if end is None else end
        assert end is None or following == end, "two paths end in different states"
        return following


class _Headers:
    """The automaton of a turn over symbols.

    Attributes:
        graph: of headers and bodies.
        start: the state after the prompt.

    Raises:
        InvalidRequest: more than `max_states`.
    """

    def __init__(self, grammar: TurnGrammar, encoding: HarmonyEncoding, max_states: int) -> None:
        self._encoding = encoding
        self._max_states = max_states
        self._channel, self._constrain, self._message = (
            _CONTROL + token_id for token_id in (encoding.channel, encoding.constrain, encoding.message)
        )
        graph = self.graph = _Graph()
        self.start = graph.state()
        over, between = graph.state(), graph.state()
        graph.bodies[over] = _Body(encoding.return_, over)
        graph.path(between, [_CONTROL + encoding.start, *_ROLE.encode()], self.start)

        channels = graph.path(self.start, [self._channel])
        reasoning = graph.path(channels, b"analysis")
        self._open(reasoning, self._body(encoding.end, between))
        preamble = graph.path(channels, b"commentary")
        self._open(preamble, self._body(encoding.end, between))
        if grammar.calls != "required":
            final = graph.path(channels, b"final")
            answer = self._body(encoding.return_, over)
            self._open(final, answer)
            for blank in (b"", b" "):
                self._constrained(final, blank, answer)
        if grammar.calls != "forbidden":
            call = self._body(encoding.call, over)
            recipient = graph.path(reasoning, b" ")
            graph.path(preamble, b" ", recipient)  # the names' states are shared
            types = graph.state()
            self._typed(types, call)
            for end in self._recipients(recipient, b"", grammar.tools):
                graph.join(end, types)
            named = graph.state()
            for channel_name in (b"commentary", b"analysis"):
                self._typed(graph.path(named, channel_name), call)
            for end in self._recipients(self.start, b" ", grammar.tools):
                graph.path(end, [self._channel], named)

    def _body(self, end: int, following: int) -> int:
        state = self.graph.state()
        self.graph.bodies[state] = _Body(end, following)
        return state

    def _open(self, state: int, body: int) -> None:
        """Let the header end here."""
        self.graph.path(state, [self._message], body)

    def _recipients(self, state: int, blank: bytes, tools: Sequence[str]) -> Iterator[int]:
        """Add `to=` and the tools' names; yield the state after each."""
        for name in tools:
            yield self.graph.path(state, blank + f"to={FUNCTIONS}{name}".encode())
            if len(self.graph.edges) > self._max_states:
                raise InvalidRequest(
                    f"tools has names that are too long together for harmony_constraint 'headers': they take "
                    f"more than {self._max_states} states. Send fewer tools or shorter names, or "
                    f"harmony_constraint 'off'.",
                    "tools",
                )

    def _typed(self, state: int, body: int) -> None:
        """Let the header end here, after a content type or without one."""
        self._open(state, body)
        for name in _CONTENT_TYPES:
            self._open(self.graph.path(state, f" {name}".encode()), body)
        for blank in (b"", b" "):
            self._constrained(state, blank, body)

    def _constrained(self, state: int, blank: bytes, body: int) -> None:
        for name in _CONSTRAINED_TYPES:
            self._open(self.graph.path(state, [*blank, self._constrain, *name.encode()]), body)


class _TokenStates:
    """The states of a graph that lie between tokens, with the ids that lead from one to the
    next."""

    def __init__(self, headers: _Headers, texts: _Texts, not_text: Sequence[int]) -> None:
        self._graph = headers.graph
        self._start = headers.start
        self._texts = texts
        self._not_text = not_text

    def automaton(self) -> TokenAutomaton:
        """Return the automaton over token ids."""
        order = {self._start: 0}
        states = []
        pending = [self._start]
        for state in pending:  # grows while it is read
            steps = self._steps(state)
            for following in steps.values():
                if following not in order:
                    order[following] = len(order)
                    pending.append(following)
            body = self._graph.bodies.get(state)
            states.append((steps, body))
        return TokenAutomaton(
            tuple(
                AutomatonState(
                    allowed=tuple(sorted(steps)) if body is None else None,
                    forbidden=() if body is None else tuple(i for i in self._not_text if i != body.end),
                    transitions=tuple((token_id, order[steps[token_id]]) for token_id in sorted(steps)),
                )
                for steps, body in states
            )
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
                if symbol >= _CONTROL:
                    if not text:
                        found[symbol - _CONTROL] = following
                    continue
                longer = text + bytes((symbol,))
                more, ids = self._texts.beginning_with(longer)
                found |= dict.fromkeys(ids, following)
                if more:
                    pending.append((following, longer))
        return found
