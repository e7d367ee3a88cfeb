"""Conversations: lists of items that responses read and extend."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import orjson
from sqlalchemy import Row, Select, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from cluster.state.clock import unix_now
from cluster.state.database import Database
from cluster.state.errors import NotStored
from cluster.state.rows import (
    ROW_BYTES,
    JsonObject,
    Page,
    PageQuery,
    StoredItem,
    check_id,
    item_row,
    not_stored,
    row_bytes,
    stored_item,
)
from cluster.state.settings import StateConfig
from cluster.state.tables import conversation_items, conversations
from workers.errors import ContextLengthExceeded, InvalidRequest

_KIND = "Conversation"
MAX_HISTORY_BYTES = 64 * 2**20
"""Maximum size of the items that are read at once to continue from them."""
MAX_PAGE_BYTES = 32 * 2**20
"""Maximum size of the items of a page, if they are several."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation.

    Attributes:
        created_at: Unix seconds.
    """

    id: str
    created_at: int
    metadata: dict[str, str]


@dataclass(frozen=True, slots=True)
class StoredTurns:
    """What precedes a response: all items, oldest first.

    Attributes:
        num_bytes: their size, about.
        conversation_position: the conversation's place after these items; None: they are of no
            conversation.
    """

    items: tuple[StoredItem, ...]
    num_bytes: int = 0
    conversation_position: int | None = None


class Conversations:
    """The conversations in the database. Every access takes the owner's own ones alone.

    Args:
        now: the time, Unix seconds.
    """

    def __init__(self, database: Database, settings: StateConfig, now: Callable[[], float] = unix_now):
        self._database = database
        self._settings = settings
        self._now = now

    async def create(
        self, id: str, owner: str, metadata: dict[str, str], items: Sequence[StoredItem] = ()
    ) -> Conversation:
        """Store a new conversation.

        Raises:
            InvalidRequest: two items have one id.
            ItemTooLarge: an item is too large.
        """
        now = int(self._now())
        rows = self._rows(items)
        async with self._database.write() as connection:
            data = orjson.dumps(metadata)
            await connection.execute(
                insert(conversations).values(
                    id=id,
                    owner=owner,
                    created_at=now,
                    used_at=now,
                    expires_at=self._expiry(now),
                    metadata=data,
                    num_bytes=ROW_BYTES + len(data),
                    next_position=0,
                )
            )
            if rows:
                await self.append_rows(connection, id, owner, rows)
        return Conversation(id, now, metadata)

    async def get(self, id: str, owner: str) -> Conversation:
        """Return a conversation.

        Raises:
            NotStored: there is none.
        """
        async with self._database.read() as connection:
            row = await self._row(connection, id, owner)
        return Conversation(row.id, row.created_at, orjson.loads(row.metadata))

    async def update(self, id: str, owner: str, metadata: dict[str, str]) -> Conversation:
        """Replace a conversation's metadata.

        Raises:
            NotStored: there is none.
        """
        data = orjson.dumps(metadata)
        async with self._database.write() as connection:
            row = await self._row(connection, id, owner)
            await connection.execute(
                update(conversations)
                .where(conversations.c.id == id)
                .values(
                    metadata=data,
                    num_bytes=conversations.c.num_bytes + len(data) - len(row.metadata),
                    **self._use(),
                )
            )
        return Conversation(row.id, row.created_at, metadata)

    async def delete(self, id: str, owner: str) -> None:
        """Delete a conversation and its items.

        Raises:
            NotStored: there is none.
        """
        async with self._database.write() as connection:
            await self._row(connection, id, owner)
            await delete_conversations(connection, [id])

    async def add(self, id: str, owner: str, items: Sequence[StoredItem]) -> None:
        """Append items to a conversation.

        Raises:
            NotStored: there is none.
            InvalidRequest: an item's id is there already.
            ItemTooLarge: an item is too large.
        """
        rows = self._rows(items)
        async with self._database.write() as connection:
            await self.append_rows(connection, id, owner, rows)

    async def append_rows(
        self, connection: AsyncConnection, id: str, owner: str, rows: Sequence[JsonObject]
    ) -> None:
        """Append items' rows to a conversation in a transaction of the caller's; see `add`."""
        check_id(id, _KIND)
        table = conversations
        found = await connection.execute(
            update(table)
            .where(table.c.id == id, table.c.owner == owner, table.c.expires_at > int(self._now()))
            .values(
                next_position=table.c.next_position + len(rows),
                num_bytes=table.c.num_bytes + sum(map(row_bytes, rows)),
                **self._use(),
            )
            .returning(table.c.next_position)
        )
        end = found.scalar_one_or_none()
        if end is None:
            raise not_stored(_KIND, id)
        values = [
            {"conversation_id": id, "position": position, **row}
            for position, row in enumerate(rows, end - len(rows))
        ]
        if not values:
            return
        try:
            await connection.execute(insert(conversation_items), values)
        except IntegrityError:
            raise InvalidRequest(
                "Two items of the conversation would have the same id; remove the items that it already has, "
                "or their ids.",
                "items",
            ) from None

    async def item(self, id: str, owner: str, item_id: str) -> StoredItem:
        """Return one item of a conversation.

        Raises:
            NotStored: there is no such item or conversation.
        """
        check_id(item_id, "Item")
        async with self._database.read() as connection:
            await self._row(connection, id, owner)
            row = (await connection.execute(_item(id, item_id))).one_or_none()
        if row is None:
            raise not_stored("Item", item_id)
        return stored_item(row.body, row.tokens)

    async def delete_item(self, id: str, owner: str, item_id: str) -> Conversation:
        """Delete one item of a conversation, which is returned.

        Raises:
            NotStored: there is no such item or conversation.
        """
        check_id(item_id, "Item")
        table = conversation_items
        async with self._database.write() as connection:
            conversation = await self._row(connection, id, owner)
            row = (await connection.execute(_item(id, item_id))).one_or_none()
            if row is None:
                raise not_stored("Item", item_id)
            await connection.execute(
                delete(table).where(table.c.conversation_id == id, table.c.id == item_id)
            )
            await connection.execute(
                update(conversations)
                .where(conversations.c.id == id)
                .values(
                    num_bytes=conversations.c.num_bytes - row_bytes({"body": row.body, "tokens": row.tokens}),
                    **self._use(),
                )
            )
        return Conversation(conversation.id, conversation.created_at, orjson.loads(conversation.metadata))

    async def items(self, id: str, owner: str, query: PageQuery) -> Page:
        """Return a page of a conversation's items.

        Raises:
            NotStored: there is no such conversation.
            InvalidRequest: `after` is no item of it.
        """
        table = conversation_items
        async with self._database.read() as connection:
            await self._row(connection, id, owner)
            rows = select(table.c.body, table.c.tokens).where(table.c.conversation_id == id)
            return await read_page(connection, rows, table.c, query)

    async def history(self, id: str, owner: str, *, before: int | None = None) -> StoredTurns:
        """Return all items of a conversation, oldest first.

        Args:
            before: only those before this place.
        Raises:
            NotStored: there is no such conversation.
            ContextLengthExceeded: they are too large for any context.
        """
        async with self._database.read() as connection:
            return await self.read_history(connection, id, owner, before)

    async def read_history(
        self, connection: AsyncConnection, id: str, owner: str, before: int | None
    ) -> StoredTurns:
        """Return the items of a conversation in a transaction of the caller's; see `history`."""
        row = await self._row(connection, id, owner)
        if row.num_bytes > MAX_HISTORY_BYTES:
            raise ContextLengthExceeded(
                f"The conversation has {row.num_bytes} bytes, more than the {MAX_HISTORY_BYTES} that can be "
                f"continued.",
                "conversation",
            )
        table = conversation_items
        end = row.next_position if before is None else before
        found = await connection.execute(
            select(table.c.body, table.c.tokens)
            .where(table.c.conversation_id == id, table.c.position < end)
            .order_by(table.c.position)
        )
        return StoredTurns(tuple(stored_item(body, tokens) for body, tokens in found), row.num_bytes, end)

    def _rows(self, items: Sequence[StoredItem]) -> list[JsonObject]:
        limit = self._settings.max_item_bytes
        return [item_row(item, limit, f"items[{index}]") for index, item in enumerate(items)]

    async def _row(self, connection: AsyncConnection, id: str, owner: str) -> Row[Any]:
        check_id(id, _KIND)
        table = conversations
        found = await connection.execute(
            select(table).where(
                table.c.id == id, table.c.owner == owner, table.c.expires_at > int(self._now())
            )
        )
        row = found.one_or_none()
        if row is None:
            raise not_stored(_KIND, id)
        return row

    def _expiry(self, now: int) -> int:
        return now + int(self._settings.ttl_days * 86400)

    def _use(self) -> dict[str, int]:
        now = int(self._now())
        return {"used_at": now, "expires_at": self._expiry(now)}


async def read_page(connection: AsyncConnection, rows: Select[Any], columns: Any, query: PageQuery) -> Page:
    """Return a page of rows with an item's body and tokens. It ends before its items have more than
    MAX_PAGE_BYTES, but has one item at least.

    Args:
        columns: of their table, with `id` and `position`.
    Raises:
        InvalidRequest: `after` is none of the items.
    """
    if query.after is not None:
        try:
            check_id(query.after, "Item")
            found = await connection.execute(
                rows.with_only_columns(func.max(columns.position)).where(columns.id == query.after)
            )
            place = found.scalar_one()
        except NotStored:
            place = None
        if place is None:
            raise InvalidRequest(f"after is '{query.after[:100]}', which is no item of this list.", "after")
        rows = rows.where(columns.position < place if query.newest_first else columns.position > place)
    order = columns.position.desc() if query.newest_first else columns.position.asc()
    size = func.length(columns.body) + func.coalesce(func.length(columns.tokens), 0)
    sizes = (  # before the items are read: some of them may be as many bytes as memory has
        await connection.execute(rows.with_only_columns(size).order_by(order).limit(query.limit + 1))
    ).scalars()
    ends = list(accumulate(sizes))
    count = max(1, sum(end <= MAX_PAGE_BYTES for end in ends[: query.limit]))
    found = await connection.execute(rows.order_by(order).limit(count))
    return Page(tuple(stored_item(body, tokens) for body, tokens in found), len(ends) > count)


async def delete_conversations(connection: AsyncConnection, ids: Sequence[str]) -> None:
    """Delete conversations and their items."""
    await connection.execute(delete(conversation_items).where(conversation_items.c.conversation_id.in_(ids)))
    await connection.execute(delete(conversations).where(conversations.c.id.in_(ids)))


def _item(id: str, item_id: str) -> Select[Any]:
    table = conversation_items
    return select(table.c.body, table.c.tokens).where(table.c.conversation_id == id, table.c.id == item_id)
