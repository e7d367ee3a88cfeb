"""The connection to the database: transactions, its schema, and what happens while it is down."""

import asyncio
import contextlib
import errno
import logging
import sqlite3
from collections.abc import AsyncIterator
from typing import Any

from sqlalchemy import Connection, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from cluster.state.errors import StateFull, StateUnavailable
from cluster.state.migrate import SchemaIsNewer, upgrade
from workers.errors import ConfigError

logger = logging.getLogger(__name__)

_POOL_SIZE = 8
"""Maximum number of connections of one gateway. An access takes milliseconds; others wait."""
_RETRY_S = 1.0
"""Seconds between two attempts to prepare a database that was down."""
_WRITES = "cantata_writes"
_PG_FULL = ("53100", "53200", "53000")
"""PostgreSQL's SQLSTATEs of a full disk, or of no memory."""


class Database:
    """The database of one gateway. It may be down at any time: an access then raises
    StateUnavailable, and the next ones try again. Belongs to one event loop; the owner calls
    `close`.

    Args:
        url: SQLAlchemy's URL, with an asynchronous driver.
        timeout_s: seconds for one transaction.
    Raises:
        ConfigError: the URL cannot be used.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        # Its debug messages have statements with their values, which are what users wrote.
        logging.getLogger("aiosqlite").setLevel(logging.WARNING)
        self._timeout_s = timeout_s
        self._engine = _engine(url, timeout_s)
        self.is_sqlite = self._engine.dialect.name == "sqlite"
        self._is_prepared = False
        self._preparing = asyncio.Lock()
        self._failed_at: float | None = None
        self._failure = StateUnavailable("The state database has not answered yet.")
        self._is_reported = False

    async def open(self) -> None:
        """Create or upgrade the schema. A database that is down is only reported: it is prepared
        when it answers.

        Raises:
            ConfigError: its schema is of a newer version.
        """
        try:
            await self._prepare()
        except SchemaIsNewer as error:
            raise ConfigError(str(error)) from None
        except (StateUnavailable, StateFull):
            pass  # logged

    async def close(self) -> None:
        """Close all connections."""
        await self._engine.dispose()

    @contextlib.asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """Give a transaction that only reads.

        Raises:
            StateUnavailable: the database does not answer.
        """
        async with self._transaction(writes=False) as connection:
            yield connection

    @contextlib.asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """Give a transaction that is committed at the end, or undone by an exception.

        Raises:
            StateUnavailable: the database does not answer.
            StateFull: its disk is full.
            IntegrityError: a key exists.
        """
        async with self._transaction(writes=True) as connection:
            yield connection

    async def check(self) -> None:
        """Raise StateUnavailable if the database does not answer now."""
        async with self.read() as connection:
            await connection.exec_driver_sql("SELECT 1")

    @contextlib.asynccontextmanager
    async def _transaction(self, *, writes: bool) -> AsyncIterator[AsyncConnection]:
        if not self._is_prepared:
            await self._prepare_again()
        async with self._translated(), asyncio.timeout(self._timeout_s), self._connection() as connection:
            # An option is set before the transaction begins, which is what reads it.
            await connection.execution_options(**{_WRITES: writes})
            async with connection.begin():
                yield connection
        self._note_success()

    async def _prepare_again(self) -> None:
        loop = asyncio.get_running_loop()
        async with self._preparing:
            if self._is_prepared:
                return
            if self._failed_at is not None and loop.time() - self._failed_at < _RETRY_S:
                raise self._failure
            try:
                await self._prepare()
            except SchemaIsNewer as error:
                self._failed_at = loop.time()
                self._failure = self._down(str(error))
                raise self._failure from None
            except (StateUnavailable, StateFull) as error:
                self._failed_at = loop.time()
                self._failure = StateUnavailable(error.message)
                raise

    async def _prepare(self) -> None:
        async with self._translated(), asyncio.timeout(self._timeout_s), self._connection() as connection:
            await connection.execution_options(**{_WRITES: True})
            async with connection.begin():
                await connection.run_sync(upgrade)
        self._is_prepared = True
        self._note_success()

    @contextlib.asynccontextmanager
    async def _translated(self) -> AsyncIterator[None]:
        try:
            yield
        except IntegrityError:
            raise
        except TimeoutError:
            raise self._down(f"it has not answered within {self._timeout_s:g} s") from None
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise _full() from None
            raise self._down(error.strerror or type(error).__name__) from None
        except DBAPIError as error:
            if _is_full(error):
                logger.error("the disk of the state database is full")
                raise _full() from None
            raise self._down(_reason(error)) from None
        except SQLAlchemyError as error:
            raise self._down(type(error).__name__) from None

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[AsyncConnection]:
        async with contextlib.AsyncExitStack() as stack:
            try:
                connection = await stack.enter_async_context(self._engine.connect())
            except (TypeError, ValueError):  # of the driver, which gets the URL's parameters as arguments
                raise ConfigError(
                    "state.url has a parameter that the database's driver does not take"
                ) from None
            yield connection

    def _down(self, reason: str) -> StateUnavailable:
        """Return the error for clients; log the reason, which holds no values of a statement, once
        until the database answers again."""
        if not self._is_reported:
            self._is_reported = True
            logger.error("the state database cannot be used (requests that need it get 503): %s", reason)
        return StateUnavailable(
            "The server's state database does not answer; retry later, or send the request without state "
            "(store: false, no previous_response_id, no conversation)."
        )

    def _note_success(self) -> None:
        if self._is_reported:
            self._is_reported = False
            logger.info("the state database answers again")


def _full() -> StateFull:
    return StateFull("The disk of the server's state database is full; retry later, or send store: false.")


def _reason(error: DBAPIError) -> str:
    """Return what failed, without values, which PostgreSQL's own texts may quote."""
    if isinstance(error.orig, sqlite3.Error):
        return str(error.orig)
    state = getattr(error.orig, "sqlstate", None)
    return type(error.orig).__name__ + (f", SQLSTATE {state}" if state else "")


def _is_full(error: DBAPIError) -> bool:
    state = getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None)
    # SQLite's driver has no codes for this in its exceptions, only SQLite's own words.
    return state in _PG_FULL or "disk is full" in str(error.orig)


def _engine(url: str, timeout_s: float) -> AsyncEngine:
    # hide_parameters: statements' values are what users wrote, and exceptions may be logged.
    options: dict[str, Any] = {"hide_parameters": True, "pool_size": _POOL_SIZE, "max_overflow": 0}
    options["pool_timeout"] = timeout_s
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() == "sqlite":
            engine = create_async_engine(parsed, connect_args={"timeout": timeout_s}, **options)
            event.listen(engine.sync_engine, "connect", _set_up_sqlite)
            event.listen(engine.sync_engine, "begin", _begin_sqlite)
            return engine
        connect_args = {"timeout": timeout_s, "server_settings": {"application_name": "cantata"}}
        if (mode := parsed.query.get("sslmode")) is not None:  # libpq's name; the driver's is ssl
            parsed = parsed.difference_update_query(["sslmode"]).update_query_dict({"ssl": mode})
        return create_async_engine(parsed, pool_pre_ping=True, connect_args=connect_args, **options)
    except (ArgumentError, ValueError, TypeError):
        raise ConfigError("state.url is not a URL of a database that can be used") from None


def _set_up_sqlite(connection: Any, record: object) -> None:
    connection.isolation_level = None  # the driver begins no transactions by itself
    cursor = connection.cursor()
    with contextlib.suppress(sqlite3.OperationalError):  # another copy does it at this moment
        cursor.execute("PRAGMA journal_mode=WAL")  # stays set in the file
    # NORMAL: with WAL a power cut may lose the last transactions, not the file.
    for statement in ("synchronous=NORMAL", "temp_store=MEMORY", "journal_size_limit=67108864"):
        cursor.execute(f"PRAGMA {statement}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that reads first and then writes fails at once if another one has written
    # meanwhile; one that begins as a writer waits for it.
    writes = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
