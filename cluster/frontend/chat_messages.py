"""Conversion of chat APIs' messages, with content, reasoning and calls in one, to harmony messages.
`cluster.frontend.fold` converts the other way.

Results of parallel calls stand in the order of the calls. Errors name places as OpenAI's clients
spell them, such as `messages[3].tool_call_id`.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from cluster.harmony.message import FUNCTIONS, Message
from workers.errors import InvalidRequest

ChatRole = Literal["system", "developer", "user", "assistant", "tool"]

# Wider than the rule for declared tools: a name that the model made up comes back in the history
# and must not end the chat.
CALLED_NAME = r"[^\s<>|]{1,128}"
USER_NAME = r"[^\s<|\\/>]{1,64}"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the assistant made earlier in the chat.

    Attributes:
        id: the client's handle; a tool message names it in `tool_call_id`.
        name: the function's, without the `functions.` namespace.
        arguments: JSON text as the model wrote it, or a custom tool's input; rendered unchanged,
            may be empty.
        custom: it is a call of a custom tool.
        id_field, name_field: the client API's names for them, for errors; None: those of chat.
    """

    id: str
    name: str
    arguments: str
    custom: bool = False
    id_field: str | None = None
    name_field: str | None = None


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of the chat.

    Attributes:
        role: `system` and `developer` mean the same: both become instructions of the harmony
            developer message.
        content: the text; multi-part text content arrives here joined. Text of special tokens in it
            stays text.
        reasoning: assistant only: its reasoning before this message.
        tool_calls: assistant only: the calls it made after `content`.
        tool_call_id: tool only, and required there: id of the call that this answers.
        name: user only: the speaker; ignored on other roles.
        is_preamble: assistant only: the content precedes calls or a final answer, also where this
            message has no calls itself.
        call_id_field: the client API's name for `tool_call_id`, for errors; None: that of chat.
    """

    role: ChatRole
    content: str = ""
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    is_preamble: bool = False
    call_id_field: str | None = None


@dataclass(frozen=True, slots=True)
class _Call:
    """A call of the history; `number` is its index among all of them."""

    number: int
    name: str


def harmony_messages(messages: Sequence[ChatMessage]) -> tuple[Message, ...]:
    """Return the messages that the model sees: an assistant's reasoning, text and calls are one
    each.

    Raises:
        InvalidRequest: a name that cannot be used; a tool result without its call, or a second one.
    """
    called = _match_results(messages)
    return tuple(
        message
        for index in _in_call_order(messages, called)
        for message in _harmony_messages(messages[index], index, called)
    )


def _harmony_messages(message: ChatMessage, index: int, called: dict[int, _Call]) -> Iterator[Message]:
    match message.role:
        case "system" | "developer":
            yield Message("developer", message.content)
        case "user":
            yield Message("user", message.content, name=_user_name(message, index))
        case "tool":
            name = FUNCTIONS + called[index].name
            yield Message("tool", message.content, name=name, recipient="assistant", channel="commentary")
        case "assistant":
            if message.reasoning:
                yield Message("assistant", message.reasoning, channel="analysis")
            # Final is what ends a turn: not the text of a message that calls tools, nor of one that
            # was cut off while it reasoned.
            is_final = not message.tool_calls and not message.is_preamble
            if is_final and (message.content or not message.reasoning):
                yield Message("assistant", message.content, channel="final")
            elif message.content:
                yield Message("assistant", message.content, channel="commentary")
            for call in message.tool_calls:
                yield Message(
                    "assistant",
                    call.arguments,
                    recipient=FUNCTIONS + call.name,
                    channel="commentary",
                    content_type=None if call.custom else "json",
                    end="call",
                    call_id=call.id,
                )


def _user_name(message: ChatMessage, index: int) -> str | None:
    if message.name is None:
        return None
    if not re.fullmatch(USER_NAME, message.name):
        raise InvalidRequest(
            f"messages[{index}].name must have 1 to 64 characters, without blanks and without < > | / and "
            f"backslash.",
            f"messages[{index}].name",
        )
    return message.name


def _match_results(messages: Sequence[ChatMessage]) -> dict[int, _Call]:
    """Return the call that each tool message answers, by the message's index.

    An id may be used again once its call was answered, as clients that count calls per turn do.
    """
    open_calls: dict[str, _Call] = {}
    answered: set[str] = set()
    number = 0
    called: dict[int, _Call] = {}
    for index, message in enumerate(messages):
        if message.tool_calls and message.role != "assistant":
            raise InvalidRequest(
                f"messages[{index}].tool_calls: only an assistant message has calls.",
                f"messages[{index}].tool_calls",
            )
        for position, call in enumerate(message.tool_calls):
            _check_call(call, open_calls, f"messages[{index}].tool_calls[{position}]")
            open_calls[call.id] = _Call(number, call.name)
            number += 1
        if message.role == "tool":
            called[index] = _take_call(
                message.tool_call_id,
                open_calls,
                answered,
                message.call_id_field or f"messages[{index}].tool_call_id",
            )
    return called


def _check_call(call: ToolCall, open_calls: dict[str, _Call], param: str) -> None:
    id_field = call.id_field or f"{param}.id"
    if not call.id:
        raise InvalidRequest(f"{id_field} is missing: a result could not name the call.", id_field)
    if call.id in open_calls:
        raise InvalidRequest(
            f"{id_field}: an earlier call without a result has the same id {call.id!r}.", id_field
        )
    if not re.fullmatch(CALLED_NAME, call.name):
        param = call.name_field or f"{param}.{'custom' if call.custom else 'function'}.name"
        raise InvalidRequest(
            f"{param} must have 1 to 128 characters, without blanks and without < > and |.", param
        )


def _take_call(call_id: str | None, open_calls: dict[str, _Call], answered: set[str], param: str) -> _Call:
    if not call_id:
        raise InvalidRequest(f"{param} is missing: a result names the call that it answers.", param)
    call = open_calls.pop(call_id, None)
    if call is None:
        reason = (
            "this call already has a result"
            if call_id in answered
            else "no earlier message has a call with this id"
        )
        raise InvalidRequest(f"{param} is {call_id!r}, but {reason}.", param)
    answered.add(call_id)
    return call


def _in_call_order(messages: Sequence[ChatMessage], called: dict[int, _Call]) -> Iterator[int]:
    """Return message indices in the order of rendering: neighbouring tool results in the order of
    their calls.

    Harmony has no call ids, so with two calls of one function the order alone tells the model which
    result is whose.
    """
    for is_result, run in groupby(range(len(messages)), key=lambda index: messages[index].role == "tool"):
        indices = list(run)
        yield from sorted(indices, key=lambda index: called[index].number) if is_result else indices
