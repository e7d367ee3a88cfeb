"""Conversion of the input's items to harmony messages. `events.py` converts the other way."""

from collections.abc import Iterator, Sequence

import orjson

from cluster.frontend.chat_messages import ChatMessage, ToolCall, harmony_messages
from cluster.frontend.errors import BrokenContent
from cluster.frontend.responses.schema_items import (
    CompactionItem,
    Content,
    CustomCallItem,
    CustomOutputItem,
    FunctionCallItem,
    FunctionOutputItem,
    Item,
    ItemReference,
    MessageItem,
    ReasoningItem,
    ResponseTextPart,
)
from cluster.frontend.responses.tools import full_name
from cluster.harmony.message import Message
from cluster.sealing import BrokenSeal, Sealer
from workers.errors import InvalidRequest

REASONING = "reasoning"
COMPACTION = "compaction"


class Seals:
    """What is sealed for one owner.

    Args:
        owner: of the request's API key; what is sealed opens for no other.
    """

    def __init__(self, sealer: Sealer, owner: str) -> None:
        self._sealer = sealer
        self._owner = owner

    def seal(self, text: str, kind: str) -> str:
        """Return `text` sealed; `kind` is REASONING or COMPACTION."""
        return self._sealer.seal(text.encode(), f"{kind} {self._owner}")

    def open(self, sealed: str, kind: str, param: str) -> str:
        """Return what was sealed.

        Raises:
            BrokenContent: it was changed, or sealed elsewhere or for another key.
        """
        try:
            return self._sealer.open(sealed, f"{kind} {self._owner}").decode()
        except BrokenSeal:
            raise BrokenContent(
                f"{param} cannot be opened: it was changed, or comes from another server or API key. Leave "
                f"the item out.",
                param,
            ) from None


def input_messages(
    given: str | Sequence[Item] | None, instructions: str | None, seals: Seals, num_before: int = 0
) -> tuple[Message, ...]:
    """Return the messages that the model sees.

    Args:
        num_before: number of the first items that are stored ones and not of the request.
    Raises:
        InvalidRequest: with `param`.
    """
    messages = [ChatMessage("developer", instructions)] if instructions else []
    if isinstance(given, str):
        messages.append(ChatMessage("user", given))
    else:
        items = given or ()
        for index in range(len(items)):
            own = index - num_before
            place = f"input[{own}]" if own >= 0 else f"stored item {index}"
            messages += _messages(items, index, place, seals)
        if not items:
            raise InvalidRequest("input is missing: send a text, or at least one item.", "input")
    return harmony_messages(messages)


def _messages(items: Sequence[Item], index: int, place: str, seals: Seals) -> Iterator[ChatMessage]:
    item = items[index]
    match item:
        case MessageItem():
            is_preamble = item.role == "assistant" and _is_preamble(items, index, item)
            yield ChatMessage(item.role, text_of(item.content), is_preamble=is_preamble)
        case ReasoningItem():
            if text := _reasoning(item, place, seals):
                yield ChatMessage("assistant", reasoning=text)
        case FunctionCallItem() | CustomCallItem():
            yield ChatMessage("assistant", tool_calls=(_call(item, place),))
        case FunctionOutputItem() | CustomOutputItem():
            text, field = text_of(item.output), f"{place}.call_id"
            yield ChatMessage("tool", text, tool_call_id=item.call_id, call_id_field=field)
        case CompactionItem():
            yield from _compacted(item, place, seals)
        case ItemReference():
            raise InvalidRequest(
                f"{place} refers to a stored item, but this server stores none (state.url); send the item.",
                place,
            )


def text_of(content: Content) -> str:
    """Return the text of a content, refusals included."""
    if isinstance(content, str):
        return content
    return "".join(
        part.text if isinstance(part, ResponseTextPart) else getattr(part, "refusal", "") for part in content
    )


def _is_preamble(items: Sequence[Item], index: int, item: MessageItem) -> bool:
    """Return whether an assistant's message precedes calls: by its phase, else by the items up to
    the next message that is not the assistant's."""
    if item.phase is not None:
        return item.phase == "commentary"
    for later in items[index + 1 :]:
        if isinstance(later, FunctionCallItem | CustomCallItem):
            return True
        if isinstance(later, MessageItem | FunctionOutputItem | CustomOutputItem):
            return False
    return False


def _reasoning(item: ReasoningItem, place: str, seals: Seals) -> str:
    """Return the text of reasoning: its own, else what is sealed, else the summary, which of our
    answers is the reasoning as it was."""
    if text := "".join(part.text for part in item.content or ()):
        return text
    if item.encrypted_content:
        return seals.open(item.encrypted_content, REASONING, f"{place}.encrypted_content")
    return "\n\n".join(part.text for part in item.summary or () if part.text)


def _call(item: FunctionCallItem | CustomCallItem, place: str) -> ToolCall:
    return ToolCall(
        item.call_id,
        full_name(item.namespace, item.name),
        item.arguments if isinstance(item, FunctionCallItem) else item.input,
        custom=isinstance(item, CustomCallItem),
        id_field=f"{place}.call_id",
        name_field=f"{place}.name",
    )


def sealed_summary(summary: str, instructions: Sequence[str], seals: Seals) -> str:
    """Return the content of a compaction item.

    Args:
        instructions: those among the items that it stands for.
    """
    kept = {"summary": summary, "instructions": list(instructions)}
    return seals.seal(orjson.dumps(kept).decode(), COMPACTION)


def _compacted(item: CompactionItem, place: str, seals: Seals) -> Iterator[ChatMessage]:
    kept = orjson.loads(seals.open(item.encrypted_content, COMPACTION, f"{place}.encrypted_content"))
    yield from (ChatMessage("developer", text) for text in kept["instructions"])
    yield ChatMessage("user", f"{SUMMARY_PREFIX}{kept['summary']}")


SUMMARY_PREFIX = "Summary of the earlier conversation, which is no longer shown:\n\n"
