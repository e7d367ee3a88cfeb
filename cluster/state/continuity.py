"""The reasoning that led to tool calls, for clients that send a call's result without it."""

import contextlib
from collections.abc import Callable, Sequence

from sqlalchemy import Delete, delete, func, insert, select
from sqlalchemy.exc import IntegrityError

from cluster.state.clock import unix_now
from cluster.state.database import Database
from cluster.state.rows import ROW_BYTES, is_id
from cluster.state.settings import StateConfig
from cluster.state.tables import continuity

_MAX_CALLS = 500
"""Maximum number of calls in one access."""
_SWEPT = 10_000
"""Maximum number of entries over the bound that a sweep deletes."""
_MAX_SHARE = 16
"""A single reasoning has at most this part of the space of all."""


class Continuity:
    """Reasoning by owner and call id, bounded in size and time.

    Args:
        now: the time, Unix seconds.
    """

    def __init__(self, database: Database, settings: StateConfig, now: Callable[[], float] = unix_now):
        self._database = database
        self._settings = settings
        self._now = now

    async def put(self, owner: str, call_ids: Sequence[str], reasoning: str) -> None:
        """Keep the reasoning that led to these calls. What is too large, and ids that no answer of
        this server has, are left out."""
        body = reasoning.encode("utf-8", "replace")
        ids = list(dict.fromkeys(id for id in call_ids if is_id(id)))[:_MAX_CALLS]
        if not ids or len(body) > self._settings.continuity_max_bytes // _MAX_SHARE:
            return
        now = self._now()
        rows = [
            {
                "owner": owner,
                "call_id": id,
                "created_at": now,
                "body": body,
                "num_bytes": ROW_BYTES + len(body),
            }
            for id in ids
        ]
        with contextlib.suppress(IntegrityError):  # another copy keeps the same at this moment
            async with self._database.write() as connection:
                await connection.execute(_of(owner, ids))
                await connection.execute(insert(continuity), rows)

    async def get(self, owner: str, call_ids: Sequence[str]) -> dict[str, str]:
        """Return the reasoning that is kept, by call id."""
        ids = [id for id in call_ids if is_id(id)][:_MAX_CALLS]
        if not ids:
            return {}
        table = continuity
        async with self._database.read() as connection:
            rows = await connection.execute(
                select(table.c.call_id, table.c.body).where(
                    table.c.owner == owner,
                    table.c.call_id.in_(ids),
                    table.c.created_at > self._now() - self._settings.continuity_ttl_s,
                )
            )
            return {call_id: body.decode() for call_id, body in rows}

    async def drop(self, owner: str, call_ids: Sequence[str]) -> None:
        """Forget the reasoning of these calls."""
        ids = [id for id in call_ids if is_id(id)][:_MAX_CALLS]
        if ids:
            async with self._database.write() as connection:
                await connection.execute(_of(owner, ids))

    async def sweep(self) -> int:
        """Delete what is too old, and the oldest of what is too much; return the number of
        entries."""
        table = continuity
        async with self._database.write() as connection:
            old = await connection.execute(
                delete(table).where(table.c.created_at <= self._now() - self._settings.continuity_ttl_s)
            )
            total = await connection.scalar(select(func.coalesce(func.sum(table.c.num_bytes), 0)))
            excess = int(total or 0) - self._settings.continuity_max_bytes
            if excess <= 0:
                return int(old.rowcount)
            rows = await connection.execute(
                select(table.c.created_at, table.c.num_bytes).order_by(table.c.created_at).limit(_SWEPT)
            )
            last = 0.0
            for created_at, num_bytes in rows:
                last = created_at
                excess -= num_bytes
                if excess <= 0:
                    break
            much = await connection.execute(delete(table).where(table.c.created_at <= last))
            return int(old.rowcount + much.rowcount)


def _of(owner: str, ids: Sequence[str]) -> Delete:
    return delete(continuity).where(continuity.c.owner == owner, continuity.c.call_id.in_(ids))
