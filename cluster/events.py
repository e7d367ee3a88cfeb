"""The events of a generation, independent of transport: events of its choices' messages, the end of
each choice, and the usage."""

from dataclasses import dataclass
from typing import Literal

from cluster.harmony.message import MessageEvent

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True)
class TokenCandidate:
    """A candidate for a token, as the APIs report it.

    Attributes:
        text: its text; for a special token its name; `bytes:` and hex escapes where the bytes are
            only part of a character.
        token_bytes: empty for a special token.
    """

    token_id: int
    text: str
    token_bytes: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A sampled token with its alternatives.

    Attributes:
        text_offset: characters of the choice's text before this token.
        top: most likely first.
    """

    chosen: TokenCandidate
    text_offset: int
    top: tuple[TokenCandidate, ...] = ()


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """An event of a message of one of the n choices. A completion has no messages: its events are
    pieces of text, each a MessageDelta.

    Attributes:
        event: every MessageStart is followed by its MessageEnd before the choice finishes, unless
            an error ends the generation.
        logprobs: if requested; for chat those of the text's tokens, for completions one per entry
            of `token_ids`.
        token_ids: all tokens since the choice's previous event, including markup.
    """

    choice: int
    event: MessageEvent
    logprobs: tuple[TokenLogprob, ...] = ()
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ChoiceFinish:
    """The terminal event of a choice.

    Attributes:
        stop_reason: the stop string or stop token id that ended it; None if the model ended it.
        logprobs, token_ids: those of the tokens since the choice's previous event, including the
        end token.
    """

    choice: int
    reason: FinishReason
    stop_reason: str | int | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts over all choices; the prompt is counted once. The last event."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int


GenerationEvent = ChoiceDelta | ChoiceFinish | Usage
