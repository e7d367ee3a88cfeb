"""Renderer of a conversation as the token ids of a harmony prompt.

Equal, token for token, to what openai/harmony's own renderer writes (oss-harmony 0.0.11) with two
rules on top: all developer messages become one, and analysis before the last final answer is left
out. Text of clients and tools is always encoded with special tokens disabled.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import orjson

from cluster.chat_options import ReasoningEffort
from cluster.harmony.encoding import HarmonyEncoding
from cluster.harmony.message import CHANNELS, Message
from cluster.harmony.tools import TextInput, ToolDefinition, typescript_type
from workers.errors import ContextLengthExceeded, InvalidRequest

DEFAULT_MODEL_IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."
DEFAULT_KNOWLEDGE_CUTOFF = "2024-06"
_INSTRUCTIONS = "# Instructions"


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """What the model is told of the form of its final message.

    Attributes:
        schema: a JSON schema.
    """

    name: str
    schema: Mapping[str, object]
    description: str = ""


@dataclass(frozen=True, slots=True)
class Conversation:
    """The contents of a prompt.

    Attributes:
        messages: those with the role `developer` are instructions.
        merges_instructions: they are one message at the beginning, wherever they stand; else those
            that follow other messages stay where they are.
        current_date: `YYYY-MM-DD`, shown to the model; None: no date line. Never read from a clock
            here: a new day changes every prefix.
    """

    messages: tuple[Message, ...]
    tools: tuple[ToolDefinition, ...] = ()
    reasoning_effort: ReasoningEffort = "medium"
    current_date: str | None = None
    knowledge_cutoff: str = DEFAULT_KNOWLEDGE_CUTOFF
    model_identity: str = DEFAULT_MODEL_IDENTITY
    response_format: ResponseFormat | None = None
    merges_instructions: bool = True


def render(
    conversation: Conversation,
    encoding: HarmonyEncoding,
    max_tokens: int | None = None,
    *,
    begins_answer: bool = True,
    continues_last: bool = False,
) -> list[int]:
    """Return the token ids of the prompt, up to and including `<|start|>assistant`, or the message
    that the answer continues.

    Time is linear in the conversation's length, or in `max_tokens` where that is less. A message
    that carries its ids is written with them.

    Args:
        max_tokens: refuse a longer prompt as early as possible: by its characters before anything
            is encoded, or without encoding the rest; None: any length.
        begins_answer: end with `<|start|>assistant`; else with the last message.
        continues_last: the last message, an assistant's with a channel, has no end, and stands in
            place of `<|start|>assistant`.
    Raises:
        ContextLengthExceeded: longer than max_tokens.
        InvalidRequest: no messages. Tools were checked by `cluster.generation.limits`.
    """
    if not conversation.messages:
        raise InvalidRequest("messages must have at least one message.", "messages")
    begun = conversation.messages[-1] if continues_last else None
    ended = conversation.messages[:-1] if continues_last else conversation.messages
    instructions, messages = _split(ended, merges=conversation.merges_instructions)
    developer = _developer_text(conversation, instructions)
    if max_tokens is not None:
        counted = messages if begun is None else [*messages, begun]
        num_chars = len(developer) + sum(len(m.content) + len(m.recipient or "") for m in counted)
        if num_chars > max_tokens * encoding.max_token_bytes:
            raise _too_long(max_tokens)
    writer = _Writer(encoding, max_tokens)
    writer.text("system", _system_text(conversation))
    if developer:
        writer.text("developer", developer)
    for message in messages:
        writer.message(message)
    if begun is not None:
        writer.begin_answer()
        writer.begun(begun)
    elif begins_answer:
        writer.begin_answer()
    return writer.ids


def _split(ended: Sequence[Message], *, merges: bool) -> tuple[list[str], list[Message]]:
    """Return the instructions of the message at the beginning, and the messages after it."""
    instructions: list[str] = []
    messages: list[Message] = []
    for message in history(ended):
        if message.role != "developer":
            messages.append(message)
        elif merges or not messages:
            instructions.append(message.content)
        elif message.content:
            messages.append(replace(message, content=f"{_INSTRUCTIONS}\n\n{message.content}"))
    return instructions, messages


def history(messages: Sequence[Message]) -> Iterator[Message]:
    """Yield the messages of a chat that the model sees again: all except the analysis before the
    last final answer. Later analysis belongs to an unfinished tool loop."""
    last_final = max(
        (index for index, m in enumerate(messages) if m.role == "assistant" and m.channel == "final"),
        default=-1,
    )
    for index, message in enumerate(messages):
        if index > last_final or message.role != "assistant" or message.kind != "reasoning":
            yield message


def _too_long(max_tokens: int) -> ContextLengthExceeded:
    return ContextLengthExceeded(
        f"This model's maximum context length is {max_tokens} tokens. However, your messages resulted in "
        f"more than {max_tokens} tokens. "
        "Please reduce the length of the messages.",
        "messages",
    )


class _Writer:
    """A writer that appends whole messages to one list of ids.

    Attributes:
        ids: the ids written so far.
        assistant: the ids that begin an assistant's message.
    """

    def __init__(self, encoding: HarmonyEncoding, max_tokens: int | None) -> None:
        self.ids: list[int] = []
        self.assistant = (encoding.start, *encoding.encode_literal("assistant"))
        self._encoding = encoding
        self._max_tokens = max_tokens

    def message(self, message: Message) -> None:
        """Append a message of the history, in which every message has an end, and only calls have
        one of their own."""
        if message.token_ids is None:
            self._header(message)
            self._body(message.content)
        else:
            self.ids += message.token_ids if message.end is None else message.token_ids[:-1]
        self.ids.append(self._encoding.call if message.end == "call" else self._encoding.end)
        self._check_length()

    def text(self, role: str, content: str) -> None:
        """Append a message that has only a role and a text."""
        self.ids += (self._encoding.start, *self._encoding.encode_literal(role))
        self._body(content)
        self.ids.append(self._encoding.end)
        self._check_length()

    def begin_answer(self) -> None:
        self.ids += self.assistant
        self._check_length()

    def begun(self, message: Message) -> None:
        """Append an assistant's message after `begin_answer`, without an end."""
        self.ids += (self._encoding.channel, *self._encoding.encode_literal(message.channel or "final"))
        self._body(message.content)
        self._check_length()

    def _header(self, message: Message) -> None:
        encoding, ids = self._encoding, self.ids
        ids.append(encoding.start)
        if message.role == "tool":
            ids += encoding.encode(message.name or "")
        else:
            ids += encoding.encode_literal(message.role)
            ids += encoding.encode(f":{message.name}") if message.name is not None else ()
        recipient = () if message.recipient is None else encoding.encode(f" to={message.recipient}")
        # As oss-harmony: only on commentary the recipient follows the channel.
        if message.channel != "commentary":
            ids += recipient
        if message.channel is not None:
            ids += (encoding.channel, *encoding.encode_literal(message.channel))
        if message.channel == "commentary":
            ids += recipient
        if message.content_type is not None:
            ids += (*encoding.encode_literal(" "), encoding.constrain, *encoding.encode(message.content_type))

    def _body(self, content: str) -> None:
        self.ids.append(self._encoding.message)
        self.ids += self._encoding.encode(content, self._max_tokens)

    def _check_length(self) -> None:
        if self._max_tokens is not None and len(self.ids) > self._max_tokens:
            raise _too_long(self._max_tokens)


def _system_text(conversation: Conversation) -> str:
    identity = [conversation.model_identity, f"Knowledge cutoff: {conversation.knowledge_cutoff}"]
    if conversation.current_date is not None:
        identity.append(f"Current date: {conversation.current_date}")
    channels = f"# Valid channels: {', '.join(CHANNELS)}. Channel must be included for every message."
    if conversation.tools:
        channels += "\nCalls to these tools must go to the commentary channel: 'functions'."
    return "\n\n".join(("\n".join(identity), f"Reasoning: {conversation.reasoning_effort}", channels))


def _developer_text(conversation: Conversation, instructions: Sequence[str]) -> str:
    instructions = [text for text in instructions if text]
    sections = [_INSTRUCTIONS, *instructions] if instructions else []
    if conversation.tools:
        sections += ["# Tools", "\n".join(_namespace_lines(conversation.tools))]
    if (shown := conversation.response_format) is not None:
        lines = [f"// {line}" for line in _lines(shown.description)]
        schema = orjson.dumps(shown.schema).decode()
        sections += ["# Response Formats", f"## {shown.name}", "\n".join((*lines, schema))]
    return "\n\n".join(sections)


def _namespace_lines(tools: Iterable[ToolDefinition]) -> Iterator[str]:
    yield "## functions\n"
    yield "namespace functions {\n"
    for tool in tools:
        for line in _lines(tool.description):
            yield f"// {line}"
        if tool.text is not None:
            yield from _text_input_lines(tool.text)
            arguments = "_: string"
        else:
            arguments = "" if tool.parameters is None else f"_: {typescript_type(tool.parameters)}"
        yield f"type {tool.name} = ({arguments}) => any;\n"
    yield "} // namespace functions"


def _text_input_lines(text: TextInput) -> Iterator[str]:
    """Yield what tells a custom tool from a function, for which harmony has no form of its own."""
    yield "// The body of the call is the input itself, as plain text and not as JSON."
    if text.shown:
        yield "// The input matches this grammar:"
        yield from (f"// {line}" for line in _lines(text.shown))


def _lines(text: str) -> list[str]:
    """Split like Rust's `str::lines`: at \\n and \\r\\n only, with no empty line after the last
    break."""
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return [
        line.removesuffix("\r") if index < len(lines) - 1 or text.endswith("\n") else line
        for index, line in enumerate(lines)
    ]
