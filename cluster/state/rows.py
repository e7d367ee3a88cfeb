"""What rows hold: stored items, their bytes, and ids that can be in a column."""

import re
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from cluster.state.errors import ItemTooLarge, NotStored
from workers.errors import InvalidRequest

_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
ROW_BYTES = 200
"""Size of a row beside its content, about."""
JsonObject = dict[str, Any]


@dataclass(frozen=True, slots=True)
class StoredItem:
    """An item of a response or a conversation.

    Attributes:
        body: as the API shows it, with its id.
        token_ids: the tokens as which the item is in a prompt; None: not known.
    """

    body: JsonObject
    token_ids: tuple[int, ...] | None = None

    @property
    def id(self) -> str:
        """The item's id."""
        return str(self.body["id"])


@dataclass(frozen=True, slots=True)
class Page:
    """A page of a list of items."""

    items: tuple[StoredItem, ...]
    has_more: bool


@dataclass(frozen=True, slots=True)
class PageQuery:
    """The page of a list that is asked for.

    Attributes:
        limit: maximum number of items.
        after: id of the item that precedes the page; None: from the beginning.
        newest_first: order of the list.
    """

    limit: int = 20
    after: str | None = None
    newest_first: bool = True


def is_id(value: str) -> bool:
    """Return whether a text can be the id of an object."""
    return _ID.fullmatch(value) is not None


def item_row(item: StoredItem, max_bytes: int, place: str) -> dict[str, object]:
    """Return an item's columns.

    Args:
        place: the item's place in the request, for the error.
    Raises:
        InvalidRequest: its id cannot be one.
        ItemTooLarge: its JSON is larger than max_bytes.
    """
    if not is_id(item.id):
        raise InvalidRequest(
            f"{place}.id must have 1 to 128 letters, digits, _, -, dots and colons.", f"{place}.id"
        )
    body = orjson.dumps(item.body)
    if len(body) > max_bytes:
        raise ItemTooLarge(
            f"{place} has {len(body)} bytes, more than the {max_bytes} of an item that can be stored "
            f"(state.max_item_bytes); shorten it, or send store: false.",
            place,
        )
    tokens = None if item.token_ids is None else pack_ids(item.token_ids)
    return {"id": item.id, "body": body, "tokens": tokens}


def row_bytes(row: dict[str, object]) -> int:
    """Return the size that counts for a row of an item."""
    return ROW_BYTES + sum(len(value) for value in row.values() if isinstance(value, bytes))


def stored_item(body: bytes, tokens: bytes | None) -> StoredItem:
    """Return the item of a row."""
    return StoredItem(orjson.loads(body), None if tokens is None else unpack_ids(tokens))


def pack_ids(ids: Sequence[int]) -> bytes:
    """Return token ids as little-endian uint32."""
    numbers = array("I", ids)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()


def unpack_ids(data: bytes) -> tuple[int, ...]:
    """Return token ids from little-endian uint32."""
    numbers = array("I", data)
    if sys.byteorder == "big":
        numbers.byteswap()
    return tuple(numbers)


def check_id(value: str, kind: str) -> None:
    """Raise NotStored if no stored object can have this id."""
    if not is_id(value):
        raise not_stored(kind, value)


def not_stored(kind: str, id: str) -> NotStored:
    """Return the error of an id that is not found, in OpenAI's words."""
    return NotStored(f"{kind} with id '{id[:100]}' not found.")
