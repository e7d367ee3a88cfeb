"""A PostgreSQL server of the tests' own: in a temporary folder, on a Unix socket alone, run by an
unprivileged user, as the server demands."""

import asyncio
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import asyncpg

from tests.support.waiting import until

_USER = "postgres"
_OPTIONS = (
    "listen_addresses=",
    "fsync=off",
    "full_page_writes=off",
    "shared_buffers=16MB",
    "max_connections=60",
)


def binaries() -> Path | None:
    """Return the folder of the newest installed server's programs; None if there is none."""
    folders = [Path(found).parent for found in [shutil.which("initdb")] if found]
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: path.parent.name.zfill(4))
    return next((path for path in reversed(folders) if (path / "initdb").exists()), None)


class PostgreSQL:
    """A server.

    Attributes:
        url: as a setting has it.
    """

    def __init__(self, folder: Path, programs: Path) -> None:
        self._folder = folder
        self._programs = programs
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"postgresql://{_USER}@/postgres?host={folder}"

    def start(self) -> None:
        """Start the server and wait until it answers."""
        self.launch()
        self.wait()

    def launch(self) -> None:
        """Start the server; it ends with the calling thread."""
        options = [
            word
            for option in (*_OPTIONS, f"unix_socket_directories={self._folder}")
            for word in ("-c", option)
        ]
        command = [self._programs / "postgres", "-D", self._folder / "data", *options]
        self._process = subprocess.Popen(
            [*_as_user(), *map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def wait(self) -> None:
        """Wait until the server answers."""
        until(self._answers, timeout_s=60)

    def stop(self) -> None:
        """End the server at once, as a crash does."""
        if self._process is not None:
            self._process.send_signal(3)  # SIGQUIT: an immediate shutdown
            self._process.wait(30)
            self._process = None

    def empty(self) -> None:
        """Remove all tables."""
        self.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")

    def execute(self, statement: str) -> None:
        """Run a statement."""

        async def run() -> None:
            connection = await asyncpg.connect(host=str(self._folder), user=_USER, database="postgres")
            await connection.execute(statement)
            await connection.close()

        asyncio.run(run())

    def _answers(self) -> bool:
        try:
            self.execute("SELECT 1")
        except (OSError, asyncpg.PostgresError):
            return False
        return True


@contextmanager
def postgresql() -> Iterator[PostgreSQL]:
    """Run a server; the caller has checked that its programs are installed."""
    programs = binaries()
    assert programs is not None
    with tempfile.TemporaryDirectory(prefix="cantata-pg-") as name:
        folder = Path(name)
        if os.geteuid() == 0:
            shutil.chown(folder, _USER)
        subprocess.run(
            [
                *_as_user(),
                programs / "initdb",
                "-D",
                folder / "data",
                "-U",
                _USER,
                "-A",
                "trust",
                "-N",
                "-E",
                "UTF8",
            ],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=folder,
        )
        server = PostgreSQL(folder, programs)
        try:
            server.start()
            yield server
        finally:
            server.stop()


def _as_user() -> list[str]:
    """Return the beginning of a command that is to run as an unprivileged user, and to end with
    the thread that starts it."""
    setpriv = ["setpriv", "--pdeathsig", "KILL"]
    return [*setpriv, "--reuid", _USER, "--regid", _USER, "--clear-groups"] if os.geteuid() == 0 else setpriv
