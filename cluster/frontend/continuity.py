"""Reasoning for clients that drop it: gpt-oss needs the reasoning that led to a call when it gets
the call's result. It is kept by call id until the turn's final message, and put back where a chat
has the call without any."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace

from cluster.events import ChoiceFinish, GenerationEvent, Usage
from cluster.frontend.fold import call_id, is_call_id
from cluster.generation import ChatRequest, Generation
from cluster.harmony.message import BLANK_LINE, Message, MessageEnd, MessageStart
from cluster.metrics import GatewayMetrics
from cluster.state.continuity import Continuity
from cluster.state.errors import StateFull, StateUnavailable

_PATIENCE_S = 1.0
"""Longest time that an answer waits for the state; without it reasoning is not kept or put back."""


class KeptReasoning:
    """The reasoning that is kept for one gateway's clients.

    Args:
        continuity: where it is kept; None: nowhere.
    """

    def __init__(self, continuity: Continuity | None, metrics: GatewayMetrics) -> None:
        self._continuity = continuity
        self._metrics = metrics

    async def restored(self, request: ChatRequest, owner: str, *, counts: bool = True) -> ChatRequest:
        """Return the request with the reasoning that its client left out.

        Args:
            counts: count what is found and what is not.
        """
        without = _calls_without_reasoning(request.messages)
        if self._continuity is None or not without:
            return request
        ids = [request.messages[index].call_id or "" for index in without]
        try:
            async with asyncio.timeout(_PATIENCE_S):
                found = await self._continuity.get(owner, ids)
        except (StateUnavailable, StateFull, TimeoutError):
            found = {}
        if counts:
            hits = sum(id in found for id in ids)
            self._metrics.restored_reasoning.labels("hit").inc(hits)
            self._metrics.restored_reasoning.labels("miss").inc(len(ids) - hits)
        if not found:
            return request
        return replace(
            request,
            messages=tuple(_with_reasoning(request.messages, without, found)),
            num_bytes=request.num_bytes + sum(map(len, found.values())),
        )

    async def watched(
        self, begin: Callable[[], Awaitable[Generation]], request: ChatRequest, owner: str
    ) -> Generation:
        """Begin a generation of the request. Reasoning of choices that end in a call is kept; if
        every choice ends in a final message, what was kept for the request's calls is dropped."""
        generation = await begin()
        if self._continuity is not None:
            open_ids = [message.call_id for message in _since_final(request.messages) if message.call_id]
            observer = _Observer(self._continuity, owner, generation.id, open_ids, request.sampling.n)
            generation.observer = observer.see
        return generation


def _since_final(messages: Sequence[Message]) -> Sequence[Message]:
    """Return the messages of the tool loop in progress, whose reasoning the model sees again."""
    finals = (index for index, m in enumerate(messages) if m.role == "assistant" and m.channel == "final")
    return messages[max(finals, default=-1) + 1 :]


def _calls_without_reasoning(messages: Sequence[Message]) -> list[int]:
    """Return the indices of the calls that need reasoning and have none in their message. Reasoning
    is kept for this server's own calls alone."""
    indices: list[int] = []
    calls: list[int] = []
    has_reasoning = False
    first = len(messages) - len(_since_final(messages))
    for index in range(first, len(messages) + 1):
        message = messages[index] if index < len(messages) else None
        if message is None or message.role != "assistant":
            indices += [] if has_reasoning else calls
            calls, has_reasoning = [], False
        elif message.kind == "reasoning":
            has_reasoning = True
        elif message.call_id is not None and is_call_id(message.call_id):
            calls.append(index)
    return indices


def _with_reasoning(
    messages: Sequence[Message], without: Sequence[int], found: dict[str, str]
) -> list[Message]:
    """Return the messages with the reasoning of these calls before them, and before the preamble
    that belongs to the call; once where calls that follow each other share it."""
    missing = set(without)
    result: list[Message] = []
    last: str | None = None
    for index, message in enumerate(messages):
        reasoning = found.get(message.call_id or "") if index in missing else None
        if reasoning is not None and reasoning != last:
            place = len(result)
            while place and result[place - 1].role == "assistant" and result[place - 1].kind == "text":
                place -= 1
            result.insert(place, Message("assistant", reasoning, channel="analysis"))
        if message.role != "assistant":
            last = None
        elif reasoning is not None:
            last = reasoning
        result.append(message)
    return result


@dataclass(slots=True)
class _Choice:
    reasoning: list[str] = field(default_factory=list)
    num_calls: int = 0
    in_reasoning: bool = False


class _Observer:
    """The reader of a generation's events that keeps its reasoning.

    Args:
        id: the generation's.
        open_ids: the calls of the tool loop in progress.
        num_choices: number of the generation's choices.
    """

    def __init__(
        self, continuity: Continuity, owner: str, id: str, open_ids: Sequence[str], num_choices: int
    ) -> None:
        self._continuity = continuity
        self._owner = owner
        self._id = id
        self._open_ids = open_ids
        self._choices: dict[int, _Choice] = {}
        self._num_unfinal = num_choices
        self._has_failed = False

    async def see(self, event: GenerationEvent) -> None:
        """Take the next event; at the end of a choice what it gives is stored before the client
        knows of the end."""
        if isinstance(event, Usage):
            return
        choice = self._choices.setdefault(event.choice, _Choice())
        if isinstance(event, ChoiceFinish):
            await self._end(event, choice)
        elif isinstance(event.event, MessageStart):
            kind = event.event.message.kind
            choice.num_calls += kind == "tool_call"
            choice.in_reasoning = kind == "reasoning"
            if choice.in_reasoning:
                choice.reasoning += [BLANK_LINE] if choice.reasoning else []
                choice.reasoning.append(event.event.text)
        elif choice.in_reasoning and not isinstance(event.event, MessageEnd):
            choice.reasoning.append(event.event.text)

    async def _end(self, finish: ChoiceFinish, choice: _Choice) -> None:
        text = "".join(choice.reasoning)
        ids = [call_id(self._id, finish.choice, index) for index in range(choice.num_calls)]
        if ids and text:
            await self._access(lambda: self._continuity.put(self._owner, ids, text))
        elif not ids and finish.reason == "stop":
            self._num_unfinal -= 1
            if not self._num_unfinal and self._open_ids:
                await self._access(lambda: self._continuity.drop(self._owner, self._open_ids))

    async def _access(self, access: Callable[[], Awaitable[None]]) -> None:
        """Change the state, unless it failed before: an answer waits for it once at most."""
        if self._has_failed:
            return
        try:
            async with asyncio.timeout(_PATIENCE_S):
                await access()
        except (StateUnavailable, StateFull, TimeoutError):
            self._has_failed = True
