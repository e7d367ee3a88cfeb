"""Chats whose answer continues the last message: what that message may be, and where in the prompt
the answer has begun."""

from collections.abc import Sequence

from cluster.generation.requests import ChatRequest
from cluster.harmony.encoding import HarmonyEncoding
from cluster.harmony.message import Message
from workers.errors import InvalidRequest


def continued_message(request: ChatRequest) -> Message | None:
    """Return the message that the answer continues: reasoning or the final text; None if it begins
    one of its own.

    Raises:
        InvalidRequest: the last message cannot be continued, or may not be.
    """
    if not request.continues_last:
        return None
    name = request.names.continues
    last = request.messages[-1] if request.messages else None
    if last is None or last.role != "assistant" or last.recipient is not None:
        raise InvalidRequest(
            f"{name} needs an assistant message without tool calls as the last of messages.", name
        )
    if request.tool_choice.required and last.kind == "text":
        raise InvalidRequest(
            f"{name}: the answer continues the text of the last message, but {request.tool_choice.param} "
            f"asks for a call instead; leave one of them out.",
            name,
        )
    hides_reasoning = request.max_reasoning_tokens == 0 or (request.skips_reasoning and not request.tools)
    if hides_reasoning and last.kind == "reasoning":
        raise InvalidRequest(
            f"{name} continues reasoning, but the request asks for an answer without it.", name
        )
    cut = request.options.truncation
    if cut is not None and not cut.keeps_end:
        raise InvalidRequest(
            f"{name} needs the end of the prompt, which truncation_side 'right' cuts off.", name
        )
    return last


def begun_at(prompt: Sequence[int], encoding: HarmonyEncoding, name: str) -> int:
    """Return the index in a prompt of the tokens that belong to the answer already, which are those
    after the last `<|start|>assistant`.

    Args:
        name: the field that asks for it, as the client's API names it.
    Raises:
        InvalidRequest: truncation has left less than the begun message.
    """
    for index in range(len(prompt) - 1, -1, -1):
        if prompt[index] == encoding.start:
            return index + 1 + len(encoding.encode_literal("assistant"))
    raise InvalidRequest(f"truncate_prompt_tokens leaves less than the message that {name} continues.", name)
