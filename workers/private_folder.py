"""Folders for Unix sockets that only this user can reach: under $XDG_RUNTIME_DIR, else in the
folder for temporary files.

A folder is locked (flock) while the process that created it lives. A killed process cannot remove
its folder; the next process that creates one finds it unlocked, and removes it.
"""

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path

from workers.errors import ConfigError

LONGEST_SOCKET_PATH = 107
"""Maximum length of a Unix socket's path in bytes, by the kernel's sockaddr_un."""
_LONGEST_FOLDER = 85
"""Maximum length of a folder's path in bytes; the name of a socket follows it."""
_MAX_TRIES = 20
"""Maximum attempts to create a folder: another process may remove it before it is locked."""


class PrivateFolder:
    """A new folder of this process (mode 0700).

    Attributes:
        path: its path.
    Raises:
        ConfigError: no folder can be created.
    """

    def __init__(self) -> None:
        root = _root()
        if root is not None:
            _remove_abandoned(root)
        prefix = "" if root else "cantata-"
        for _ in range(_MAX_TRIES):
            try:
                self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=root))
            except OSError as error:
                raise ConfigError(
                    f"no folder for sockets can be made in {root or tempfile.gettempdir()}: {error.strerror}"
                ) from error
            self._lock = _lock(self.path)
            if self._lock >= 0:
                return
        raise ConfigError(f"no folder for sockets can be kept in {root}: another process keeps removing it")

    def close(self) -> None:
        """Remove the folder and its contents. Idempotent."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def _root() -> Path | None:
    """Return the folder of all of this user's folders; None if there is no private one with a short
    path."""
    name = f"cantata-{os.geteuid()}"
    places = [os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp"]
    for root in (Path(place) / name for place in places if place):
        with contextlib.suppress(OSError):
            root.mkdir(mode=0o700, exist_ok=True)
            found = root.lstat()
            # Another user may have created it first, or a link to it.
            private = (
                stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077
            )
            if private and len(os.fsencode(root)) <= _LONGEST_FOLDER - 10:
                return root
    return None


def _lock(folder: Path) -> int:
    """Return a descriptor that holds the folder's lock; -1 if another process removes it."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return -1
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return -1
    except OSError:  # A file system without locks: nothing is removed from it either.
        return lock
    if not folder.exists():
        os.close(lock)
        return -1
    return lock


def _remove_abandoned(root: Path) -> None:
    for folder in root.iterdir():
        with contextlib.suppress(OSError):  # it has an owner, or another process is removing it
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(lock)
