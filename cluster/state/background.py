"""Responses that go on without a client: their tokens as they come, and which copy of the gateway
makes them.

A copy that makes a response says so again and again, by raising `lease_count`. Another copy that
sees no new number for a while takes the response over, and goes on after the tokens that are
stored. Only turns are counted, so that no clocks need to agree.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import orjson
from sqlalchemy import Row, func, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite

from cluster.state.database import Database
from cluster.state.errors import NotStored
from cluster.state.responses import (
    UNFINISHED,
    ResponseRecord,
    Responses,
    Status,
    StoredResponse,
    insert_response,
)
from cluster.state.rows import JsonObject, StoredItem, row_bytes
from cluster.state.tables import response_items, response_tokens, responses
from workers.request import EngineOutput, TokenLogprobs

MAX_ATTEMPTS = 4
"""Number of copies that may begin a response; the next one reports that it failed, since it may be
what ends them."""
_TURNS_UNTIL_TAKEN = 5
"""Number of looks at an unchanged count after which a response is taken over."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What is stored of a response beyond a number of tokens.

    Attributes:
        outputs: in order; each begins where the one before ends.
        num_attempts: number of times that it was taken over from a copy that had not given it up.
    """

    stored: StoredResponse
    outputs: tuple[EngineOutput, ...]
    num_attempts: int


@dataclass(frozen=True, slots=True)
class Turn:
    """What a copy learns in one turn.

    Attributes:
        lost: responses that are no longer its own to make.
        cancelled: those of its own that a client has cancelled.
        taken: those that it makes from now on, as they are stored, with their tokens.
    """

    lost: frozenset[str]
    cancelled: frozenset[str]
    taken: tuple[Progress, ...]


class Background:
    """The background responses as one copy of the gateway sees them.

    Args:
        holder: name of this copy.
    """

    def __init__(self, database: Database, responses: Responses, holder: str) -> None:
        self._database = database
        self._responses = responses
        self._holder = holder
        # A batch whose commit was not confirmed is written again.
        tokens = (sqlite if database.is_sqlite else postgresql).insert(response_tokens)
        self._insert_tokens = tokens.on_conflict_do_update(
            index_elements=[response_tokens.c.response_id, response_tokens.c.start],
            set_={"batch": tokens.excluded.batch},
        )
        self._seen: dict[str, tuple[int, int]] = {}  # count, and how often it was seen

    async def begin(self, record: ResponseRecord) -> Progress:
        """Store a response that this copy is going to make; return its progress, which is none.

        Raises:
            ItemTooLarge: an item is too large.
        """
        rows = self._responses.rows(record.inputs, is_output=False)
        expires_at = self._responses.expiry(record.created_at)
        async with self._database.write() as connection:
            await insert_response(
                connection, record, rows, "queued", expires_at, lease_holder=self._holder, lease_count=0
            )
        stored = StoredResponse(
            record.id,
            record.owner,
            record.created_at,
            "queued",
            record.request,
            None,
            record.previous_response_id,
            record.conversation_id,
            record.conversation_position,
        )
        return Progress(stored, (), 0)

    async def progress(self, id: str, owner: str, after: int = 0) -> Progress:
        """Return what is stored of a response.

        Args:
            after: number of tokens that are known already; whole batches are left out for it.
        Raises:
            NotStored: there is none.
        """
        async with self._database.read() as connection:
            row = await self._responses.row(connection, id, owner)
            table = response_tokens
            batches = await connection.scalars(
                select(table.c.batch)
                .where(table.c.response_id == id, table.c.start >= after)
                .order_by(table.c.start)
            )
            outputs = tuple(output for batch in batches for output in unpack_outputs(batch))
        return Progress(self._responses.stored(row), outputs, row.num_attempts)

    async def ask_to_cancel(self, id: str, owner: str) -> None:
        """Mark a response so that the copy which makes it ends it."""
        async with self._database.write() as connection:
            await self._responses.row(connection, id, owner)
            await connection.execute(
                update(responses)
                .where(responses.c.id == id, responses.c.status.in_(UNFINISHED))
                .values(cancel_asked=True)
            )

    async def add(self, batches: Mapping[str, tuple[int, Sequence[EngineOutput]]]) -> frozenset[str]:
        """Store tokens of responses of this copy, all in one transaction; return those of the
        responses that are no longer its own, of which nothing is stored.

        Args:
            batches: by id, the number of tokens before, and the outputs.
        """
        async with self._database.write() as connection:
            own = set(
                await connection.scalars(
                    select(responses.c.id)
                    .where(responses.c.id.in_(list(batches)), responses.c.lease_holder == self._holder)
                    .order_by(responses.c.id)
                    .with_for_update()
                )
            )
            rows = [
                {"response_id": id, "start": start, "batch": pack_outputs(outputs)}
                for id, (start, outputs) in batches.items()
                if id in own
            ]
            if rows:
                await connection.execute(self._insert_tokens, rows)
                await connection.execute(
                    update(responses)
                    .where(responses.c.id.in_(own), responses.c.status == "queued")
                    .values(status="in_progress")
                )
        return frozenset(batches) - own

    async def finish(self, id: str, status: Status, body: JsonObject, outputs: Sequence[StoredItem]) -> bool:
        """Store the end of a response; return False if it is no longer this copy's own.

        Raises:
            NotStored: its conversation has been deleted meanwhile.
            InvalidRequest: the conversation has got an item with the id of one of these.
        """
        rows = self._responses.rows(outputs, is_output=True)
        data = orjson.dumps(body)
        table, tokens = responses, response_tokens
        num_token_bytes = (
            select(func.coalesce(func.sum(func.length(tokens.c.batch)), 0))
            .where(tokens.c.response_id == id)
            .scalar_subquery()
        )
        async with self._database.write() as connection:
            found = await connection.execute(
                update(table)
                .where(
                    table.c.id == id,
                    table.c.lease_holder == self._holder,
                    table.c.status.in_(UNFINISHED),
                )
                .values(
                    status=status,
                    body=data,
                    lease_holder=None,
                    num_bytes=table.c.num_bytes + len(data) + sum(map(row_bytes, rows)) + num_token_bytes,
                )
                .returning(table.c.owner, table.c.conversation_id)
            )
            row = found.one_or_none()
            if row is None:
                return False
            if rows:
                await connection.execute(
                    insert(response_items), [{"response_id": id, **each} for each in rows]
                )
            if row.conversation_id is not None and status in ("completed", "incomplete"):
                items = response_items
                all_rows = await connection.execute(
                    select(items.c.id, items.c.body, items.c.tokens)
                    .where(items.c.response_id == id)
                    .order_by(items.c.is_output, items.c.position)
                )
                await self._responses.append_to_conversation(
                    connection, row.conversation_id, row.owner, [each._asdict() for each in all_rows]
                )
        return True

    async def turn(self, own: Sequence[str]) -> Turn:
        """Say that this copy still makes its responses, learn which of them are not to go on, and
        take over those that no copy makes any more. To be called every few seconds."""
        table = responses
        async with self._database.write() as connection:
            await connection.execute(
                update(table)
                .where(table.c.lease_holder == self._holder, table.c.id.in_(own))
                .values(lease_count=table.c.lease_count + 1)
            )
            rows = await connection.execute(
                select(
                    table.c.id,
                    table.c.owner,
                    table.c.lease_holder,
                    table.c.lease_count,
                    table.c.cancel_asked,
                )
                .where(table.c.status.in_(UNFINISHED))
                .order_by(table.c.id)
            )
            held, cancelled, free = set(), set(), []
            seen: dict[str, tuple[int, int]] = {}
            for row in rows:
                if row.lease_holder == self._holder and row.id in own:
                    held.add(row.id)
                    if row.cancel_asked:
                        cancelled.add(row.id)
                    continue
                count, times = self._seen.get(row.id, (-1, 0))
                times = times + 1 if count == row.lease_count else 1
                seen[row.id] = (row.lease_count, times)
                if row.lease_holder is None or times > _TURNS_UNTIL_TAKEN:
                    free.append(row)
            self._seen = seen
        taken = await self._take(free) if free else ()
        return Turn(frozenset(own) - held, frozenset(cancelled), tuple(taken))

    async def _take(self, free: Sequence[Row[Any]]) -> list[Progress]:
        """Take responses over unless another copy has been quicker; return those that are this
        copy's now."""
        table = responses
        taken = []
        # A transaction of its own, in the order of the ids: copies that take each other's responses
        # do not wait for one another in a circle.
        async with self._database.write() as connection:
            for row in free:
                was_held = row.lease_holder is not None
                found = await connection.execute(
                    update(table)
                    .where(
                        table.c.id == row.id,
                        table.c.lease_count == row.lease_count,
                        table.c.status.in_(UNFINISHED),
                    )
                    .values(
                        lease_holder=self._holder,
                        lease_count=row.lease_count + 1,
                        num_attempts=table.c.num_attempts + int(was_held),
                    )
                )
                if found.rowcount:
                    taken.append(row)
        progress = []
        for row in taken:
            try:
                progress.append(await self.progress(row.id, row.owner))
            except NotStored:  # expired, or deleted meanwhile
                continue
        return progress

    async def release(self) -> None:
        """Give up all responses of this copy, so that another one takes them over at once."""
        async with self._database.write() as connection:
            await connection.execute(
                update(responses).where(responses.c.lease_holder == self._holder).values(lease_holder=None)
            )


def pack_outputs(outputs: Sequence[EngineOutput]) -> bytes:
    """Return outputs as bytes."""
    packed: bytes = msgpack.packb(
        [
            (
                output.token_ids,
                [(each.logprob, each.top) for each in output.logprobs],
                output.finish_reason,
                output.stop_token_id,
                output.num_cached_tokens,
            )
            for output in outputs
        ]
    )
    return packed


def unpack_outputs(data: bytes) -> list[EngineOutput]:
    """Return outputs from bytes."""
    return [
        EngineOutput(
            token_ids=tuple(ids),
            logprobs=tuple(
                TokenLogprobs(logprob, tuple((id, value) for id, value in top)) for logprob, top in logprobs
            ),
            finish_reason=reason,
            stop_token_id=stop,
            num_cached_tokens=cached,
        )
        for ids, logprobs, reason, stop, cached in msgpack.unpackb(data)
    ]
