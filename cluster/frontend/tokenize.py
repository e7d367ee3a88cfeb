"""Chats that are only rendered: those of `/tokenize` and `/apply-template`."""

from collections.abc import Sequence

from cluster.frontend import chat, reasoning, schema, structure
from cluster.generation import ChatRequest
from workers.errors import InvalidRequest


def to_tokenize(asked: schema.TokenizeRequest, num_bytes: int) -> str | ChatRequest:
    """Return the text or the chat of a body.

    Raises:
        InvalidRequest: there is none, or both; see `chat_to_render`.
    """
    if asked.prompt is not None and asked.messages is None:
        return asked.prompt
    if asked.messages is None or asked.prompt is not None:
        raise InvalidRequest("prompt or messages must be given, one of them.", "prompt")
    return chat_to_render(asked, asked.messages, num_bytes)


def chat_to_render(
    asked: schema.RenderedChat, messages: Sequence[schema.Message], num_bytes: int
) -> ChatRequest:
    """Return the chat of a body of `num_bytes`, as far as it changes what the model sees.

    Raises:
        InvalidRequest: a field requests something that is not supported, or contradicts another.
    """
    kwargs = asked.chat_template_kwargs or schema.ChatTemplateKwargs()
    tools, _ = chat.tools_and_choice(asked)
    return ChatRequest(
        messages=chat.chat_messages(messages),
        num_bytes=num_bytes,
        tools=tools,
        structure=structure.response_format(asked.response_format),
        reasoning_effort=reasoning.shown_effort(reasoning.chat_effort(asked, kwargs)),
        model_identity=kwargs.model_identity,
        current_date=kwargs.current_date,
        continues_last=chat.continues_last(asked),
    )
