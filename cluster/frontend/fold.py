"""Conversion of events to an answer with one field for each kind of content, as chat, completions
and gRPC show it, whole or in deltas."""

import uuid
from collections.abc import Collection
from dataclasses import dataclass, field

from cluster.events import ChoiceDelta, ChoiceFinish, FinishReason, TokenLogprob, Usage
from cluster.generation import Generation
from cluster.harmony.message import (
    FUNCTIONS,
    BlankLines,
    Kind,
    MessageEnd,
    MessageEvent,
    MessageStart,
)


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """Text of the analysis channel."""

    text: str


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text for the user: the final channel, a commentary preamble, or a completion."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of a tool call.

    Attributes:
        call_index: position among the choice's calls, from 0.
        name: given with the first piece of a call only; without the `functions.` namespace.
        arguments: the next piece of the arguments' JSON text, or of a custom tool's input; may be
            empty.
        id: drawn for the client; with the first piece only.
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


@dataclass(slots=True)
class _ChoiceState:
    kind: Kind = "text"
    num_calls: int = 0
    calls_custom_tool: bool = False
    hidden_ids: list[int] = field(default_factory=list)
    content: BlankLines = field(default_factory=BlankLines)
    reasoning: BlankLines = field(default_factory=BlankLines)


class Fold:
    """The converter of one generation's events to deltas. The headers of messages decide where they
    are shown: the recipient, not the channel, makes a message a tool call. In one field a blank
    line stands between two messages.

    Args:
        custom_tools: names of the declared custom tools.
    """

    def __init__(self, custom_tools: Collection[str] = ()) -> None:
        self._custom_tools = custom_tools
        self._choices: dict[int, _ChoiceState] = {}

    def add(self, event: ChoiceDelta | ChoiceFinish) -> AnswerDelta | None:
        """Return the delta that the event gives; None if it shows nothing."""
        state = self._choices.get(event.choice)
        if state is None:
            state = self._choices[event.choice] = _ChoiceState()
        delta: ReasoningDelta | TextDelta | ToolCallDelta | Finish | None
        if isinstance(event, ChoiceFinish):
            delta = Finish(event.reason, event.stop_reason)
        else:
            delta = _shown(event.event, state, self._custom_tools)
        token_ids = event.token_ids
        if state.hidden_ids or delta is None:
            state.hidden_ids += token_ids
            if delta is None:
                return None
            token_ids = tuple(state.hidden_ids)
            state.hidden_ids.clear()
        return AnswerDelta(event.choice, delta, event.logprobs, token_ids)


def _shown(
    event: MessageEvent, state: _ChoiceState, custom_tools: Collection[str]
) -> ReasoningDelta | TextDelta | ToolCallDelta | None:
    if isinstance(event, MessageEnd):
        return None
    if isinstance(event, MessageStart):
        state.kind = event.message.kind
        if event.message.recipient is not None:
            state.num_calls += 1
            name = event.message.recipient.removeprefix(FUNCTIONS)
            state.calls_custom_tool = name in custom_tools
            call_id = f"call_{uuid.uuid4().hex[:24]}"
            return ToolCallDelta(state.num_calls - 1, name, event.text, call_id, state.calls_custom_tool)
    match state.kind:
        case "reasoning":
            text = state.reasoning.before(event) + event.text
            return ReasoningDelta(text) if text else None
        case "text":
            text = state.content.before(event) + event.text
            return TextDelta(text) if text else None
        case "tool_call":
            if not event.text:
                return None
            return ToolCallDelta(state.num_calls - 1, None, event.text, custom=state.calls_custom_tool)


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
    fold = Fold(custom_tools)
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
