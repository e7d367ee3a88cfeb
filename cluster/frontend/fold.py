"""Conversion of events to what clients see: an answer with one field for each kind of content, as
chat, completions and gRPC's Chat show it, whole or in deltas; or a part for each message, as
Responses and Messages do."""

import hashlib
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from cluster.events import ChoiceDelta, ChoiceFinish, FinishReason, TokenLogprob, Usage
from cluster.generation import Generation
from cluster.harmony.message import (
    FUNCTIONS,
    BlankLines,
    End,
    Kind,
    Message,
    MessageEnd,
    MessageEvent,
    MessageStart,
)

Phase = Literal["commentary", "final_answer"]
"""What a text is: a preamble, or the answer."""


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """Text of the analysis channel."""

    text: str


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text for the user: the final channel, a commentary preamble, or a completion."""

    text: str
    phase: Phase = "final_answer"


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of a tool call.

    Attributes:
        call_index: position among the choice's calls, from 0.
        name: given with the first piece of a call only; without the `functions.` namespace.
        arguments: the next piece of the arguments' JSON text, or of a custom tool's input; may be
            empty.
        id: see `call_id`; with the first piece only.
        custom: it is a call of a custom tool.
    """

    call_index: int
    name: str | None = None
    arguments: str = ""
    id: str | None = None
    custom: bool = False


@dataclass(frozen=True, slots=True)
class Finish:
    """The choice is complete; see ChoiceFinish."""

    reason: FinishReason
    stop_reason: str | int | None = None


@dataclass(slots=True)  # not frozen, which would triple the time to make one for each token
class AnswerDelta:
    """The next visible part of one of the n choices.

    Attributes:
        logprobs: see ChoiceDelta.
        token_ids: all tokens since the choice's previous AnswerDelta, including markup.
    """

    choice: int
    delta: ReasoningDelta | TextDelta | ToolCallDelta | Finish
    logprobs: tuple[TokenLogprob, ...]
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PartDone:
    """A part is over.

    Attributes:
        end: the token that closed its message; None: it was cut off.
    """

    end: End | None


@dataclass(slots=True)
class PartDelta:
    """The next visible piece of one of an answer's parts.

    Attributes:
        message: index of the part's harmony message in the turn. Not all messages are visible, so
            numbers may be missing. A Finish has the last one's.
        logprobs, token_ids: as in AnswerDelta.
    """

    message: int
    delta: ReasoningDelta | TextDelta | ToolCallDelta | PartDone | Finish
    logprobs: tuple[TokenLogprob, ...]
    token_ids: tuple[int, ...]


def call_id(generation_id: str, choice: int, call_index: int) -> str:
    """Return the client's handle for a call: the same whenever the call is read again from its
    tokens."""
    digest = hashlib.sha256(f"{generation_id}/{choice}/{call_index}".encode())
    return f"call_{digest.hexdigest()[:24]}"


def is_call_id(id: str) -> bool:
    """Return whether `call_id` may have made an id; others are a client's or another server's."""
    return re.fullmatch(r"call_[0-9a-f]{24}", id) is not None


@dataclass(slots=True)
class _ChoiceState:
    kind: Kind = "text"
    phase: Phase = "final_answer"
    message: int = 0
    is_shown: bool = False
    num_calls: int = 0
    calls_custom_tool: bool = False
    hidden_ids: list[int] = field(default_factory=list)
    content: BlankLines = field(default_factory=BlankLines)
    reasoning: BlankLines = field(default_factory=BlankLines)


class Fold:
    """The converter of one generation's events to deltas. The headers of messages decide where they
    are shown: the recipient, not the channel, makes a message a tool call.

    Args:
        custom_tools: names of the declared custom tools.
        id: the generation's, from which the ids of calls follow.
    """

    def __init__(self, custom_tools: Collection[str] = (), id: str = "") -> None:
        self._custom_tools = custom_tools
        self._id = id
        self._choices: dict[int, _ChoiceState] = {}

    def add(self, event: ChoiceDelta | ChoiceFinish) -> AnswerDelta | None:
        """Return the delta that the event gives in an answer with one field for each kind of
        content, where a blank line stands between two messages; None if it shows nothing."""
        state = self._state(event.choice)
        delta: ReasoningDelta | TextDelta | ToolCallDelta | Finish | None
        if isinstance(event, ChoiceFinish):
            delta = Finish(event.reason, event.stop_reason)
        else:
            delta = self._shown(event.choice, event.event, state, joins=True)
        if delta is None:
            state.hidden_ids += event.token_ids
            return None
        return AnswerDelta(event.choice, delta, event.logprobs, _ids(event, state))

    def add_part(self, event: ChoiceDelta | ChoiceFinish) -> PartDelta | None:
        """Return the delta that the event gives in an answer with a part for each message; None if
        it shows nothing. A part begins with its first delta, also an empty one in the case of a
        call or of the final message, and ends with its PartDone."""
        state = self._state(event.choice)
        delta: ReasoningDelta | TextDelta | ToolCallDelta | PartDone | Finish | None
        if isinstance(event, ChoiceFinish):
            delta = Finish(event.reason, event.stop_reason)
        elif isinstance(event.event, MessageEnd):
            delta = PartDone(event.event.message.end) if state.is_shown else None
        else:
            delta = self._shown(event.choice, event.event, state, joins=False)
            if delta is None and isinstance(event.event, MessageStart) and state.kind == "text":
                delta = TextDelta("") if state.phase == "final_answer" else None
            state.is_shown = state.is_shown or delta is not None
        if delta is None:
            state.hidden_ids += event.token_ids
            return None
        return PartDelta(state.message, delta, event.logprobs, _ids(event, state))

    def _state(self, choice: int) -> _ChoiceState:
        state = self._choices.get(choice)
        if state is None:
            state = self._choices[choice] = _ChoiceState()
        return state

    def _shown(
        self, choice: int, event: MessageEvent, state: _ChoiceState, *, joins: bool
    ) -> ReasoningDelta | TextDelta | ToolCallDelta | None:
        if isinstance(event, MessageEnd):
            return None
        if isinstance(event, MessageStart):
            _begin(state, event.index, event.message)
            if event.message.recipient is not None:
                state.num_calls += 1
                index = state.num_calls - 1
                name = event.message.recipient.removeprefix(FUNCTIONS)
                state.calls_custom_tool = name in self._custom_tools
                id = call_id(self._id, choice, index)
                return ToolCallDelta(index, name, event.text, id, state.calls_custom_tool)
        text = event.text
        match state.kind:
            case "reasoning":
                if joins:
                    text = state.reasoning.before(event) + text
                return ReasoningDelta(text) if text else None
            case "text":
                if joins:
                    text = state.content.before(event) + text
                return TextDelta(text, state.phase) if text else None
            case "tool_call":
                if not text:
                    return None
                return ToolCallDelta(state.num_calls - 1, None, text, custom=state.calls_custom_tool)


def _ids(event: ChoiceDelta | ChoiceFinish, state: _ChoiceState) -> tuple[int, ...]:
    """Return the tokens since the previous delta."""
    if not state.hidden_ids:
        return event.token_ids
    token_ids = (*state.hidden_ids, *event.token_ids)
    state.hidden_ids.clear()
    return token_ids


def _begin(state: _ChoiceState, index: int, message: Message) -> None:
    state.kind = message.kind
    state.phase = "commentary" if message.channel == "commentary" else "final_answer"
    state.message = index
    state.is_shown = False


@dataclass(frozen=True, slots=True)
class AnswerCall:
    """A tool call of an answer; see ToolCallDelta."""

    id: str
    name: str
    arguments: str
    custom: bool = False


@dataclass(frozen=True, slots=True)
class AnswerChoice:
    """One choice of a whole answer.

    Attributes:
        content, reasoning: None where the model wrote none.
        logprobs: those of the content's tokens; in a completion, of all tokens.
        token_ids: all tokens, markup included.
    """

    content: str | None
    reasoning: str | None
    calls: tuple[AnswerCall, ...]
    logprobs: list[TokenLogprob]
    token_ids: list[int]
    finish: Finish


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    choices: tuple[AnswerChoice, ...]
    usage: Usage


async def whole_answer(
    generation: Generation, num_choices: int, custom_tools: Collection[str] = ()
) -> Answer:
    """Return the content of a generation, when it is over."""
    fold = Fold(custom_tools, generation.id)
    builders = [_AnswerBuilder() for _ in range(num_choices)]
    usage: Usage | None = None
    async for event in generation:
        if isinstance(event, Usage):
            usage = event
        elif (delta := fold.add(event)) is not None:
            builders[delta.choice].add(delta)
    assert usage is not None
    return Answer(tuple(builder.choice() for builder in builders), usage)


class _AnswerBuilder:
    """The builder that joins the deltas of one choice when all of them are there."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[tuple[ToolCallDelta, list[str]]] = []
        self._logprobs: list[TokenLogprob] = []
        self._token_ids: list[int] = []
        self._finish = Finish("stop")

    def add(self, answer_delta: AnswerDelta) -> None:
        self._logprobs += answer_delta.logprobs
        self._token_ids += answer_delta.token_ids
        match answer_delta.delta:
            case TextDelta(text):
                self._text.append(text)
            case ReasoningDelta(text):
                self._reasoning.append(text)
            case ToolCallDelta(index, name, arguments) as delta:
                if name is not None:
                    self._calls.append((delta, []))
                self._calls[index][1].append(arguments)
            case Finish() as finish:
                self._finish = finish

    def choice(self) -> AnswerChoice:
        return AnswerChoice(
            _joined(self._text),
            _joined(self._reasoning),
            tuple(
                AnswerCall(first.id or "", first.name or "", "".join(arguments), first.custom)
                for first, arguments in self._calls
            ),
            self._logprobs,
            self._token_ids,
            self._finish,
        )


def _joined(pieces: Collection[str]) -> str | None:
    return "".join(pieces) if pieces else None
