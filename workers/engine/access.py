"""Access control of an engine: a Unix socket is protected by its permissions, a TCP port by the
engine's secret.

Callers send it as `authorization: Bearer SECRET`. The only exception is the health service's Check,
for probes that cannot send metadata; it reveals only that the process serves.
"""

import hmac
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc

from workers.errors import ConfigError
from workers.private_folder import LONGEST_SOCKET_PATH

SECRET_VARIABLE = "CANTATA_ENGINE_SECRET"
"""Environment variable of `python -m workers.engine` with the secret of a TCP port."""
MIN_SECRET_LENGTH = 16
_OPEN_METHODS = ("/grpc.health.v1.Health/Check",)
_UNIX = "unix:"


def authorization(secret: str) -> tuple[tuple[str, str], ...]:
    """Return the metadata of a call."""
    return (("authorization", f"Bearer {secret}"),) if secret else ()


class SecretInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # no generic at run time
    """Refuses calls without the secret before their messages are read."""

    def __init__(self, secret: str) -> None:
        ((_, wanted),) = authorization(secret)
        self._wanted = wanted.encode()

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        """Check the secret of a call (see grpc.aio.ServerInterceptor)."""
        sent = dict(handler_call_details.invocation_metadata).get("authorization", "")
        if handler_call_details.method in _OPEN_METHODS or hmac.compare_digest(_bytes(sent), self._wanted):
            return await continuation(handler_call_details)
        return grpc.stream_stream_rpc_method_handler(_refuse)


def check_address(address: str, secret: str | None) -> None:
    """Refuse an address on which other users could reach the engine, or that is in use.

    Raises:
        ConfigError: one sentence.
    """
    if not address.startswith(_UNIX):
        if secret is None or len(secret) < MIN_SECRET_LENGTH:
            raise ConfigError(
                f"an engine on a TCP port needs a secret of at least {MIN_SECRET_LENGTH} characters: set "
                f"{SECRET_VARIABLE} in its environment, or leave --address out for a Unix socket that only "
                f"this user can reach"
            )
        return
    path = address.removeprefix(_UNIX)
    if len(os.fsencode(path)) > LONGEST_SOCKET_PATH:
        raise ConfigError(
            f"the socket path {path} is longer than {LONGEST_SOCKET_PATH} bytes: choose a shorter one"
        )
    # gRPC would take over the socket of a live server.
    with socket.socket(socket.AF_UNIX) as probe:
        if probe.connect_ex(path) == 0:
            raise ConfigError(f"cannot listen on {address}: another server uses it")


def close_to_others(address: str) -> None:
    """Restrict a bound socket to this user, whatever folder it is in."""
    if address.startswith(_UNIX):
        Path(address.removeprefix(_UNIX)).chmod(0o600)


async def _refuse(requests: object, context: "grpc.aio.ServicerContext[Any, Any]") -> None:
    await context.abort(
        grpc.StatusCode.UNAUTHENTICATED, "this engine requires its secret in the call's metadata"
    )


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value
