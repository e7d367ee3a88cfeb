"""Settings as nested mappings before validation: read from a file, merged, set by path."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from workers.errors import ConfigError


def read_file(file: Path) -> dict[str, Any]:
    """Return the settings of a YAML file.

    Raises:
        ConfigError: it cannot be read, is not YAML, or holds something else.
    """
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        raise ConfigError(f"{file} is not YAML{f' (line {mark.line + 1})' if mark else ''}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{file} must be a mapping of settings, found a {type(values).__name__}")
    return values


def merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Merge settings over others, key by key."""
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = dict(value) if isinstance(value, Mapping) else value


def set_value(values: dict[str, Any], path: str, value: object, source: str) -> None:
    """Set a value at a path.

    Args:
        source: what sets it, for the error message.
    Raises:
        ConfigError: a part of the path already holds a plain value.
    """
    *parents, name = path.split(".")
    for position, parent in enumerate(parents):
        inner = values.setdefault(parent, {})
        if inner is None:
            inner = values[parent] = {}
        if not isinstance(inner, dict):
            raise ConfigError(
                f"{'.'.join(parents[: position + 1])} must be a mapping of settings, since {source} sets "
                f"{path}"
            )
        values = inner
    values[name] = value


def leaves(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the paths of all settings, including those of groups."""
    found = []
    for key, value in values.items():
        path = f"{prefix}{key}"
        found += [path, *(leaves(value, f"{path}.") if isinstance(value, Mapping) else [])]
    return found
