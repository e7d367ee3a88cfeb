"""Databases of both kinds, each empty."""

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cluster.state.continuity import Continuity
from cluster.state.conversations import Conversations
from cluster.state.database import Database
from cluster.state.responses import Responses
from cluster.state.settings import StateConfig, location
from cluster.state.sweeper import Sweeper
from tests.support.postgresql import PostgreSQL, binaries, postgresql


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgreSQL]:
    if binaries() is None:
        pytest.skip("PostgreSQL is not installed")
    with postgresql() as server:
        yield server


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'state.sqlite3'}"
    server: PostgreSQL = request.getfixturevalue("postgres")
    server.empty()
    return server.url


@dataclass
class Clock:
    """A time that a test moves, Unix seconds."""

    now: float = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Stores:
    """What one copy of a gateway has of the state, without its own sweeps."""

    database: Database
    settings: StateConfig
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.conversations = Conversations(self.database, self.settings, self.clock)
        self.responses = Responses(self.database, self.settings, self.conversations, self.clock)
        self.continuity = Continuity(self.database, self.settings, self.clock)
        self.sweeper = Sweeper(self.database, self.settings, self.continuity, self.clock)


async def opened(url: str, **settings: Any) -> Stores:
    """Return the stores at a URL; the caller closes the database."""
    config = StateConfig(url=url, **settings)
    place = location(config, several_hosts=False)
    assert place.url is not None
    database = Database(place.url, config.timeout_s)
    await database.open()
    return Stores(database, config)


@pytest.fixture
async def stores(url: str) -> AsyncIterator[Stores]:
    stores = await opened(url, ttl_days=1, max_item_bytes=4096, continuity_max_bytes=32 * 1024)
    yield stores
    await stores.database.close()
