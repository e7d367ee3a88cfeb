"""What a generation produces, independent of transport. The harmony parser makes deltas,
`cluster.generation` the rest."""

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """Text of the analysis channel."""

    text: str


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text for the user: the final channel, or a commentary preamble."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of a tool call.

    Attributes:
        call_index: position among the turn's calls, from 0.
        name: with the first piece of a call only; without the `functions.` namespace.
        arguments: the next piece of the arguments' JSON text; may be empty.
        id: set by the generation service with the first piece.
    """

    call_index: int
    name: str | None = None
    arguments: str = ""
    id: str | None = None


Delta = ReasoningDelta | TextDelta | ToolCallDelta


@dataclass(frozen=True, slots=True)
class TokenCandidate:
    """A token that could have been chosen, as the APIs report it.

    Attributes:
        text: of a special token its name; `bytes:` and their hex escapes where the bytes are only a
            part of a character.
        token_bytes: empty for a special token.
    """

    token_id: int
    text: str
    token_bytes: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A chosen token with its alternatives.

    Attributes:
        text_offset: characters of the choice's text before this token.
        top: most likely first.
    """

    chosen: TokenCandidate
    text_offset: int
    top: tuple[TokenCandidate, ...] = ()


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """A delta of one of the n choices.

    Attributes:
        logprobs: where asked for; chat: of the text tokens it was made of; completions: one per
            entry of `token_ids`.
        token_ids: all tokens since the choice's previous event, markup included.
    """

    choice: int
    delta: Delta
    logprobs: tuple[TokenLogprob, ...] = ()
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ChoiceFinish:
    """The terminal event of a choice.

    Attributes:
        stop_reason: the stop string or stop token id that ended it; None for the model's own end.
        logprobs, token_ids: of the tokens since the choice's previous event, the end token
            included.
    """

    choice: int
    reason: FinishReason
    stop_reason: str | int | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts over all choices; the prompt is counted once. Comes last."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int


GenerationEvent = ChoiceDelta | ChoiceFinish | Usage
