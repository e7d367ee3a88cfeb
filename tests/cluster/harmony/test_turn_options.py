"""What the options of a turn's grammar allow, and how its reasoning ends at a limit."""

from collections.abc import Mapping, Sequence

import pytest

from cluster.harmony.automaton import TurnAutomata
from cluster.harmony.encoding import HarmonyEncoding
from cluster.harmony.turn_grammar import ToolBody, TurnGrammar, answer_share, turn_limits
from tests.support.gateway import VOCAB_SIZE, make_encoding
from workers.constraint.automaton import NO_LIMITS, ConstraintLimits, TokenAutomaton
from workers.constraint.codec import encode
from workers.constraint.state import AutomatonTables
from workers.grammars.grammar import Grammar

TOOLS = (
    ToolBody("f"),
    ToolBody("typed", Grammar("typed")),
    ToolBody("alike", Grammar("typed")),
    ToolBody("patch", Grammar("patch"), "text"),
)
WRAP_UP = "\n\nTime is up."
HEADER = "<|start|>assistant"
FINAL = "<|channel|>final<|message|>"
REASONING = "<|channel|>analysis<|message|>a<|end|><|start|>assistant"
PREAMBLE = "<|channel|>commentary<|message|>a<|end|><|start|>assistant"
CALL = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>"
OPENING = "<|channel|>commentary to=functions."


@pytest.fixture(scope="module")
def encoding(tmp_path_factory: pytest.TempPathFactory) -> HarmonyEncoding:
    return make_encoding(tmp_path_factory.mktemp("tokenizer"))


class Walk:
    """A run of an automaton over text."""

    def __init__(
        self, encoding: HarmonyEncoding, grammar: TurnGrammar, limits: ConstraintLimits = NO_LIMITS
    ) -> None:
        self.automaton: TokenAutomaton = TurnAutomata(encoding, VOCAB_SIZE).of(grammar)
        self.num_tokens = 0
        self._encoding = encoding
        self._limits = limits
        self._tables = AutomatonTables(encode(self.automaton))
        self.place = self._tables.begin([], limits)

    def takes(self, text: str) -> bool:
        """Return whether each token of the text was allowed."""
        return all(map(self.push, self._encoding.encode_with_special(text)))

    def push(self, token_id: int) -> bool:
        state = self.automaton.states[self.place.state]
        allowed = token_id not in state.forbidden if state.allowed is None else token_id in state.allowed
        self.place = self._tables.advance(self.place, token_id, self._limits)
        self.num_tokens += 1
        return allowed

    def forced(self) -> str:
        """Take the tokens of states that allow one token; return their text."""
        ids = []
        while (allowed := self.automaton.states[self.place.state].allowed) and len(allowed) == 1:
            ids.append(allowed[0])
            assert self.push(allowed[0])
        return self._encoding.decode(ids, skip_special_tokens=False)

    def body(self) -> str | None:
        """Return the grammar of the body that was opened."""
        grammar = self.automaton.states[self.place.state].grammar
        return None if grammar is None else self.automaton.grammars[grammar]


def allowed(encoding: HarmonyEncoding, grammar: TurnGrammar, texts: Mapping[str, bool]) -> None:
    for text, expected in texts.items():
        assert Walk(encoding, grammar).takes(text) == expected, text


def test_bodies_have_the_grammars_of_their_tools_and_equal_ones_one_state(
    encoding: HarmonyEncoding,
) -> None:
    grammar = TurnGrammar(TOOLS, "allowed", Grammar("answer"))
    states = set()
    for header, wanted in {
        FINAL: "answer",
        "<|channel|>final <|constrain|>json<|message|>": "answer",
        f"{OPENING}f<|message|>": None,
        f"{OPENING}typed json<|message|>": "typed",
        " to=functions.alike<|channel|>commentary <|constrain|>json<|message|>": "typed",
        f"{REASONING}<|channel|>analysis to=functions.typed code<|message|>": "typed",
        f"{OPENING}patch<|message|>": "patch",
    }.items():
        walk = Walk(encoding, grammar)
        assert walk.takes(header), header
        assert walk.body() == wanted, header
        if wanted == "typed":
            states.add(walk.place.state)
    assert len(states) == 1


def test_custom_tools_have_text(encoding: HarmonyEncoding) -> None:
    allowed(
        encoding,
        TurnGrammar(TOOLS, "allowed"),
        {
            f"{OPENING}patch code<|message|>": True,
            f"{OPENING}patch text<|message|>": True,
            f"{OPENING}patch <|constrain|>text<|message|>": True,
            f"{OPENING}patch <|constrain|>json<|message|>": False,
            f"{OPENING}patch json<|message|>": False,
            f"{OPENING}f text<|message|>": False,
        },
    )


def test_an_answer_with_a_grammar_is_the_only_text_of_its_turn(encoding: HarmonyEncoding) -> None:
    """APIs join the texts of a turn."""
    texts = {f"{REASONING}{FINAL}": True, f"{REASONING}{PREAMBLE}": False}
    allowed(encoding, TurnGrammar(answer=Grammar("answer")), texts)
    allowed(encoding, TurnGrammar(TOOLS, "allowed", Grammar("answer")), texts | {f"{REASONING}{CALL}": True})
    allowed(encoding, TurnGrammar(TOOLS, "allowed"), {f"{PREAMBLE}{CALL}": True, f"{PREAMBLE}{FINAL}": True})


def test_without_reasoning_the_answer_or_the_call_comes_at_once(encoding: HarmonyEncoding) -> None:
    texts = {FINAL: True, CALL: False, REASONING: False, PREAMBLE: False}
    allowed(encoding, TurnGrammar(reasoning="none"), texts)
    allowed(encoding, TurnGrammar(TOOLS, "allowed", reasoning="none"), texts | {CALL: True})
    required = {FINAL: False, CALL: True, REASONING: False, PREAMBLE: False}
    allowed(encoding, TurnGrammar(TOOLS, "required", reasoning="none"), required)


@pytest.mark.parametrize("calls", ["allowed", "required"])
def test_after_a_call_comes_another_or_the_end(encoding: HarmonyEncoding, calls: str) -> None:
    grammar = TurnGrammar(TOOLS, "required" if calls == "required" else "allowed", max_calls=2)
    begun = f"{REASONING}{CALL}"
    allowed(
        encoding,
        grammar,
        {
            f"{begun}<|return|>": True,
            f"{begun}<|start|>functions<|return|>": True,
            f"{begun}{HEADER}{CALL}{HEADER}{CALL}<|return|>": True,
            f"{begun}{HEADER} to=functions.f<|channel|>analysis code<|message|>": True,
            f"{begun}{HEADER}{FINAL}": False,
            f"{begun}{HEADER}<|channel|>analysis<|message|>": False,
            f"{begun}{HEADER}<|channel|>commentary<|message|>": False,
            f"{begun}<|start|>functions.f": False,
            f"{begun}<|end|>": False,
        },
    )


ANSWER_HEADER = f"<|end|>{HEADER}{FINAL}"
CALL_HEADER = f"<|end|>{HEADER}<|channel|>commentary to=functions"


@pytest.mark.parametrize(
    ("grammar", "forced"),
    [
        (TurnGrammar(), ANSWER_HEADER),
        (TurnGrammar(wrap_up=WRAP_UP), WRAP_UP + ANSWER_HEADER),
        (TurnGrammar(TOOLS, "allowed", Grammar("answer"), wrap_up=WRAP_UP), f"{WRAP_UP}<|end|>{HEADER}"),
        (TurnGrammar(TOOLS, "required", wrap_up=WRAP_UP), WRAP_UP + CALL_HEADER),
        (TurnGrammar(TOOLS, "required"), CALL_HEADER),
    ],
)
@pytest.mark.parametrize("limits", [ConstraintLimits(5), ConstraintLimits(None, 8)])
def test_reasoning_that_reaches_a_limit_is_followed_by_the_whole_header(
    encoding: HarmonyEncoding, grammar: TurnGrammar, forced: str, limits: ConstraintLimits
) -> None:
    walk = Walk(encoding, grammar, limits)
    header = encoding.encode_with_special("<|channel|>analysis<|message|>")
    reasoning = encoding.encode("aaaaaaaa")[:1] * 5
    assert all(map(walk.push, header + reasoning))
    if grammar.calls == "required":
        assert walk.forced() == f"{forced}."  # one token of the vocabulary begins like that
        assert walk.takes("typed <|constrain|>json<|message|>")
    else:
        assert walk.forced() == forced
        assert grammar.calls == "forbidden" or walk.takes(FINAL)
    assert walk.body() == ("answer" if grammar.answer else "typed" if grammar.calls == "required" else None)


def test_between_messages_a_limit_leaves_the_answer_or_a_call(encoding: HarmonyEncoding) -> None:
    """A header that has begun goes on."""
    grammar = TurnGrammar(TOOLS, "allowed", wrap_up=WRAP_UP)
    ended = len(encoding.encode_with_special(REASONING.removesuffix(HEADER)))
    for text, expected in {FINAL: True, CALL: True, REASONING: False, PREAMBLE: False}.items():
        for length in (ended, ended + 1, ended + 2):
            walk = Walk(encoding, grammar, ConstraintLimits(max_length=length))
            assert walk.takes(REASONING)
            assert walk.takes(text) == expected, (text, length)
        walk = Walk(encoding, grammar, ConstraintLimits(max_length=0))
        assert walk.takes(text) == expected
        walk = Walk(encoding, grammar, ConstraintLimits(max_length=1))
        assert walk.takes(text.removesuffix(HEADER).removesuffix("<|end|>")) == expected or text == REASONING


def test_a_preamble_that_reaches_a_limit_has_no_wrap_up(encoding: HarmonyEncoding) -> None:
    grammar = TurnGrammar(TOOLS, "allowed", wrap_up=WRAP_UP)
    walk = Walk(encoding, grammar, ConstraintLimits(max_length=8))
    assert walk.takes("<|channel|>commentary<|message|>")
    while walk.num_tokens < 8:
        assert walk.takes("a")
    assert walk.forced() == f"<|end|>{HEADER}"


def test_after_a_limit_the_model_may_call_a_tool_and_not_go_on_reasoning(encoding: HarmonyEncoding) -> None:
    """Nor is one that would go on made to call a tool."""
    grammar = TurnGrammar(TOOLS, "allowed", wrap_up=WRAP_UP)
    for text, expected in {
        FINAL: True,
        CALL: True,
        " to=functions.typed<|channel|>analysis <|constrain|>json<|message|>": True,
        PREAMBLE: False,
        "<|channel|>analysis": False,
    }.items():
        for limits in (ConstraintLimits(5), ConstraintLimits(None, 8)):
            walk = Walk(encoding, grammar, limits)
            assert walk.takes("<|channel|>analysis<|message|>aaaaa")
            assert walk.forced() == f"{WRAP_UP}<|end|>{HEADER}"
            assert walk.takes(text) == expected, text
        assert Walk(encoding, TurnGrammar(TOOLS, "allowed", reasoning="none")).takes(text) == expected, text


def test_several_calls_end_at_a_limit(encoding: HarmonyEncoding) -> None:
    walk = Walk(encoding, TurnGrammar(TOOLS, "allowed", max_calls=2), ConstraintLimits(max_length=8))
    assert walk.takes(CALL)
    assert walk.forced().startswith("<|return|>")


@pytest.mark.parametrize(
    ("max_tokens", "share"), [(1, 0), (2, 1), (64, 32), (127, 63), (128, 32), (1000, 250), (10**6, 4096)]
)
def test_the_answers_share(max_tokens: int, share: int) -> None:
    assert answer_share(max_tokens) == share


def test_reasoning_and_all_that_is_forced_leave_the_answers_share(encoding: HarmonyEncoding) -> None:
    """Whatever the model has begun."""
    for grammar in (
        TurnGrammar(wrap_up=WRAP_UP),
        TurnGrammar(wrap_up=9 * WRAP_UP),
        TurnGrammar(answer=Grammar("answer")),
        TurnGrammar(TOOLS, "allowed", wrap_up=WRAP_UP),
    ):
        for max_tokens in (*range(20, 200, 7), 500):
            limits = turn_limits(grammar, encoding, max_tokens=max_tokens)
            assert limits.max_length is not None
            headers: Sequence[str] = ("<|channel|>analysis<|message|>", "<|channel|>commentary<|message|>")
            # With tools the channel of preambles leads to a call, which has no share.
            for header in headers if not grammar.tools and grammar.answer is None else headers[:1]:
                used = answer_begins(encoding, grammar, limits, header)
                assert max_tokens - used >= answer_share(max_tokens) or limits.max_length == 0, max_tokens
                assert used >= limits.max_length


def answer_begins(
    encoding: HarmonyEncoding, grammar: TurnGrammar, limits: ConstraintLimits, header: str
) -> int:
    """Return the number of tokens before the answer's text, where the model writes reasoning or
    preambles as long as it may."""
    walk = Walk(encoding, grammar, limits)
    message = encoding.encode_with_special(f"{header}a<|end|><|start|>assistant")
    final = (encoding.message, *encoding.encode_with_special("<|channel|>final"))
    while True:
        wanted = message[walk.num_tokens % len(message)]
        state = walk.automaton.states[walk.place.state]
        if state.allowed is not None and wanted not in state.allowed:
            break
        assert walk.push(wanted)
    while (allowed := walk.automaton.states[walk.place.state].allowed) is not None:
        assert walk.push(next(token_id for token_id in (*final, *allowed) if token_id in allowed))
    return walk.num_tokens


def test_limits_of_reasoning(encoding: HarmonyEncoding) -> None:
    wrap_up = len(encoding.encode(WRAP_UP))
    grammar = TurnGrammar(wrap_up=WRAP_UP)
    assert turn_limits(grammar, encoding) == NO_LIMITS
    assert turn_limits(grammar, encoding, max_reasoning_tokens=100) == ConstraintLimits(100 - wrap_up)
    assert turn_limits(grammar, encoding, max_reasoning_tokens=wrap_up - 1) == ConstraintLimits(0)
    assert turn_limits(grammar, encoding, max_tokens=1, max_reasoning_tokens=0) == ConstraintLimits(0, 0)
    none = TurnGrammar(reasoning="none", wrap_up=WRAP_UP)
    assert turn_limits(none, encoding, max_tokens=100, max_reasoning_tokens=1) == NO_LIMITS
