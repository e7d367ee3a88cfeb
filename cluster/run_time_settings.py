"""Settings that a running gateway on Ray takes anew, without a restart."""

from collections.abc import Mapping

from pydantic import ValidationError

from cluster.config import AppConfig, GatewayConfig, sentence_of
from workers.errors import ConfigError

RUN_TIME_SETTINGS = (
    "max_in_flight_requests",
    "request_timeout_s",
    "conversation_date",
    "reasoning_effort",
    "harmony_constraint",
    "tool_arguments",
    "reasoning_wrap_up",
    "reserve_answer",
)
"""Settings of `gateway` that a running gateway applies from the `user_config` of its deployment."""


def reconfigured(gateway: GatewayConfig, values: object) -> GatewayConfig:
    """Return a gateway's settings, overridden by those of its deployment's `user_config`.

    Args:
        values: some of RUN_TIME_SETTINGS by name; None or empty for no change.
    Raises:
        ConfigError: another name, or an invalid value.
    """
    if not isinstance(values or {}, Mapping):
        raise ConfigError("user_config of the deployment gateway must be a mapping of settings")
    changes = dict(values or {})  # type: ignore[call-overload]  # a mapping, as checked
    for name in changes:
        if name not in RUN_TIME_SETTINGS:
            raise ConfigError(
                f"user_config of the deployment gateway: {name} is not a run-time setting; those are "
                f"{', '.join(RUN_TIME_SETTINGS)}; other settings belong under args"
            )
    try:
        return GatewayConfig.model_validate(gateway.model_dump() | changes)
    except ValidationError as error:
        raise ConfigError(
            f"user_config of the deployment gateway: {sentence_of(AppConfig, error, {})}"
        ) from None
