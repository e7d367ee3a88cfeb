"""EngineConfig as JSON: the form in which a supervisor passes an engine process its configuration.
Unknown fields and fields of a wrong type are refused by name."""

import json
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from workers.config import EngineConfig
from workers.errors import ConfigError


def engine_config_to_json(config: EngineConfig) -> str:
    """Encode a config as one line; `engine_config_from_json` decodes it."""
    return json.dumps(asdict(config), default=str)


def engine_config_from_json(text: str) -> EngineConfig:
    """Decode JSON written by `engine_config_to_json` or by hand; absent fields take their defaults.

    Raises:
        ConfigError: names the field.
    """
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"the engine's configuration is not JSON: {error}") from error
    config = _build(EngineConfig, raw, "")
    assert isinstance(config, EngineConfig)
    return config


def _build(cls: type, raw: object, place: str) -> object:
    if not isinstance(raw, Mapping):
        raise ConfigError(
            f"{place or 'the engine configuration'} must be a JSON object, got {type(raw).__name__}"
        )
    hints = typing.get_type_hints(cls)
    known = {field.name for field in fields(cls)}
    unknown = [str(name) for name in raw if name not in known]
    if unknown:
        raise ConfigError(
            f"unknown field {place}{unknown[0]} in the engine configuration; known are "
            f"{', '.join(sorted(known))}"
        )
    if cls is EngineConfig and "model_path" not in raw:
        raise ConfigError("field model_path is missing in the engine configuration")
    return cls(**{name: _value(hints[name], value, f"{place}{name}") for name, value in raw.items()})


def _value(hint: Any, value: object, place: str) -> object:
    if isinstance(hint, type) and is_dataclass(hint):
        return _build(hint, value, f"{place}.")
    if typing.get_origin(hint) in (types.UnionType, typing.Union):  # Literal | None is the latter
        options = typing.get_args(hint)
        return None if value is None and type(None) in options else _value(options[0], value, place)
    if typing.get_origin(hint) is typing.Literal:
        if value not in typing.get_args(hint):
            raise ConfigError(
                f"{place} must be one of {', '.join(map(str, typing.get_args(hint)))}, got {value!r}"
            )
        return value
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{place} must be of type {hint.__name__}, got {value!r}")
    return value
