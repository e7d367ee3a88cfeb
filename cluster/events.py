"""What a generation produces, independent of transport: events of its choices' messages, how each
choice finished, and what was used."""

from dataclasses import dataclass
from typing import Literal

from cluster.harmony.message import MessageEvent

FinishReason = Literal["stop", "length", "tool_calls"]


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
    """What happened to a message of one of the n choices. A completion is no message: of it there
    are only pieces of text, each a MessageDelta.

    Attributes:
        event: every MessageStart is followed by its MessageEnd before the choice finishes, unless
            an error ends the generation.
        logprobs: where asked for; chat: of the text tokens it was made of; completions: one per
            entry of `token_ids`.
        token_ids: all tokens since the choice's previous event, markup included.
    """

    choice: int
    event: MessageEvent
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
