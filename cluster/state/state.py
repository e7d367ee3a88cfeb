"""The state of one gateway: its database and what is kept in it."""

import asyncio
import contextlib
import logging
import uuid
from typing import Protocol

from cluster.state.background import Background
from cluster.state.continuity import Continuity
from cluster.state.conversations import Conversations
from cluster.state.database import Database
from cluster.state.errors import StateFull, StateUnavailable
from cluster.state.responses import Responses
from cluster.state.settings import Location, StateConfig
from cluster.state.sweeper import Sweeper

logger = logging.getLogger(__name__)


class Worker(Protocol):
    """What makes background responses."""

    async def run(self) -> None:
        """Work until cancelled."""

    async def close(self) -> None:
        """Stop the responses that are being made; they can be taken over."""


class State:
    """What a gateway remembers. Belongs to one event loop; `open` makes it, and the owner calls
    `close`.

    Attributes:
        database: for checks whether it answers.
    """

    def __init__(self, database: Database, settings: StateConfig) -> None:
        self.database = database
        self.conversations = Conversations(database, settings)
        self.responses = Responses(database, settings, self.conversations)
        self.continuity = Continuity(database, settings)
        self.background = Background(database, self.responses, uuid.uuid4().hex)
        self._loop = asyncio.get_running_loop()
        self._worker: Worker | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._tasks = [asyncio.create_task(Sweeper(database, settings, self.continuity).run())]

    def employ(self, worker: "Worker") -> None:
        """Have a worker make background responses, from now until `close`. Thread-safe."""

        def begin() -> None:
            self._worker = worker
            self._tasks.append(asyncio.create_task(worker.run()))

        self._loop.call_soon_threadsafe(begin)

    async def stop(self) -> None:
        """Stop the work, and give up the responses that are being made, so that other copies go on
        with them. Called before what makes them is closed, since they would fail then. Harmless
        when called again."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop())
        # Shielded: what waits for it may be cancelled, and is called again.
        await asyncio.shield(self._stopping)

    async def close(self) -> None:
        """Stop the work and close the connections."""
        await self.stop()
        await self.database.close()

    async def _stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._worker is not None:
            await self._worker.close()
            with contextlib.suppress(StateUnavailable, StateFull):
                await self.background.release()


async def open_state(place: Location, settings: StateConfig) -> State | None:
    """Return the state at a place; None: it is off there. A database that is down is only reported.

    Raises:
        ConfigError: the place cannot be used, or holds the state of a newer version.
    """
    logger.info("state: %s", place.sentence)
    if place.url is None:
        return None
    database = Database(place.url, settings.timeout_s)
    try:
        await database.open()
    except BaseException:
        await database.close()
        raise
    return State(database, settings)
