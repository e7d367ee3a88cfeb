"""What a turn may consist of, and how much of it may be reasoning."""

from dataclasses import dataclass
from typing import Literal

from cluster.harmony.encoding import HarmonyEncoding
from cluster.harmony.message import FUNCTIONS
from workers.constraint.automaton import NO_LIMITS, ConstraintLimits
from workers.grammars.grammar import Grammar

Calls = Literal["allowed", "required", "forbidden"]

MIN_ANSWER_TOKENS = 32
MAX_ANSWER_TOKENS = 4096
"""Bounds of the answer's share of a turn, which is a quarter of it."""
_SHORT_TURN = 4 * MIN_ANSWER_TOKENS
"""Length in tokens below which the answer's share is half of the turn."""

ROLE = "assistant"
_ANSWER_HEADER = "<|channel|>final<|message|>"


@dataclass(frozen=True, slots=True)
class ToolBody:
    """What a call of a tool may hold.

    Attributes:
        name: without its namespace.
        arguments: grammar of the call's body; None: any text.
        content: `text`: a custom tool, whose input is raw text.
    """

    name: str
    arguments: Grammar | None = None
    content: Literal["json", "text"] = "json"


@dataclass(frozen=True, slots=True)
class TurnGrammar:
    """What a turn may consist of.

    Attributes:
        tools: those that may be called.
        calls: `required`: the turn ends in a call.
        answer: grammar of the final text, which is then the only text: no preambles, which APIs
            join to it. None: any text.
        reasoning: `none`: the answer or the call is opened at once.
        max_calls: most calls of a turn. The automaton knows one or several; the reader of the
            turn ends it at the last one, and at one that repeats another
            (`cluster.generation.choices`). A turn with several needs
            `EngineRequest.ignored_stop_token_ids` with `<|call|>`, and its parser `several_calls`.
        wrap_up: text at the end of reasoning that reaches a limit; the answer or a call follows.
    """

    tools: tuple[ToolBody, ...] = ()
    calls: Calls = "forbidden"
    answer: Grammar | None = None
    reasoning: Literal["free", "none"] = "free"
    max_calls: int = 1
    wrap_up: str = ""

    def __post_init__(self) -> None:
        assert self.tools or self.calls == "forbidden"
        assert self.max_calls >= 1

    @property
    def forced_header(self) -> str:
        """The header after reasoning that reached a limit, from the end of the reasoning on, as far
        as the turn has no choice: calls that are allowed can follow as well as the answer."""
        begun = f"<|end|><|start|>{ROLE}"
        match self.calls:
            case "allowed":
                return begun
            case "required":
                return f"{begun}<|channel|>commentary to={FUNCTIONS[:-1]}"
            case "forbidden":
                return f"{begun}{_ANSWER_HEADER}"


def turn_limits(
    grammar: TurnGrammar,
    encoding: HarmonyEncoding,
    *,
    max_tokens: int | None = None,
    max_reasoning_tokens: int | None = None,
) -> ConstraintLimits:
    """Return the limits at which the reasoning of a turn ends.

    A share of `max_tokens` stays for the answer, or for a call that is required: a quarter, 32 to
    4096 tokens; half of it below 128. In front of it there is room for `wrap_up` and the header of
    the answer, and for a header of the model's own that has begun. Where that leaves nothing, the
    turn has no reasoning.

    Args:
        max_tokens: maximum length of the turn; None: the answer needs no share.
        max_reasoning_tokens: maximum number of tokens in analysis messages, `wrap_up` included;
            None: no limit.
    """
    if grammar.reasoning == "none":
        return NO_LIMITS
    wrap_up = len(encoding.encode(grammar.wrap_up))
    max_counted = max_length = None
    if max_reasoning_tokens is not None:
        max_counted = max(0, max_reasoning_tokens - wrap_up)
    if max_tokens is not None:
        header = grammar.forced_header + (_ANSWER_HEADER if grammar.calls == "allowed" else "")
        forced = wrap_up + len(encoding.encode_with_special(header))
        begun = len(encoding.encode_with_special("<|channel|>commentary<|message|>")) - 1
        max_length = max(0, max_tokens - answer_share(max_tokens) - forced - begun)
    return ConstraintLimits(max_counted, max_length)


def answer_share(max_tokens: int) -> int:
    """Return the number of tokens of a turn that stay for its answer."""
    if max_tokens < _SHORT_TURN:
        return max_tokens // 2
    return max(MIN_ANSWER_TOKENS, min(max_tokens // 4, MAX_ANSWER_TOKENS))
