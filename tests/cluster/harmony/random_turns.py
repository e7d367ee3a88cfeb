"""Turns of random tokens that an automaton allows, drawn so that each of its states and edges is
soon visited."""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from cluster.harmony.encoding import HarmonyEncoding
from cluster.harmony.turn_grammar import ToolBody, TurnGrammar
from workers.constraint.automaton import NO_LIMITS, ConstraintLimits, TokenAutomaton
from workers.constraint.codec import encode
from workers.constraint.state import AutomatonTables
from workers.grammars.grammar import json_schema, regex

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rom"]}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
ARGUMENTS = json_schema(SCHEMA, "tools")
PATCH = regex(r"(\+|-)[a-z ]{0,9}\n", "tools")
ANSWER = json_schema({"type": "array", "items": {"type": "boolean"}, "maxItems": 3}, "response_format")
WRAP_UP = "\n\nTime is up."
# One name is the beginning of another.
TOOLS = (ToolBody("get"), ToolBody("get_2", ARGUMENTS), ToolBody("m.1", PATCH, "text"))


def all_grammars() -> Iterator[TurnGrammar]:
    """Yield a grammar for each combination of options."""
    for wrap_up, reasoning, answer in product(("", WRAP_UP), ("free", "none"), (None, ANSWER)):
        if reasoning == "none" and wrap_up:
            continue
        base = {"wrap_up": wrap_up, "reasoning": reasoning}
        yield TurnGrammar(answer=answer, **base)
        for tools, max_calls in product((TOOLS, TOOLS[1:2]), (1, 3)):
            if wrap_up and tools != TOOLS:
                continue
            yield TurnGrammar(tools, "allowed", answer, max_calls=max_calls, **base)
            if answer is None:
                yield TurnGrammar(tools, "required", max_calls=max_calls, **base)


class Grammars:
    """Matchers of grammars over a small vocabulary."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._tokenizer = LLTokenizer(str(folder / "tokenizer.json"), n_vocab=vocab_size)
        self._begun = cache(lambda text: LLMatcher(self._tokenizer, text, log_level=0))

    def begin(self, grammar: str) -> LLMatcher:
        matcher = self._begun(grammar).deep_copy()
        assert not matcher.is_error(), matcher.get_error()
        return matcher

    def allowed(self, matcher: LLMatcher) -> list[int]:
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        ids: list[int] = np.flatnonzero(bits[: self._vocab_size]).tolist()
        return ids


@dataclass(frozen=True, slots=True)
class Drawn:
    """A turn.

    Attributes:
        limits: under which it was drawn.
    """

    ids: list[int]
    limits: ConstraintLimits


TEXT, OVERFLOW = -1, -2
"""In place of a token's id: any without a transition; none, as a limit is reached."""


class RandomTurns:
    """The maker of turns of one grammar.

    Attributes:
        visits: of each edge: a state, and the token id that leads from it, TEXT or OVERFLOW.
    """

    def __init__(
        self,
        grammar: TurnGrammar,
        automaton: TokenAutomaton,
        encoding: HarmonyEncoding,
        grammars: Grammars,
        vocab_size: int,
    ) -> None:
        self.automaton = automaton
        self.tables = AutomatonTables(encode(automaton))
        self.visits: Counter[tuple[int, int]] = Counter()
        self._max_calls = grammar.max_calls
        self._encoding = encoding
        self._grammars = grammars
        self._vocab_size = vocab_size
        # What leads out of a header, to the answer and to preambles, so that turns end.
        self._usual = [
            (encoding.message, encoding.return_, *encoding.encode(channel))
            for channel in ("final", "final", "final", "commentary", "commentary", "analysis")
        ]
        self._steps = [dict(state.transitions) for state in automaton.states]
        self._forbidden = cache(lambda state: frozenset(automaton.states[state].forbidden))
        self._open: list[set[int]] = [set() for _ in self._steps]
        for at, edge in self.edges():
            self._open[at].add(edge)

    def edges(self) -> set[tuple[int, int]]:
        """Return all edges, except those of the state after the turn's end."""
        edges = {(at, token_id) for at, steps in enumerate(self._steps) for token_id in steps}
        for at, state in enumerate(self.automaton.states):
            if state.allowed is None:
                edges.add((at, TEXT))
            if state.overflow is not None:
                edges.add((at, OVERFLOW))
        over = {at for at, steps in enumerate(self._steps) if at in steps.values()}
        return {edge for edge in edges if edge[0] not in over}

    @property
    def num_missed(self) -> int:
        """Number of edges that no turn has visited."""
        return sum(map(len, self._open))

    def draw(self, rng: random.Random, max_tokens: int, limits: ConstraintLimits) -> Drawn:
        """Return a turn of at most `max_tokens` tokens."""
        return self._draw(rng, max_tokens, limits, None)

    def draw_unvisited(self, rng: random.Random) -> Drawn:
        """Return a turn that goes to edges that no turn has visited."""
        way, limits = self._to_overflow(rng)
        return self._draw(rng, 200, limits, way)

    def _draw(
        self, rng: random.Random, max_tokens: int, limits: ConstraintLimits, way: dict[int, int] | None
    ) -> Drawn:
        ids: list[int] = []
        num_calls = 0
        place = self.tables.begin([], limits)
        self._note(self.automaton.start, place.state)
        matcher = self._begin(place.state)
        while len(ids) < max_tokens:
            state = place.state
            if way is not None and state not in way:
                way = self._to_nearest(state)
            token_id = self._choose(state, matcher, way, rng)
            following = self._steps[state].get(token_id)
            edge = TEXT if following is None else token_id
            self.visits[state, edge] += 1
            self._open[state].discard(edge)
            if way is not None and way.get(state) == edge:
                del way[state]
            ids.append(token_id)
            place = self.tables.advance(place, token_id, limits)
            if following is not None:
                self._note(following, place.state)
                matcher = self._begin(place.state)
            elif matcher is not None:
                assert matcher.consume_token(token_id)
            num_calls += token_id == self._encoding.call
            if token_id == self._encoding.return_ or num_calls == self._max_calls:
                break
        return Drawn(ids, limits)

    def _to_nearest(self, state: int) -> dict[int, int] | None:
        """Return the edge to take in each state on the way to the nearest edge that was not
        visited, which is the last; None if no more can be reached."""
        return self._way(state, lambda at: min(self._open[at] - {OVERFLOW}, default=None))

    def _to_overflow(self, rng: random.Random) -> tuple[dict[int, int], ConstraintLimits]:
        """Return the way to a state with an overflow, if there is one to take, and limits under
        which it is taken: edges behind it are reached in no other way."""
        states = [at for at, state in enumerate(self.automaton.states) if state.overflow is not None]
        waiting = [at for at in states if OVERFLOW in self._open[at]] or states
        if not waiting or rng.random() < 0.5:
            return {}, NO_LIMITS
        target = rng.choice(waiting)
        way = self._way(self.automaton.start, lambda at: OVERFLOW if at == target else None)
        assert way is not None
        del way[target]
        return way, ConstraintLimits(max_length=len(way))

    def _way(self, state: int, found: Callable[[int], int | None]) -> dict[int, int] | None:
        before: dict[int, tuple[int, int]] = {}
        pending = [state]
        for at in pending:  # grows while it is read
            if (edge := found(at)) is not None:
                way = {at: edge}
                while at != state:
                    at, way[at] = before[at]
                return way
            for token_id, following in self._steps[at].items():
                if following != state and following not in before:
                    before[following] = at, token_id
                    pending.append(following)
        return None

    def _begin(self, state: int) -> LLMatcher | None:
        grammar = self.automaton.states[state].grammar
        return None if grammar is None else self._grammars.begin(self.automaton.grammars[grammar])

    def _note(self, entered: int, state: int) -> None:
        if state != entered:
            self.visits[entered, OVERFLOW] += 1
            self._open[entered].discard(OVERFLOW)

    def _choose(
        self, state: int, matcher: LLMatcher | None, way: dict[int, int] | None, rng: random.Random
    ) -> int:
        entry, steps = self.automaton.states[state], self._steps[state]
        aimed = None if way is None else way.get(state)
        if entry.allowed is not None:
            if aimed in steps:
                return aimed
            usual = [i for i in rng.choice(self._usual) if i in steps]
            return rng.choice(usual or entry.allowed)
        text, may_end = self._text(state, matcher, rng)
        wants_end = aimed in steps if aimed is not None else rng.random() < 0.4
        if text is not None and not (may_end and wants_end):
            return text
        assert may_end
        return aimed if aimed in steps else rng.choice(list(steps))

    def _text(self, state: int, matcher: LLMatcher | None, rng: random.Random) -> tuple[int | None, bool]:
        """Return a token for a body, None if only its end may come, and whether that may."""
        if matcher is not None:
            texts = [i for i in self._grammars.allowed(matcher) if self._encoding.token_bytes(i)]
            return (rng.choice(texts) if texts else None), matcher.is_accepting()
        others = self._forbidden(state) | self._steps[state].keys()
        while (token_id := rng.randrange(self._vocab_size)) in others:
            pass
        return token_id, True
