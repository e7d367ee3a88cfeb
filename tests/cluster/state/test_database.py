"""The database as a whole: its schema, copies that start at once, and times when it is down."""

import asyncio
import logging
import sqlite3
import stat
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection

from cluster.state.errors import StateFull, StateUnavailable
from cluster.state.settings import Location, StateConfig, location, network_problem
from cluster.state.state import open_state
from cluster.state.tables import metadata
from tests.cluster.state.conftest import Stores, opened
from tests.support.postgresql import PostgreSQL
from workers.errors import ConfigError


async def test_the_migrations_make_the_tables(stores: Stores) -> None:
    def differences(connection: Connection) -> list[object]:
        return list(compare_metadata(MigrationContext.configure(connection), metadata))

    async with stores.database.read() as connection:
        assert await connection.run_sync(differences) == []


async def test_copies_that_start_at_once_make_one_schema(url: str) -> None:
    copies = await asyncio.gather(*(opened(url) for _ in range(4)))
    for index, copy in enumerate(copies):
        await copy.conversations.create(f"conv_{index}", "", {})
    for index in range(4):
        assert (await copies[0].conversations.get(f"conv_{index}", "")).id == f"conv_{index}"
    for copy in copies:
        await copy.database.close()


async def test_a_newer_schema_is_told_in_one_sentence(url: str) -> None:
    stores = await opened(url)
    async with stores.database.write() as connection:
        await connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    await stores.database.close()
    with pytest.raises(
        ConfigError, match=r"newer version of Cantata \(revision 9999.*upgrade Cantata"
    ) as caught:
        await opened(url)
    assert "\n" not in str(caught.value)


async def test_statements_with_what_users_wrote_are_in_no_error_or_log(
    stores: Stores, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(StateUnavailable) as caught:
        async with stores.database.write() as connection:
            await connection.exec_driver_sql("INSERT INTO missing VALUES ('a secret prompt')")
    assert "secret" not in str(caught.value) + caplog.text
    assert "the state database cannot be used" in caplog.text


@pytest.mark.postgresql
async def test_a_server_that_is_down_is_a_503_until_it_is_back(
    postgres: PostgreSQL, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.state.database._RETRY_S", 0.0)
    await asyncio.to_thread(postgres.empty)
    await asyncio.to_thread(postgres.stop)
    try:
        stores = await opened(postgres.url)  # starts all the same
        with pytest.raises(StateUnavailable):
            await stores.conversations.get("conv_1", "")
        postgres.launch()
        await asyncio.to_thread(postgres.wait)
        await stores.conversations.create("conv_1", "", {})
        await asyncio.to_thread(postgres.stop)
        with pytest.raises(StateUnavailable):
            await stores.conversations.get("conv_1", "")
    finally:
        postgres.launch()
        await asyncio.to_thread(postgres.wait)
    assert (await stores.conversations.get("conv_1", "")).id == "conv_1"
    await stores.database.close()


async def test_a_full_database_is_told(tmp_path: Path) -> None:
    stores = await opened(f"sqlite:///{tmp_path / 'state.sqlite3'}", max_item_bytes=10_000_000)
    async with stores.database.read() as connection:  # of each connection, of which there is one so far
        await connection.exec_driver_sql("PRAGMA max_page_count=60")
    with pytest.raises(StateFull, match="full"):
        await stores.conversations.create("conv_1", "", {"filler": "x" * 1_000_000})
    await stores.conversations.create("conv_2", "", {})
    await stores.database.close()


async def test_a_damaged_file_is_told_and_stateless_work_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "state.sqlite3"
    file.write_bytes(b"this is no database " * 100)
    stores = await opened(f"sqlite:///{file}")
    with pytest.raises(StateUnavailable):
        await stores.conversations.get("conv_1", "")
    await stores.database.close()


def test_the_default_is_a_private_file_in_the_users_data_folder(tmp_path: Path) -> None:
    place = location(
        StateConfig(), several_hosts=False, environment={"XDG_DATA_HOME": str(tmp_path / "data")}
    )
    file = tmp_path / "data/cantata/state.sqlite3"
    assert place == Location(f"sqlite+aiosqlite:///{file}", f"SQLite, {file}", is_default=True)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_a_default_place_that_cannot_be_made_leaves_state_off(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    place = location(
        StateConfig(), several_hosts=False, environment={"XDG_DATA_HOME": str(tmp_path / "file")}
    )
    assert place.url is None
    assert place.sentence.startswith("off: ")
    assert place.sentence.endswith("Not a directory; set state.url")
    with pytest.raises(ConfigError, match=r"^state.url: .* cannot be opened"):
        location(StateConfig(url=f"sqlite:///{tmp_path}/file/state"), several_hosts=False)


@pytest.mark.parametrize(
    ("url", "on"), [(None, False), ("sqlite:///state", False), ("postgresql://a:b@db/c", True)]
)
def test_gateways_on_several_hosts_need_postgresql(url: str | None, on: bool) -> None:
    place = location(StateConfig(url=url), several_hosts=True)
    assert (place.url is not None) is on
    assert place.sentence == (
        "PostgreSQL, db/c"
        if on
        else "off: gateways can run on several hosts, which needs a PostgreSQL database; set state.url to "
        "one (or to off)"
    )


async def test_state_can_be_off() -> None:
    settings = StateConfig.model_validate({"url": False})  # `off` in YAML
    place = location(settings, several_hosts=False)
    assert place.sentence == "off (state.url)"
    assert await open_state(place, settings) is None


MOUNTS = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:40 / /home rw,relatime shared:9 - nfs4 server:/home rw
31 22 0:41 / /mnt/my\\040disk rw - fuse.sshfs me@host: rw
32 30 254:1 / /home/local rw - xfs /dev/vdb rw
"""


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("/home/me/state.sqlite3", "nfs4"),
        ("/mnt/my disk/state.sqlite3", "fuse.sshfs"),
        ("/home/local/state.sqlite3", None),
        ("/var/lib/state.sqlite3", None),
        ("/homes/state.sqlite3", None),
    ],
)
def test_network_file_systems_are_refused(file: str, kind: str | None) -> None:
    problem = network_problem(Path(file), MOUNTS)
    assert problem is None if kind is None else f"network file system ({kind})" in str(problem)


def test_a_password_is_in_no_sentence() -> None:
    settings = StateConfig(url="postgresql://me:hidden@db.example:5432/cantata?ssl=require")
    assert "hidden" not in repr(settings) + location(settings, several_hosts=True).sentence
    with pytest.raises(ValueError, match="it must be off") as caught:
        StateConfig(url="mysql://me:hidden@db/cantata")
    assert "hidden" not in caught.value.errors(include_input=False)[0]["msg"]


@pytest.mark.parametrize("name", ["ssl", "sslmode"])
async def test_tls_is_asked_for_under_either_name(name: str) -> None:
    """A server without TLS: what it reads first is the request for TLS, and its answer is no."""
    asked: asyncio.Queue[bytes] = asyncio.Queue()

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.put_nowait(await reader.readexactly(8))
        writer.write(b"N")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        stores = await opened(f"postgresql://me:pw@127.0.0.1:{port}/cantata?{name}=require")
        with pytest.raises(StateUnavailable):
            await stores.database.check()
        await stores.database.close()
    assert (await asyncio.wait_for(asked.get(), 60)).hex() == "0000000804d2162f"  # SSLRequest


@pytest.mark.parametrize("query", ["no_such_parameter=1", "ssl=maybe"])
async def test_a_wrong_parameter_of_the_url_is_told_at_the_start(query: str) -> None:
    with pytest.raises(ConfigError, match=r"state\.url has a parameter") as caught:
        await opened(f"postgresql://me:hidden@127.0.0.1:1/cantata?{query}")
    assert "hidden" not in str(caught.value)


async def test_write_ahead_logging_is_on(tmp_path: Path) -> None:
    stores = await opened(f"sqlite:///{tmp_path / 'state.sqlite3'}")
    await stores.database.close()
    with sqlite3.connect(tmp_path / "state.sqlite3") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
