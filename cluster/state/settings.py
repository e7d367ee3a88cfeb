"""The settings of a gateway's state, and where they put it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from cluster.setting_values import off
from workers.errors import ConfigError

_SCHEMES = {
    "sqlite": "sqlite+aiosqlite",
    "sqlite+aiosqlite": "sqlite+aiosqlite",
    "postgres": "postgresql+asyncpg",
    "postgresql": "postgresql+asyncpg",
    "postgresql+asyncpg": "postgresql+asyncpg",
}
"""SQLAlchemy's name of the driver by the scheme of a URL."""
_DEFAULT_FILE = "state.sqlite3"


def _check_url(value: str | None) -> str | None:
    """Return a URL of a database; raise ValueError, without the URL, which may hold a password."""
    if value is None or value == "off":
        return value
    scheme, separator, rest = value.partition("://")
    if not separator or scheme not in _SCHEMES or not rest.strip("/"):
        raise ValueError(
            "it must be off, sqlite:///FILE (four slashes for an absolute path) or "
            "postgresql://USER:PASSWORD@HOST/DATABASE"
        )
    return value


class StateConfig(BaseModel):
    """Settings of the state: where it is kept, for how long, and its limits.

    Attributes:
        url: the database: `sqlite:///FILE`, `postgresql://…`, or `off`; None: an SQLite file in
            the user's data folder.
        ttl_days: days for which a response, and a conversation since its last use, is kept.
        max_bytes: size of everything that is stored; beyond it the oldest entries are deleted.
        max_item_bytes: maximum size of one item as JSON.
        timeout_s: seconds for one access to the database; then the request gets 503.
        continuity_ttl_s: seconds for which reasoning is kept for clients that drop it.
        continuity_max_bytes: size of all reasoning that is kept for them; beyond it the oldest is
            deleted.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: Annotated[str | None, BeforeValidator(off), AfterValidator(_check_url)] = Field(
        default=None, repr=False
    )
    ttl_days: float = Field(default=30.0, gt=0, allow_inf_nan=False)
    max_bytes: int = Field(default=10 * 2**30, ge=1)
    max_item_bytes: int = Field(default=10_000_000, ge=1)
    timeout_s: float = Field(default=10.0, gt=0, allow_inf_nan=False)
    continuity_ttl_s: float = Field(default=3600.0, gt=0, allow_inf_nan=False)
    continuity_max_bytes: int = Field(default=256 * 2**20, ge=1)


@dataclass(frozen=True, slots=True)
class Location:
    """Where the state is.

    Attributes:
        url: SQLAlchemy's URL of the database, with its password; None: state is off.
        sentence: the place, or why there is none, for the user; without a password.
        is_default: it was not chosen by a setting.
    """

    url: str | None
    sentence: str
    is_default: bool = False

    @property
    def file(self) -> Path | None:
        """The file of an SQLite database; None for another."""
        if self.url is None or not self.url.startswith("sqlite"):
            return None
        return Path(self.url.partition("://")[2].partition("?")[0][1:])


def location(
    settings: StateConfig, *, several_hosts: bool, environment: Mapping[str, str] | None = None
) -> Location:
    """Return where the state is; make the folder and the file of an SQLite database, for this user
    alone. A default place that cannot be made leaves state off.

    Args:
        several_hosts: gateways can run on several hosts, which one SQLite file cannot serve.
        environment: for the user's data folder; None: this process's.
    Raises:
        ConfigError: the file that was chosen cannot be made, or is on a network file system.
    """
    place = _place(settings, several_hosts, os.environ if environment is None else environment)
    if place.file is None:
        return place
    problem = _file_problem(place.file)
    if problem is None:
        return place
    if place.is_default:
        return Location(None, f"off: {problem}; set state.url")
    raise ConfigError(f"state.url: {problem}")


def _place(settings: StateConfig, several_hosts: bool, environment: Mapping[str, str]) -> Location:
    if settings.url == "off":
        return Location(None, "off (state.url)")
    scheme, _, rest = (settings.url or "sqlite://").partition("://")
    driver = _SCHEMES[scheme]
    if driver.startswith("postgresql"):
        place = rest.rpartition("@")[2].partition("?")[0]
        return Location(f"{driver}://{rest}", f"PostgreSQL, {place}")
    if several_hosts:
        return Location(
            None,
            "off: gateways can run on several hosts, which needs a PostgreSQL database; set state.url to "
            "one (or to off)",
        )
    if settings.url is not None:
        return Location(f"{driver}://{rest}", f"SQLite, {rest.partition('?')[0][1:]}")
    file = _data_folder(environment) / _DEFAULT_FILE
    return Location(f"{driver}:///{file}", f"SQLite, {file}", is_default=True)


def _data_folder(environment: Mapping[str, str]) -> Path:
    """Return the folder for this user's data, as the XDG base directory specification has it."""
    given = environment.get("XDG_DATA_HOME", "")
    root = (
        Path(given)
        if given.startswith("/")
        else Path(environment.get("HOME", "/nonexistent"), ".local", "share")
    )
    return root / "cantata"


def _file_problem(file: Path) -> str | None:
    """Make the file of an SQLite database and its folder; return why that cannot be, or None."""
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(file, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
    except OSError as error:
        return f"{file} cannot be opened: {error.strerror}"
    return network_problem(file)


_NETWORK_FILE_SYSTEMS = frozenset(
    {
        *("9p", "afs", "beegfs", "ceph", "cifs", "coda", "glusterfs", "gfs2", "gpfs", "lustre", "ncpfs"),
        *("nfs", "nfs4", "ocfs2", "orangefs", "smb2", "smb3", "smbfs", "virtiofs"),
    }
)
_LOCAL_FUSE = frozenset({"fuse.fuse-overlayfs", "fuse.portal", "fuseblk"})


def network_problem(file: Path, mounts: str | None = None) -> str | None:
    """Return why SQLite cannot be used on the file's file system, or None.

    Args:
        mounts: content of /proc/self/mountinfo; None: this process's.
    """
    if mounts is None:
        try:
            mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
        except OSError:  # no /proc: not Linux, or hidden
            return None
    folder = file.resolve().parent
    kind, depth = "", -1
    for line in mounts.splitlines():
        left, _, right = line.partition(" - ")
        point = Path(left.split()[4].encode().decode("unicode_escape")) if len(left.split()) > 4 else None
        # A later mount at the same point hides an earlier one.
        if point is not None and right and folder.is_relative_to(point) and len(point.parts) >= depth:
            kind, depth = right.split()[0], len(point.parts)
    if kind not in _NETWORK_FILE_SYSTEMS and (not kind.startswith("fuse") or kind in _LOCAL_FUSE):
        return None
    return (
        f"{file} is on a network file system ({kind}), where SQLite cannot lock and may lose data; use a "
        f"local file, or PostgreSQL"
    )
