"""Checks and conversions of the values of single settings, for `cluster.config`."""

import datetime
import re

_MAX_ALIASES = 64
_ALIAS = re.compile(r"[!-)+-~]{1,256}\*?|\*")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s,?#@]+")
"""Pattern of a web origin as browsers send it: without a path, not even a slash at its end."""


def split(value: object) -> object:
    """Return the parts of a text with commas."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def check_keys(value: tuple[str, ...]) -> tuple[str, ...]:
    """Return keys that an HTTP header can carry; raise ValueError otherwise."""
    if any(not key or not key.isascii() or not key.isprintable() or " " in key for key in value):
        raise ValueError("a key is empty or has characters other than printable ASCII without spaces")
    return value


def check_origins(value: tuple[str, ...]) -> tuple[str, ...]:
    """Return web origins, or `*`; raise ValueError otherwise."""
    for origin in value:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise ValueError(
                f"{origin!r} is not a web origin; write *, or SCHEME://HOST or SCHEME://HOST:PORT"
            )
    return value


def check_aliases(value: tuple[str, ...]) -> tuple[str, ...]:
    """Return names of a model; raise ValueError for one that no client could send."""
    if len(value) > _MAX_ALIASES:
        raise ValueError(f"there are {len(value)} names; at most {_MAX_ALIASES} are allowed")
    for name in value:
        if not _ALIAS.fullmatch(name):
            raise ValueError(
                f"{name[:100]!r} is not a model name; write 1 to 256 printable ASCII characters without "
                f"spaces, with * at the end only"
            )
    return value


def check_cpus(value: float | None) -> float | None:
    """Return a number of CPUs that Ray can reserve; raise ValueError otherwise."""
    if value is not None and value > 1 and not value.is_integer():
        raise ValueError(f"{value:g} is neither a whole number nor less than 1")
    return value


def off(value: object) -> object:
    """YAML reads `off` as false."""
    return "off" if value is False else value


def conversation_date(value: object) -> object:
    """Return a date as text, or `auto` or `none`; raise ValueError otherwise."""
    if isinstance(value, datetime.date):
        return value.isoformat()
    if isinstance(value, str) and value not in ("auto", "none"):
        try:
            datetime.date.fromisoformat(value)
        except ValueError:
            raise ValueError(f"{value!r} is not a date; write auto, none or YYYY-MM-DD") from None
    return value
