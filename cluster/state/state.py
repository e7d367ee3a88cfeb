"""The state of one gateway: its database and what is kept in it."""

import asyncio
import contextlib
import logging

from cluster.state.continuity import Continuity
from cluster.state.conversations import Conversations
from cluster.state.database import Database
from cluster.state.responses import Responses
from cluster.state.settings import Location, StateConfig
from cluster.state.sweeper import Sweeper

logger = logging.getLogger(__name__)


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
        sweeper = Sweeper(database, settings, self.continuity)
        self._sweeping = asyncio.create_task(sweeper.run())

    async def close(self) -> None:
        """Stop the work and close the connections."""
        self._sweeping.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._sweeping
        await self.database.close()


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
