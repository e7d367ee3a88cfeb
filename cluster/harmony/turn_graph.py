"""The automaton of a turn over bytes and control tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from cluster.harmony.encoding import HarmonyEncoding
from cluster.harmony.message import FUNCTIONS
from cluster.harmony.turn_grammar import ROLE, TurnGrammar
from workers.grammars.grammar import Grammar

Spelling = Literal["any", "names", "usual"]
"""Which tokenizations the header of a call has. `any`: all. `names`: all of the tools' names, but
of what follows them only the tokenizer's. `usual`: only the tokenizer's. Each takes fewer states
than the one before."""
SPELLINGS: tuple[Spelling, ...] = ("any", "names", "usual")

TOKEN = 256
Symbol = int
"""A byte, or 256 plus a token id."""

_PLAIN_TYPES = {"json": ("json", "code"), "text": ("code", "text")}
"""Content types after a blank, by the kind of content."""
_CONSTRAINED_TYPES = {"json": ("json", "code", "JSON"), "text": ("code", "text")}
"""Those after `<|constrain|>`."""
_RESULT_ROLE = FUNCTIONS[:-1]
"""Beginning of the role in which a tool answers."""


class TooManyStates(Exception):
    """A graph has more states than it may have."""


@dataclass(slots=True)
class Body:
    """The state of a body.

    Attributes:
        end: the id that ends it.
        next: state after its end.
        grammar: of its text; None: any text.
        counted: whether its tokens are reasoning.
    """

    end: int
    next: int
    grammar: str | None = None
    counted: bool = False


@dataclass(slots=True)
class Graph:
    """A deterministic automaton over symbols.

    Attributes:
        edges: of each state, the next state by symbol. Bodies have none.
        bodies: the states that are bodies.
        overflows: the state that a state's place is taken by once the turn reaches a limit.
    """

    edges: list[dict[Symbol, int]] = field(default_factory=list)
    bodies: dict[int, Body] = field(default_factory=dict)
    overflows: dict[int, int] = field(default_factory=dict)

    def state(self) -> int:
        """Add a state."""
        self.edges.append({})
        return len(self.edges) - 1

    def path(self, start: int, symbols: Sequence[Symbol], end: int | None = None) -> int:
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

    def _step(self, state: int, symbol: Symbol, end: int | None) -> int:
        following = self.edges[state].get(symbol)
        if following is None:
            following = self.edges[state][symbol] = self.state() if end is None else end
        assert end is None or following == end, "two paths end in different states"
        return following


class TurnGraph:
    """The automaton of a turn over symbols.

    Attributes:
        graph: of headers and bodies.
        start: the state after the prompt.

    Raises:
        TooManyStates: far more than `max_states`.
    """

    def __init__(
        self, grammar: TurnGrammar, encoding: HarmonyEncoding, spelling: Spelling, max_states: int
    ) -> None:
        self._grammar = grammar
        self._encoding = encoding
        self._spelling = spelling
        self._max_states = max_states
        self._channel, self._constrain, self._message, self._return = (
            TOKEN + i for i in (encoding.channel, encoding.constrain, encoding.message, encoding.return_)
        )
        graph = self.graph = Graph()
        over = graph.state()
        graph.bodies[over] = Body(encoding.return_, over)
        self._answer = self._body(encoding.return_, over, grammar.answer)
        self._after_call = over if grammar.max_calls == 1 else graph.state()
        # A recipient after the channel, and one before it.
        self._recipients, self._recipients_first = graph.state(), graph.state()
        if grammar.calls != "forbidden":
            self._add_recipients()
        if grammar.max_calls > 1:
            self._add_further_calls(over)
        direct = self._header(answer=grammar.calls != "required")
        self.start = direct if grammar.reasoning == "none" else self._with_reasoning(direct)
        self._check_size()

    def _with_reasoning(self, direct: int) -> int:
        """Add the messages that may precede the answer or the call. Return the state in which a
        message of any kind begins.

        Args:
            direct: the state in which only the answer or the call begins.
        """
        graph, grammar, encoding = self.graph, self._grammar, self._encoding
        between = graph.state()
        reasoning = self._body(encoding.end, between, counted=True)
        preamble = None if grammar.answer else self._body(encoding.end, between)
        start = self._header(reasoning, preamble, answer=grammar.calls != "required")
        graph.path(between, [TOKEN + encoding.start, *ROLE.encode()], start)
        graph.overflows[start] = direct
        graph.overflows[between] = graph.state()
        graph.path(graph.overflows[between], self._tokens(f"<|start|>{ROLE}"), direct)

        ended = graph.state()
        forced = self._tokens(grammar.forced_header)
        if grammar.calls == "forbidden":
            graph.path(ended, forced, self._answer)
        elif grammar.calls == "allowed":
            graph.path(ended, forced, direct)
        elif self._spelling == "usual":
            graph.path(ended, self._tokens(grammar.forced_header.partition(" ")[0]), self._recipients)
        else:
            graph.path(ended, forced, graph.path(self._recipients, f" to={FUNCTIONS[:-1]}".encode()))
        graph.overflows[reasoning] = ended
        if grammar.wrap_up:
            graph.overflows[reasoning] = graph.state()
            graph.path(
                graph.overflows[reasoning], [TOKEN + i for i in encoding.encode(grammar.wrap_up)], ended
            )
        if preamble is not None:
            graph.overflows[preamble] = ended
        return start

    def _header(self, reasoning: int | None = None, preamble: int | None = None, *, answer: bool) -> int:
        """Return a state in which the messages with these bodies begin, the answer, and calls as
        far as the turn may have them."""
        graph, calls = self.graph, self._grammar.calls != "forbidden"
        start = graph.state()
        channels = graph.path(start, [self._channel])
        for name, body in ((b"analysis", reasoning), (b"commentary", preamble)):
            if body is not None:
                graph.path(graph.path(channels, name), [self._message], body)
            # Without reasoning, a model that opened its channel all the same would have to call a
            # tool, and could not answer.
            if calls and not (name == b"analysis" and reasoning is None and answer):
                graph.join(graph.path(channels, name), self._recipients)
        if answer:
            final = graph.path(channels, b"final")
            graph.path(final, [self._message], self._answer)
            self._add_types(final, self._answer, (), _CONSTRAINED_TYPES["json"])
        if calls:
            graph.join(start, self._recipients_first)
        return start

    def _add_further_calls(self, over: int) -> None:
        """Let a call be followed by another one, by the beginning of its result, with which the
        model waits for it, or by the end of the turn."""
        graph = self.graph
        graph.path(self._after_call, [self._return], over)
        author = graph.path(self._after_call, [TOKEN + self._encoding.start])
        graph.path(author, ROLE.encode(), self._header(answer=False))
        waiting = graph.path(author, self._tokens(_RESULT_ROLE))
        graph.path(waiting, [self._return], over)
        graph.overflows[self._after_call] = waiting

    def _add_recipients(self) -> None:
        """Add the tools, with what follows their names."""
        graph = self.graph
        typed: dict[tuple[Grammar | None, str], int] = {}
        named: dict[tuple[Grammar | None, str], int] = {}
        for tool in self._grammar.tools:
            kind = (tool.arguments, tool.content)
            if kind not in typed:
                typed[kind], named[kind] = graph.state(), graph.state()
                body = self._body(self._encoding.call, self._after_call, tool.arguments)
                graph.path(typed[kind], [self._message], body)
                self._add_types(
                    typed[kind], body, _PLAIN_TYPES[tool.content], _CONSTRAINED_TYPES[tool.content]
                )
                for channel in ("commentary", "analysis"):
                    graph.path(named[kind], self._word(channel), typed[kind])
            recipient = f" to={FUNCTIONS}{tool.name}"
            graph.join(graph.path(self._recipients, self._name(recipient)), typed[kind])
            named_end = graph.path(self._recipients_first, self._name(recipient))
            graph.path(named_end, [self._channel], named[kind])
            self._check_size()

    def _add_types(self, state: int, body: int, plain: Sequence[str], constrained: Sequence[str]) -> None:
        """Let a content type follow, and then the body."""
        graph = self.graph
        typed, constrain = graph.state(), graph.state()
        graph.path(typed, [self._message], body)
        for name in plain:
            graph.path(state, self._word(f" {name}"), typed)
        graph.path(state, [self._constrain], constrain)
        graph.path(state, [*self._word(" "), self._constrain], constrain)
        for name in constrained:
            graph.path(constrain, self._word(name), typed)

    def _body(
        self, end: int, following: int, grammar: Grammar | None = None, *, counted: bool = False
    ) -> int:
        state = self.graph.state()
        text = None if grammar is None else grammar.text
        self.graph.bodies[state] = Body(end, following, text, counted)
        return state

    def _word(self, text: str) -> Sequence[Symbol]:
        """Return a word of the format that follows a tool's name."""
        return text.encode() if self._spelling == "any" else self._tokens(text)

    def _name(self, text: str) -> Sequence[Symbol]:
        """Return a tool's name."""
        if self._spelling == "usual":
            return [TOKEN + i for i in self._encoding.encode(text)]
        return text.encode()

    def _tokens(self, text: str) -> Sequence[Symbol]:
        """Return text of the format in the tokenizer's own tokenization."""
        return [TOKEN + i for i in self._encoding.encode_with_special(text)]

    def _check_size(self) -> None:
        # Not all of them lie between tokens.
        if len(self.graph.edges) > 2 * self._max_states:
            raise TooManyStates
