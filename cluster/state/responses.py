"""Stored responses: their requests, items and results, and the chains that they form."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import orjson
from sqlalchemy import Row, and_, delete, func, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from cluster.state.clock import unix_now
from cluster.state.conversations import MAX_HISTORY_BYTES, Conversations, StoredTurns, read_page
from cluster.state.database import Database
from cluster.state.rows import (
    ROW_BYTES,
    JsonObject,
    Page,
    PageQuery,
    StoredItem,
    check_id,
    is_id,
    item_row,
    not_stored,
    row_bytes,
    stored_item,
)
from cluster.state.settings import StateConfig
from cluster.state.tables import response_items, response_tokens, responses
from workers.errors import ContextLengthExceeded, InvalidRequest

Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
UNFINISHED: tuple[Status, ...] = ("queued", "in_progress")
_KIND = "Response"
_IDS_AT_ONCE = 500
"""Ids in one statement."""


@dataclass(frozen=True, slots=True)
class ResponseRecord:
    """A response that begins.

    Attributes:
        created_at: Unix seconds.
        request: what the answer is a function of, beside its tokens.
        inputs: the items of the request itself, without those that precede it.
        conversation_position: see StoredTurns.
    """

    id: str
    owner: str
    created_at: int
    request: JsonObject
    inputs: tuple[StoredItem, ...]
    previous_response_id: str | None = None
    conversation_id: str | None = None
    conversation_position: int | None = None


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response as it is stored.

    Attributes:
        previous_response_id, conversation_id, conversation_position: see ResponseRecord.
        body: the Response object; None: it is not complete.
        request: see ResponseRecord.
    """

    id: str
    owner: str
    created_at: int
    status: Status
    request: JsonObject
    body: JsonObject | None
    previous_response_id: str | None = None
    conversation_id: str | None = None
    conversation_position: int | None = None


@dataclass(frozen=True, slots=True)
class FoundItems:
    """Items by id.

    Attributes:
        num_bytes: their size, about.
    """

    items: dict[str, StoredItem]
    num_bytes: int = 0


class Responses:
    """The responses in the database. Every access takes the owner's own ones alone.

    Args:
        now: the time, Unix seconds.
    """

    def __init__(
        self,
        database: Database,
        settings: StateConfig,
        conversations: Conversations,
        now: Callable[[], float] = unix_now,
    ) -> None:
        self._database = database
        self._settings = settings
        self._conversations = conversations
        self._now = now

    async def check(self, inputs: Sequence[StoredItem]) -> None:
        """Check, before a response that is to be stored begins, that it can be.

        Raises:
            ItemTooLarge: an item is too large.
            StateUnavailable: the database does not answer.
        """
        self.rows(inputs, is_output=False)
        await self._database.check()

    async def put(
        self, record: ResponseRecord, status: Status, body: JsonObject, outputs: Sequence[StoredItem]
    ) -> None:
        """Store a response that is complete, and append its items to its conversation.

        Raises:
            NotStored: its conversation has been deleted meanwhile.
            InvalidRequest: an item's id is in the conversation already.
            ItemTooLarge: an item is too large.
        """
        rows = self.rows(record.inputs, is_output=False) + self.rows(outputs, is_output=True)
        async with self._database.write() as connection:
            await insert_response(
                connection, record, rows, status, self.expiry(record.created_at), body=orjson.dumps(body)
            )
            await self.append_to_conversation(connection, record.conversation_id, record.owner, rows)

    async def append_to_conversation(
        self, connection: AsyncConnection, id: str | None, owner: str, rows: Sequence[JsonObject]
    ) -> None:
        """Append the rows of a response's items to its conversation, if it is of one."""
        if id is not None:
            items = [{name: row[name] for name in ("id", "body", "tokens")} for row in rows]
            await self._conversations.append_rows(connection, id, owner, items)

    async def get(self, id: str, owner: str) -> StoredResponse:
        """Return a response.

        Raises:
            NotStored: there is none.
        """
        async with self._database.read() as connection:
            return self.stored(await self.row(connection, id, owner))

    async def input_items(self, id: str, owner: str, query: PageQuery) -> Page:
        """Return a page of the items of a response's own request.

        Raises:
            NotStored: there is no such response.
            InvalidRequest: `after` is no item of it.
        """
        table = response_items
        async with self._database.read() as connection:
            await self.row(connection, id, owner)
            rows = select(table.c.body, table.c.tokens).where(
                table.c.response_id == id, table.c.is_output.is_(False)
            )
            return await read_page(connection, rows, table.c, query)

    async def items_by_id(self, owner: str, ids: Sequence[str], max_bytes: int) -> FoundItems:
        """Return the owner's items with these ids, of all responses; the newest where several have
        one id. Those that are not there are left out.

        Raises:
            ContextLengthExceeded: they have more than `max_bytes`.
        """
        table, num_bytes = response_items.c, 0
        size = func.length(table.body) + func.coalesce(func.length(table.tokens), 0) + ROW_BYTES
        found: dict[str, StoredItem] = {}
        async with self._database.read() as connection:
            for some in _batches([id for id in ids if is_id(id)]):
                newest = _newest(owner, some, int(self._now()))
                num_bytes += (
                    await connection.execute(select(func.sum(size)).select_from(response_items).join(*newest))
                ).scalar() or 0
                if num_bytes > max_bytes:
                    raise ContextLengthExceeded(
                        f"The items that the input refers to have {num_bytes} bytes; with what precedes it, "
                        f"{MAX_HISTORY_BYTES} can be continued.",
                        "input",
                    )
                rows = await connection.execute(
                    select(table.id, table.body, table.tokens).select_from(response_items).join(*newest)
                )
                found |= {id: stored_item(body, tokens) for id, body, tokens in rows}
        return FoundItems(found, num_bytes)

    async def inputs(self, id: str, owner: str) -> tuple[StoredItem, ...]:
        """Return all items of a response's own request.

        Raises:
            NotStored: there is no such response.
        """
        table = response_items
        async with self._database.read() as connection:
            await self.row(connection, id, owner)
            rows = await connection.execute(
                select(table.c.body, table.c.tokens)
                .where(table.c.response_id == id, table.c.is_output.is_(False))
                .order_by(table.c.position)
            )
            return tuple(stored_item(body, tokens) for body, tokens in rows)

    async def delete(self, id: str, owner: str) -> None:
        """Delete a response. Those that continue it cannot be continued any more.

        Raises:
            NotStored: there is none.
        """
        async with self._database.write() as connection:
            await self.row(connection, id, owner)
            await delete_responses(connection, [id])

    async def history(self, id: str, owner: str) -> StoredTurns:
        """Return everything that precedes a response which continues this one: the items of this
        response and of all that it continues, oldest first.

        Raises:
            NotStored: it, or one that it continues, is not there.
            InvalidRequest: it is not complete, or the chain has no beginning.
            ContextLengthExceeded: they are too large for any context.
        """
        async with self._database.read() as connection:
            chain = await self._chain(connection, id, owner)
            first = chain[-1]
            before = StoredTurns(())
            if first.conversation_id is not None:
                before = await self._conversations.read_history(
                    connection, first.conversation_id, owner, first.conversation_position
                )
            own = await _items_of(connection, [row.id for row in reversed(chain)])
        num_bytes = before.num_bytes + sum(row.num_bytes for row in chain)
        return StoredTurns(before.items + own, num_bytes)

    async def _chain(self, connection: AsyncConnection, id: str, owner: str) -> list[Row[Any]]:
        """Return the rows of a response and of those that it continues, newest first."""
        newest = await self.row(connection, id, owner)
        if newest.status in UNFINISHED:
            raise InvalidRequest(
                f"Response '{id}' is {newest.status}; wait until it is complete before you continue it.",
                "previous_response_id",
            )
        table = responses
        columns = (
            table.c.id,
            table.c.previous_response_id,
            table.c.conversation_id,
            table.c.conversation_position,
            table.c.num_bytes,
        )
        links = select(*columns).where(table.c.id == id).cte("links", recursive=True)
        # UNION leaves out rows that it has, so that a circle ends.
        links = links.union(
            select(*columns).where(table.c.id == links.c.previous_response_id, table.c.owner == owner)
        )
        rows = {row.id: row for row in await connection.execute(select(links))}
        chain: list[Row[Any]] = []
        next_id: str | None = id
        while next_id is not None:
            row = rows.pop(next_id, None)
            if row is None and any(seen.id == next_id for seen in chain):
                raise InvalidRequest(
                    f"Response '{id}' cannot be continued: its chain of previous responses is a circle.",
                    "previous_response_id",
                )
            if row is None:
                raise not_stored(_KIND, next_id)
            chain.append(row)
            next_id = row.previous_response_id
        num_bytes = sum(row.num_bytes for row in chain)
        if num_bytes > MAX_HISTORY_BYTES:
            raise ContextLengthExceeded(
                f"The responses that this one continues have {num_bytes} bytes, more than the "
                f"{MAX_HISTORY_BYTES} that can be continued.",
                "previous_response_id",
            )
        return chain

    def rows(self, items: Sequence[StoredItem], *, is_output: bool) -> list[JsonObject]:
        """Return the rows of a response's items.

        Raises:
            ItemTooLarge: one is too large.
        """
        limit, kind = self._settings.max_item_bytes, "output" if is_output else "input"
        return [
            {"is_output": is_output, "position": index, **item_row(item, limit, f"{kind}[{index}]")}
            for index, item in enumerate(items)
        ]

    @staticmethod
    def stored(row: Row[Any]) -> StoredResponse:
        """Return the response of a row."""
        body = None if row.body is None else orjson.loads(row.body)
        request = orjson.loads(row.request)
        return StoredResponse(
            row.id,
            row.owner,
            row.created_at,
            row.status,
            request,
            body,
            row.previous_response_id,
            row.conversation_id,
            row.conversation_position,
        )

    async def row(self, connection: AsyncConnection, id: str, owner: str) -> Row[Any]:
        """Return the row of a response in a transaction of the caller's; see `get`."""
        check_id(id, _KIND)
        table = responses
        found = await connection.execute(
            select(table).where(
                table.c.id == id, table.c.owner == owner, table.c.expires_at > int(self._now())
            )
        )
        row = found.one_or_none()
        if row is None:
            raise not_stored(_KIND, id)
        return row

    def expiry(self, created_at: int) -> int:
        """Return when a response that begins at this time expires, in Unix seconds."""
        return created_at + int(self._settings.ttl_days * 86400)


async def insert_response(
    connection: AsyncConnection,
    record: ResponseRecord,
    rows: Sequence[JsonObject],
    status: Status,
    expires_at: int,
    **columns: object,
) -> None:
    """Insert the rows of a response and of its items.

    Args:
        columns: values of further columns of the response.
    """
    request = orjson.dumps(record.request)
    body = columns.get("body")
    num_bytes = ROW_BYTES + len(request) + (len(body) if isinstance(body, bytes) else 0)
    await connection.execute(
        insert(responses).values(
            id=record.id,
            owner=record.owner,
            created_at=record.created_at,
            expires_at=expires_at,
            status=status,
            previous_response_id=record.previous_response_id,
            conversation_id=record.conversation_id,
            conversation_position=record.conversation_position,
            request=request,
            num_bytes=num_bytes + sum(map(row_bytes, rows)),
            num_attempts=0,
            **{"lease_count": 0, "cancel_asked": False} | columns,
        )
    )
    if rows:
        await connection.execute(insert(response_items), [{"response_id": record.id, **row} for row in rows])


async def delete_responses(connection: AsyncConnection, ids: Sequence[str]) -> None:
    """Delete responses with all that belongs to them."""
    for table in (response_items, response_tokens):
        await connection.execute(delete(table).where(table.c.response_id.in_(ids)))
    await connection.execute(delete(responses).where(responses.c.id.in_(ids)))


async def _items_of(connection: AsyncConnection, ids: Sequence[str]) -> tuple[StoredItem, ...]:
    """Return the items of responses, in the order of these."""
    table = response_items
    found: dict[str, list[StoredItem]] = {id: [] for id in ids}
    for some in _batches(ids):
        rows = await connection.execute(
            select(table.c.response_id, table.c.body, table.c.tokens)
            .where(table.c.response_id.in_(some))
            .order_by(table.c.response_id, table.c.is_output, table.c.position)
        )
        for response_id, body, tokens in rows:
            found[response_id].append(stored_item(body, tokens))
    return tuple(item for id in ids for item in found[id])


def _newest(owner: str, ids: Sequence[str], now: int) -> tuple[Any, Any]:
    """Return what the items join with so that of each id the owner's newest one is left."""
    items, table = response_items.c, responses.c
    rank = func.row_number().over(
        partition_by=items.id, order_by=(table.created_at.desc(), items.response_id, items.is_output.desc())
    )
    ranked = (  # without bodies: an id may be in many rows
        select(items.response_id, items.is_output, items.position, rank.label("rank"))
        .join(responses, table.id == items.response_id)
        .where(items.id.in_(ids), table.owner == owner, table.expires_at > now)
        .subquery()
    )
    return ranked, and_(
        ranked.c.rank == 1,
        ranked.c.response_id == items.response_id,
        ranked.c.is_output == items.is_output,
        ranked.c.position == items.position,
    )


def _batches(ids: Sequence[str]) -> list[Sequence[str]]:
    return [ids[start : start + _IDS_AT_ONCE] for start in range(0, len(ids), _IDS_AT_ONCE)]
