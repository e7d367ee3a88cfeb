"""Items as they are stored and shown: complete, each with an id."""

import uuid
from collections.abc import Sequence
from typing import Any

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
    OtherItem,
    ReasoningItem,
    ResponseTextPart,
)
from cluster.state.rows import JsonObject, StoredItem, is_id
from workers.errors import InvalidRequest

_PREFIXES = {
    MessageItem: "msg",
    ReasoningItem: "rs",
    FunctionCallItem: "fc",
    FunctionOutputItem: "fco",
    CustomCallItem: "ctc",
    CustomOutputItem: "ctco",
    CompactionItem: "cmp",
}


def new_id(prefix: str) -> str:
    """Return a new id, which cannot be guessed."""
    return f"{prefix}_{uuid.uuid4().hex}"


def stored_input(given: str | Sequence[Item] | None) -> tuple[StoredItem, ...]:
    """Return the items of a request's input, in the form in which they are stored. References to
    stored items have been replaced before.

    Raises:
        InvalidRequest: an id is no id, or an item is a reference; `param` is its place.
    """
    if isinstance(given, str):
        given = (MessageItem(role="user", content=given),)
    return stored_items(given or (), "input")


def stored_items(items: Sequence[Item], field: str) -> tuple[StoredItem, ...]:
    """Return items in the form in which they are stored; see `stored_input`.

    Args:
        field: name of the list that they came in.
    """
    return tuple(StoredItem(_body(item, f"{field}[{index}]")) for index, item in enumerate(items))


def _body(item: Item, place: str) -> JsonObject:
    if isinstance(item, ItemReference | OtherItem):
        raise InvalidRequest(f"{place} refers to an item; send the item itself here.", place)
    id = item.id if item.id is not None else new_id(_PREFIXES[type(item)])
    if not isinstance(id, str) or not is_id(id):
        raise InvalidRequest(
            f"{place}.id must have 1 to 128 letters, digits, _, -, dots and colons; leave it out for a new "
            f"one.",
            f"{place}.id",
        )
    # With a status, of which an item that is given has none but this.
    return {"id": id, "type": item.type, "status": "completed", **_fields(item)}


def _fields(item: Item) -> dict[str, Any]:
    match item:
        case MessageItem():
            shown: dict[str, Any] = {"role": item.role, "content": _content(item.content, item.role)}
            return shown if item.phase is None else {**shown, "phase": item.phase}
        case ReasoningItem():
            reasoning: dict[str, Any] = {
                "summary": [part.model_dump() for part in item.summary or ()],
                "content": [{"type": "reasoning_text", "text": part.text} for part in item.content or ()],
            }
            sealed = item.encrypted_content
            return reasoning if sealed is None else {**reasoning, "encrypted_content": sealed}
        case FunctionCallItem():
            return {**_call(item), "arguments": item.arguments}
        case CustomCallItem():
            return {**_call(item), "input": item.input}
        case FunctionOutputItem() | CustomOutputItem():
            output = item.output if isinstance(item.output, str) else _content(item.output, "user")
            return {"call_id": item.call_id, "output": output}
        case CompactionItem():
            return {"encrypted_content": item.encrypted_content}
    raise AssertionError(type(item))  # every kind of item is above


def _call(item: FunctionCallItem | CustomCallItem) -> dict[str, Any]:
    fields = {"call_id": item.call_id, "name": item.name}
    return fields if item.namespace is None else {**fields, "namespace": item.namespace}


def _content(content: Content, role: str) -> list[dict[str, Any]]:
    """Return a content as parts, of the type that the role has."""
    if isinstance(content, str):
        return [_text(content, role)]
    return [
        _text(part.text, role)
        if isinstance(part, ResponseTextPart)
        else {"type": "refusal", "refusal": getattr(part, "refusal", "")}
        for part in content
    ]


def _text(text: str, role: str) -> dict[str, Any]:
    if role == "assistant":
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"type": "input_text", "text": text}
