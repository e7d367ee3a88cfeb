"""The sweep, which deletes what is too old or too much. Of all copies of a gateway one does it."""

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Any

from sqlalchemy import Select, func, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from cluster.state.clock import unix_now
from cluster.state.continuity import Continuity
from cluster.state.conversations import delete_conversations
from cluster.state.database import Database
from cluster.state.errors import StateFull, StateUnavailable
from cluster.state.responses import UNFINISHED, delete_responses
from cluster.state.settings import StateConfig
from cluster.state.tables import conversations, duties, responses

logger = logging.getLogger(__name__)

PERIOD_S = 60.0
"""Seconds between two sweeps."""
_DUTY = "sweep"
_BATCH = 500
"""Number of entries that one transaction deletes, so that others do not wait long."""
_LOW_WATER = 0.95
"""Share of `max_bytes` down to which the oldest entries are deleted."""


class Sweeper:
    """The sweep of one gateway.

    Args:
        now: the time, Unix seconds.
    """

    def __init__(
        self,
        database: Database,
        settings: StateConfig,
        continuity: Continuity,
        now: Callable[[], float] = unix_now,
    ) -> None:
        self._database = database
        self._settings = settings
        self._continuity = continuity
        self._seen = -1
        self._now = now

    async def run(self) -> None:
        """Sweep again and again, until cancelled."""
        while True:
            await asyncio.sleep(PERIOD_S * random.uniform(0.8, 1.2))
            try:
                if await self.take_duty():
                    await self.sweep()
            except (StateUnavailable, StateFull, IntegrityError):
                pass  # logged where it was noticed; or another copy began at the same moment
            except Exception as error:  # the edge of this task; without the text, which may quote data
                logger.error("a sweep of the state failed: %s", type(error).__name__)

    async def take_duty(self) -> bool:
        """Return whether this copy sweeps now: no other one has since this copy asked last."""
        async with self._database.write() as connection:
            count = await connection.scalar(select(duties.c.count).where(duties.c.name == _DUTY))
            if count is None:
                await connection.execute(insert(duties).values(name=_DUTY, count=0))
            seen, self._seen = self._seen, count or 0
            if self._seen != seen:
                return False
            taken = await connection.execute(
                update(duties)
                .where(duties.c.name == _DUTY, duties.c.count == self._seen)
                .values(count=self._seen + 1)
            )
            self._seen += taken.rowcount
            return bool(taken.rowcount)

    async def sweep(self) -> int:
        """Delete what has expired, and the oldest entries beyond the bound; return their number."""
        count = await self._continuity.sweep()
        now = int(self._now())
        while deleted := await self._delete_expired(now):
            count += deleted
        async with self._database.read() as connection:
            size = await stored_bytes(connection)
        if size > self._settings.max_bytes:
            evicted, target = 0, int(self._settings.max_bytes * _LOW_WATER)
            while size > target and (deleted := await self._delete_oldest()):
                evicted += deleted
                async with self._database.read() as connection:
                    size = await stored_bytes(connection)
            count += evicted
            logger.warning(
                "the state is larger than state.max_bytes: its %d oldest responses and conversations were "
                "deleted before their time",
                evicted,
            )
        return count

    async def _delete_expired(self, now: int) -> int:
        async with self._database.write() as connection:
            # A response that another one continues is needed for as long as that one.
            ids = [
                *await connection.scalars(_leaves().where(responses.c.expires_at <= now).limit(_BATCH)),
            ]
            await delete_responses(connection, ids)
            table = conversations
            old = [
                *await connection.scalars(select(table.c.id).where(table.c.expires_at <= now).limit(_BATCH)),
            ]
            await delete_conversations(connection, old)
        return len(ids) + len(old)

    async def _delete_oldest(self) -> int:
        """Delete a batch of the oldest entries of all."""
        batch = _BATCH // 5
        async with self._database.write() as connection:
            table = conversations
            rows = await connection.execute(
                select(table.c.id, table.c.used_at).order_by(table.c.used_at).limit(batch)
            )
            oldest = [(at, id, True) for id, at in rows]
            leaves = _leaves().where(responses.c.status.not_in(UNFINISHED))
            rows = await connection.execute(
                leaves.add_columns(responses.c.created_at).order_by(responses.c.created_at).limit(batch)
            )
            oldest += [(at, id, False) for id, at in rows]
            chosen = sorted(oldest)[:batch]
            await delete_conversations(connection, [id for _, id, is_one in chosen if is_one])
            await delete_responses(connection, [id for _, id, is_one in chosen if not is_one])
        return len(chosen)


async def stored_bytes(connection: AsyncConnection) -> int:
    """Return the size of all responses and conversations."""
    sums = [
        await connection.scalar(select(func.coalesce(func.sum(table.c.num_bytes), 0)))
        for table in (responses, conversations)
    ]
    return sum(int(each or 0) for each in sums)


def _leaves() -> Select[tuple[Any]]:
    """Return the ids of responses that no other one continues."""
    child = responses.alias("child")
    return select(responses.c.id).where(
        ~select(child.c.id).where(child.c.previous_response_id == responses.c.id).exists()
    )
