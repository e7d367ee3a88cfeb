"""A conversation as the token ids of a harmony prompt.

Equal, token for token, to what openai/harmony's own renderer writes (oss-harmony 0.0.11) with three
rules on top: system and developer messages become one developer message, analysis before the last
final answer is left out, and results of parallel calls stand in the order of the calls. Text of
clients and tools is always encoded with special tokens disabled.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from cluster.harmony.conversation import ChatMessage, Conversation, ToolCall, ToolDefinition
from cluster.harmony.encoding import HarmonyEncoding
from cluster.harmony.tools import typescript_type
from workers.errors import ContextLengthExceeded, InvalidRequest

CHANNELS = ("analysis", "commentary", "final")

# Wider than the rule for declared tools: a name that the model made up comes back in the history
# and must not end the chat.
_CALLED_NAME = re.compile(r"[^\s<>|]{1,128}")
_USER_NAME = re.compile(r"[^\s<|\\/>]{1,64}")


def render(conversation: Conversation, encoding: HarmonyEncoding, max_tokens: int | None = None) -> list[int]:
    """The prompt, up to and including `<|start|>assistant`.

    Time is linear in the conversation's length, or in `max_tokens` where that is less.

    Args:
        max_tokens: refuse a longer prompt as soon as that shows: by its characters before anything
            is encoded, or without encoding the rest; None: any length.
    Raises:
        ContextLengthExceeded: longer than max_tokens.
        InvalidRequest: no messages; a name that cannot be used; a tool result without its call, or
            a second one. `param` names the place as OpenAI's clients spell it, such as
            `messages[3].tool_call_id`. Tools were checked by `cluster.generation.limits`.
    """
    if not conversation.messages:
        raise InvalidRequest("messages must have at least one message.", "messages")
    called = _match_results(conversation.messages)
    last_final = _last_final(conversation.messages)
    developer = _developer_text(conversation)
    if max_tokens is not None:
        _check_size(
            len(developer), conversation, last_final, max_tokens * encoding.max_token_bytes, max_tokens
        )
    writer = _Writer(encoding, max_tokens)
    writer.message("system", _system_text(conversation))
    if developer:
        writer.message("developer", developer)
    for index in _in_call_order(conversation.messages, called):
        message = conversation.messages[index]
        match message.role:
            case "user":
                writer.message("user", message.content, name=_user_name(message, index))
            case "assistant":
                _write_assistant(writer, message, keep_reasoning=index > last_final)
            case "tool":
                writer.tool_result(called[index].name, message.content)
    return writer.finish()


def _check_size(
    num_developer_chars: int, conversation: Conversation, last_final: int, max_chars: int, max_tokens: int
) -> None:
    """Refuse a prompt whose text is too long whatever its tokens are. Counts what is written, and
    only that."""
    num_chars = num_developer_chars
    for index, message in enumerate(conversation.messages):
        if message.role in ("user", "assistant", "tool"):
            num_chars += len(message.content) + sum(
                len(call.name) + len(call.arguments) for call in message.tool_calls
            )
        if message.role == "assistant" and index > last_final:
            num_chars += len(message.reasoning or "")
    if num_chars > max_chars:
        raise _too_long(max_tokens)


def _too_long(max_tokens: int) -> ContextLengthExceeded:
    return ContextLengthExceeded(
        f"This model's maximum context length is {max_tokens} tokens. However, your messages resulted in "
        f"more than {max_tokens} tokens. "
        "Please reduce the length of the messages.",
        "messages",
    )


@dataclass(frozen=True, slots=True)
class _Call:
    """A call of the history; `number` counts all of them."""

    number: int
    name: str


class _Writer:
    """Appends whole messages to the prompt."""

    def __init__(self, encoding: HarmonyEncoding, max_tokens: int | None) -> None:
        self._encoding = encoding
        self._max_tokens = max_tokens
        self._ids: list[int] = []

    def message(self, role: str, content: str, channel: str | None = None, name: str | None = None) -> None:
        self._header(role, channel) if name is None else self._named_header(role, name)
        self._body(content, self._encoding.end)

    def tool_call(self, call: ToolCall) -> None:
        encoding = self._encoding
        self._header("assistant", "commentary")
        self._ids += (
            *encoding.encode(f" to=functions.{call.name}"),
            *encoding.encode_literal(" "),
            encoding.constrain,
        )
        self._ids += encoding.encode_literal("json")
        self._body(call.arguments, encoding.call)

    def tool_result(self, name: str, content: str) -> None:
        encoding = self._encoding
        self._ids += (encoding.start, *encoding.encode(f"functions.{name}"))
        self._ids += (
            encoding.channel,
            *encoding.encode_literal("commentary"),
            *encoding.encode_literal(" to=assistant"),
        )
        self._body(content, encoding.end)

    def finish(self) -> list[int]:
        self._ids += (self._encoding.start, *self._encoding.encode_literal("assistant"))
        self._check_length()
        return self._ids

    def _header(self, role: str, channel: str | None) -> None:
        self._ids += (self._encoding.start, *self._encoding.encode_literal(role))
        if channel is not None:
            self._ids += (self._encoding.channel, *self._encoding.encode_literal(channel))

    def _named_header(self, role: str, name: str) -> None:
        self._ids += (
            self._encoding.start,
            *self._encoding.encode_literal(role),
            *self._encoding.encode(f":{name}"),
        )

    def _body(self, content: str, end: int) -> None:
        self._ids.append(self._encoding.message)
        self._ids += self._encoding.encode(content, self._max_tokens)
        self._ids.append(end)
        self._check_length()

    def _check_length(self) -> None:
        if self._max_tokens is not None and len(self._ids) > self._max_tokens:
            raise _too_long(self._max_tokens)


def _write_assistant(writer: _Writer, message: ChatMessage, keep_reasoning: bool) -> None:
    if message.reasoning and keep_reasoning:
        writer.message("assistant", message.reasoning, channel="analysis")
    if _is_final(message):
        writer.message("assistant", message.content, channel="final")
    elif message.content:
        writer.message("assistant", message.content, channel="commentary")
    for call in message.tool_calls:
        writer.tool_call(call)


def _is_final(message: ChatMessage) -> bool:
    """Whether the message ends a turn: not one that calls tools, and not one that was cut off while
    it reasoned."""
    return (
        message.role == "assistant"
        and not message.tool_calls
        and bool(message.content or not message.reasoning)
    )


def _last_final(messages: tuple[ChatMessage, ...]) -> int:
    """Index of the last final answer, -1 without one. Reasoning up to there is history that the
    model does not see again."""
    return next((index for index in range(len(messages) - 1, -1, -1) if _is_final(messages[index])), -1)


def _user_name(message: ChatMessage, index: int) -> str | None:
    if message.name is None:
        return None
    if not _USER_NAME.fullmatch(message.name):
        raise InvalidRequest(
            f"messages[{index}].name must have 1 to 64 characters, without blanks and without < > | / and "
            f"backslash.",
            f"messages[{index}].name",
        )
    return message.name


def _match_results(messages: tuple[ChatMessage, ...]) -> dict[int, _Call]:
    """The call that each tool message answers, by the message's index.

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
                message.tool_call_id, open_calls, answered, f"messages[{index}].tool_call_id"
            )
    return called


def _check_call(call: ToolCall, open_calls: dict[str, _Call], param: str) -> None:
    if not call.id:
        raise InvalidRequest(f"{param}.id is missing: a result could not name the call.", f"{param}.id")
    if call.id in open_calls:
        raise InvalidRequest(
            f"{param}.id: an earlier call without a result has the same id {call.id!r}.", f"{param}.id"
        )
    if not _CALLED_NAME.fullmatch(call.name):
        param = f"{param}.function.name"
        raise InvalidRequest(
            f"{param} must have 1 to 128 characters, without blanks and without < > and |.", param
        )


def _take_call(call_id: str | None, open_calls: dict[str, _Call], answered: set[str], param: str) -> _Call:
    if not call_id:
        raise InvalidRequest(f"{param} is missing: a tool message names the call that it answers.", param)
    call = open_calls.pop(call_id, None)
    if call is None:
        reason = (
            "this call already has a result"
            if call_id in answered
            else "no earlier assistant message has a call with this id"
        )
        raise InvalidRequest(f"{param} is {call_id!r}, but {reason}.", param)
    answered.add(call_id)
    return call


def _in_call_order(messages: tuple[ChatMessage, ...], called: dict[int, _Call]) -> Iterator[int]:
    """Message indices in the order of rendering: neighbouring tool results in the order of their
    calls.

    Harmony has no call ids, so with two calls of one function the order alone tells the model which
    result is whose.
    """
    for is_result, run in groupby(range(len(messages)), key=lambda index: messages[index].role == "tool"):
        indices = list(run)
        yield from sorted(indices, key=lambda index: called[index].number) if is_result else indices


def _system_text(conversation: Conversation) -> str:
    identity = [conversation.model_identity, f"Knowledge cutoff: {conversation.knowledge_cutoff}"]
    if conversation.current_date is not None:
        identity.append(f"Current date: {conversation.current_date}")
    channels = f"# Valid channels: {', '.join(CHANNELS)}. Channel must be included for every message."
    if conversation.tools:
        channels += "\nCalls to these tools must go to the commentary channel: 'functions'."
    return "\n\n".join(("\n".join(identity), f"Reasoning: {conversation.reasoning_effort}", channels))


def _developer_text(conversation: Conversation) -> str:
    instructions = [
        m.content for m in conversation.messages if m.role in ("system", "developer") and m.content
    ]
    sections = ["# Instructions", *instructions] if instructions else []
    if conversation.tools:
        sections += ["# Tools", "\n".join(_namespace_lines(conversation.tools))]
    return "\n\n".join(sections)


def _namespace_lines(tools: Iterable[ToolDefinition]) -> Iterator[str]:
    yield "## functions\n"
    yield "namespace functions {\n"
    for tool in tools:
        for line in _lines(tool.description):
            yield f"// {line}"
        arguments = "" if tool.parameters is None else f"_: {typescript_type(tool.parameters)}"
        yield f"type {tool.name} = ({arguments}) => any;\n"
    yield "} // namespace functions"


def _lines(text: str) -> list[str]:
    """As Rust's `str::lines`: cut at \\n and \\r\\n only, no empty line after the last break."""
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return [
        line.removesuffix("\r") if index < len(lines) - 1 or text.endswith("\n") else line
        for index, line in enumerate(lines)
    ]
