"""The constants that all ways of serving share, and checks of settings that apply to only one of
them. Another way refuses them, since they would have no effect."""

from collections.abc import Iterable

from pydantic import BaseModel

from cluster.config import AppConfig
from workers.errors import ConfigError

DRAIN_S = 30.0
"""Seconds for running requests to end after the first SIGINT or SIGTERM to `cantata serve`:
standalone unless `gateway_drain_timeout_s` is set, on Ray at most."""
_STANDALONE_ONLY = ("gateway.max_header_bytes", "gateway.header_timeout_s")
_RAY_ONLY = ("gateways", "engine_host", "engine_drain_timeout_s")


def check_standalone(config: AppConfig) -> None:
    """Check the settings of `cantata serve --standalone`.

    Raises:
        ConfigError: a setting has no effect there.
    """
    _refuse(config, _RAY_ONLY, "applies only on Ray; remove it, or serve without --standalone")


def check_on_ray(config: AppConfig) -> None:
    """Check the settings of `cantata serve` on Ray.

    Raises:
        ConfigError: a setting has no effect there.
    """
    reason = "applies only with --standalone; on Ray, HAProxy has its own limits: remove it"
    _refuse(config, _STANDALONE_ONLY, reason)


def check_serve_application(config: AppConfig) -> None:
    """Check the arguments of a Serve application.

    Raises:
        ConfigError: a setting has no effect there.
    """
    check_on_ray(config)
    reason = (
        "has no effect in a Serve application's args; write http_options.keep_alive_timeout_s in the YAML"
    )
    _refuse(config, ("gateway.keep_alive_timeout_s",), reason)


def _refuse(config: AppConfig, paths: Iterable[str], reason: str) -> None:
    for path in paths:
        *parents, name = path.split(".")
        settings: BaseModel = config
        for parent in parents:
            settings = getattr(settings, parent)
        value = getattr(settings, name)
        if value != type(settings).model_fields[name].default:
            raise ConfigError(f"{path} is {value}, which {reason}")
