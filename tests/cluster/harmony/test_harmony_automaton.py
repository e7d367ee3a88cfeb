"""The automaton of a turn: what it allows parses without a repair, and what the models write is
allowed."""

import random
from collections import Counter
from collections.abc import Collection, Sequence
from functools import cache

import openai_harmony as oh
import pytest

from cluster.harmony.automaton import TurnAutomata
from cluster.harmony.encoding import HarmonyEncoding
from cluster.harmony.make_tokenizer import HARMONY_VOCAB_SIZE
from cluster.harmony.message import MessageEnd
from cluster.harmony.parse import HarmonyParser
from cluster.harmony.turn_grammar import ToolBody, TurnGrammar
from tests.cluster.harmony.test_harmony_parse import spelled
from workers.constraint.automaton import NO_LIMITS, TokenAutomaton
from workers.constraint.codec import encode
from workers.constraint.state import AutomatonTables
from workers.errors import InvalidRequest
from workers.grammars.grammar import Grammar
from workers.rpc.validate import check_automaton

# One name is the beginning of another, one looks like a channel, one has all characters.
TOOLS = ("get", "get_weather", "commentary", "mcp.server-1_Z", "a" * 128)
BODIES = tuple(map(ToolBody, TOOLS))
GRAMMARS = {
    "no tools": TurnGrammar(),
    "auto": TurnGrammar(BODIES, "allowed"),
    "required": TurnGrammar(BODIES, "required"),
    "named": TurnGrammar((ToolBody("get_weather"),), "required"),
}


@pytest.fixture(scope="session")
def automata(gpt_oss: HarmonyEncoding) -> dict[str, TokenAutomaton]:
    made = TurnAutomata(gpt_oss, HARMONY_VOCAB_SIZE)
    return {name: made.of(grammar) for name, grammar in GRAMMARS.items()}


class Walk:
    """A run of an automaton over ids.

    Args:
        control: ids of control tokens.
    """

    def __init__(self, automaton: TokenAutomaton, control: Collection[int] = ()) -> None:
        self._automaton = automaton
        self._control = control
        self._steps = cache(lambda state: dict(automaton.states[state].transitions))
        self._forbidden = cache(lambda state: frozenset(automaton.states[state].forbidden))
        self.state = automaton.start

    def push(self, token_id: int) -> bool:
        """Take an id; return whether it was allowed."""
        state = self._automaton.states[self.state]
        allowed = (
            token_id in state.allowed
            if state.allowed is not None
            else 0 <= token_id < HARMONY_VOCAB_SIZE and token_id not in self._forbidden(self.state)
        )
        self.state = self._steps(self.state).get(token_id, self.state)
        return allowed

    def draw(self, rng: random.Random) -> int:
        """Return a random allowed id; a body ends after four tokens on average, and what may end in
        a header mostly does."""
        state = self._automaton.states[self.state]
        if state.allowed is not None:
            control = [token_id for token_id in state.allowed if token_id in self._control]
            return rng.choice(control if control and rng.random() < 0.7 else state.allowed)
        if rng.random() < 0.25:
            return state.transitions[0][0]
        while (token_id := rng.randrange(HARMONY_VOCAB_SIZE)) in self._forbidden(self.state):
            pass
        return token_id


def accepts(automaton: TokenAutomaton, ids: Sequence[int]) -> bool:
    walk = Walk(automaton)
    return all(walk.push(token_id) for token_id in ids)


@pytest.mark.parametrize("name", GRAMMARS)
def test_whatever_is_allowed_parses_without_a_repair(
    gpt_oss: HarmonyEncoding, oracle: oh.HarmonyEncoding, automata: dict[str, TokenAutomaton], name: str
) -> None:
    rng = random.Random(name)
    grammar, automaton = GRAMMARS[name], automata[name]
    seen: Counter[str] = Counter()
    visited: set[int] = set()
    walk = Walk(automaton, gpt_oss.control_tokens)
    for _ in range(300):
        walk.state = automaton.start
        parser, theirs = (
            HarmonyParser(gpt_oss, [tool.name for tool in grammar.tools]),
            oh.StreamableParser(oracle, role=oh.Role.ASSISTANT),
        )
        messages = []
        while not parser.turn_over:
            visited.add(walk.state)
            token_id = walk.draw(rng)
            assert walk.push(token_id)
            messages += [event.message for event in parser.push(token_id) if isinstance(event, MessageEnd)]
            theirs.process(token_id)
        assert parser.finish() == []
        assert parser.repairs.total() == 0, parser.repairs
        assert len(messages) == len(theirs.messages)
        seen.update(
            message.kind if message.channel != "commentary" else f"{message.kind} in commentary"
            for message in messages
        )
        last = messages[-1]
        assert all(message.kind != "tool_call" for message in messages[:-1])
        if grammar.calls == "required" or last.kind == "tool_call":
            assert last.recipient is not None
            assert last.recipient.removeprefix("functions.") in [tool.name for tool in grammar.tools]
            assert last.end == "call"
        else:
            assert (last.channel, last.end) == ("final", "return")
    kinds = {"reasoning", "text in commentary"}
    kinds |= {"text"} if grammar.calls != "required" else set()
    kinds |= {"tool_call", "tool_call in commentary"} if grammar.tools else set()
    assert seen.keys() == kinds
    assert min(seen.values()) >= 20
    assert len(visited) > len(automaton.states) / 3


ANSWERS = (
    "<|channel|>final<|message|>Hello.<|return|>",
    "<|channel|>analysis<|message|>Hm, 5 < 6.<|end|><|start|>assistant<|channel|>final<|message|><|return|>",
    "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b<|end|>"
    "<|start|>assistant<|channel|>commentary<|message|>I will.<|end|>"
    "<|start|>assistant<|channel|>final<|message|>c\n<|return|>",
    '<|channel|>final <|constrain|>json<|message|>{"a": 1}<|return|>',
    "<|channel|>final<|constrain|>json<|message|>{}<|return|>",
)
CALLS = tuple(
    f"{header}<|message|>{{}}<|call|>"
    for header in (
        "<|channel|>commentary to=functions.get_weather <|constrain|>json",
        "<|channel|>commentary to=functions.get_weather<|constrain|>JSON",
        "<|channel|>commentary to=functions.get json",
        "<|channel|>commentary to=functions.mcp.server-1_Z",
        " to=functions.get_weather<|channel|>commentary json",
        " to=functions.get_weather<|channel|>commentary <|constrain|>json",
        " to=functions.commentary<|channel|>analysis code",
        "<|channel|>analysis to=functions.get_weather code",
        f"<|channel|>analysis to=functions.{'a' * 128} code",
        "<|channel|>analysis<|message|>x<|end|><|start|>assistant<|channel|>commentary to=functions.get",
    )
)
MALFORMED = (
    "<|start|>",
    "Hello",
    "<|message|>",
    "<|channel|>commentary––commentary<|message|>",
    "<|channel|>analysis<|constrain|>json<|message|>",
    "<|channel|>final<|message|>a<|end|>",
    "<|channel|>final<|message|>a<|call|>",
    "<|channel|>analysis<|message|>a<|return|>",
    "<|channel|>analysis<|message|>a<|end|><|end|>",
    "<|channel|>analysis<|message|>a<|end|>b",
    "<|channel|>analysis<|message|>a<|end|><|start|>user",
    "<|channel|>analysis<|message|>a<|channel|>",
    "<|channel|>analysis<|message|>a<|endoftext|>",
    "<|channel|>commentary to=functions.got",
    "<|channel|>commentary to=functions.getter<|message|>",
    "<|channel|>commentary to=get<|message|>",
    "<|channel|>commentary to=functions.get to=functions.get",
    " to=functions.get<|channel|>commentary to=functions.get",
    " to=functions.get<|channel|>final",
    "<|channel|>final to=functions.get",
    "<|channel|>commentary to=functions.get<|message|>{}<|end|>",
)


def test_what_the_models_write_is_allowed_in_any_tokenization(
    gpt_oss: HarmonyEncoding, automata: dict[str, TokenAutomaton]
) -> None:
    rng = random.Random(1)
    for text in (*ANSWERS, *CALLS):
        ids = gpt_oss.encode_with_special(text)
        for tokens in (ids, *(spelled(gpt_oss, ids, rng) for _ in range(5))):
            is_call = text in CALLS
            assert accepts(automata["auto"], tokens), text
            assert accepts(automata["required"], tokens) == is_call, text
            assert accepts(automata["no tools"], tokens) != is_call, text
            assert accepts(automata["named"], tokens) == (is_call and "get_weather" in text), text


def test_what_would_break_a_turn_is_not(
    gpt_oss: HarmonyEncoding, automata: dict[str, TokenAutomaton]
) -> None:
    rng = random.Random(2)
    for text in MALFORMED:
        ids = gpt_oss.encode_with_special(text)
        for tokens in (ids, spelled(gpt_oss, ids, rng)):
            assert not any(accepts(automaton, tokens) for automaton in automata.values()), text


def test_ids_without_a_text_are_in_no_body(
    gpt_oss: HarmonyEncoding, automata: dict[str, TokenAutomaton]
) -> None:
    """Reserved tokens, and ids beyond the tokenizer's that a padded model has."""
    larger = TurnAutomata(gpt_oss, HARMONY_VOCAB_SIZE + 64).of(TurnGrammar())
    begun = gpt_oss.encode_with_special("<|channel|>analysis<|message|>")
    state = AutomatonTables(encode(larger)).begin(begun, NO_LIMITS).state
    allowed = set(range(HARMONY_VOCAB_SIZE + 64)) - set(larger.states[state].forbidden)
    assert allowed == {i for i in range(HARMONY_VOCAB_SIZE) if gpt_oss.token_bytes(i)} | {gpt_oss.end}


def test_equal_grammars_have_equal_automata(
    gpt_oss: HarmonyEncoding, automata: dict[str, TokenAutomaton]
) -> None:
    """Their ids name them to engines of all gateways."""
    again = TurnAutomata(gpt_oss, HARMONY_VOCAB_SIZE).of(GRAMMARS["auto"])
    assert encode(again) == encode(automata["auto"])
    assert encode(automata["auto"]) != encode(automata["required"])


def test_engines_take_the_automata_of_many_tools(gpt_oss: HarmonyEncoding) -> None:
    """A header is written in two orders; each character of a name takes a state in each of them."""
    names = tuple(f"mcp__server_{i % 4}__{i:02}_list_all_of_the_entries" for i in range(60))
    made = TurnAutomata(gpt_oss, HARMONY_VOCAB_SIZE).of(TurnGrammar(tuple(map(ToolBody, names)), "allowed"))
    check_automaton(made, HARMONY_VOCAB_SIZE)
    num_prefixes = len({name[:end] for name in names for end in range(1, len(name) + 1)})
    assert 2 * num_prefixes < len(made.states) < 2.5 * num_prefixes


@pytest.mark.parametrize("num_tools", [150, 512])
def test_with_very_many_tools_headers_have_the_tokenizers_spelling(
    gpt_oss: HarmonyEncoding, num_tools: int
) -> None:
    """Each tool has a schema of its own, and a name of 64 characters."""
    tools = tuple(
        ToolBody(f"{i % 64:02}_{'list_all_of_the_entries_' * 3}"[:61] + f"{i:03}", Grammar(str(i)))
        for i in range(num_tools)
    )
    made = TurnAutomata(gpt_oss, HARMONY_VOCAB_SIZE).of(TurnGrammar(tools, "required"))
    check_automaton(made, HARMONY_VOCAB_SIZE)
    assert len(made.grammars) == num_tools
    for header in (
        "<|channel|>commentary to=functions.{} <|constrain|>json",
        "<|channel|>analysis to=functions.{}<|constrain|>JSON",
        " to=functions.{}<|channel|>commentary json",
        " to=functions.{}<|channel|>analysis",
    ):
        for index in (0, num_tools // 2, num_tools - 1):
            walk = Walk(made)
            text = f"{header.format(tools[index].name)}<|message|>"
            assert all(map(walk.push, gpt_oss.encode_with_special(text))), text
            grammar = made.states[walk.state].grammar
            assert grammar is not None
            assert made.grammars[grammar] == str(index)


def test_names_that_are_too_long_together_are_refused(gpt_oss: HarmonyEncoding) -> None:
    names = tuple(f"{i:03}{'a1' * 50}" for i in range(1000))
    with pytest.raises(InvalidRequest, match="harmony_constraint") as refused:
        TurnAutomata(gpt_oss, HARMONY_VOCAB_SIZE).of(TurnGrammar(tuple(map(ToolBody, names)), "allowed"))
    assert refused.value.param == "tools"
