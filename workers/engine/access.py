"""Who may call an engine: on a Unix socket whoever reaches it, on a TCP port who sends the engine's
secret.

Callers send it as `authorization: Bearer SECRET`. One call is free of it: the health service's
Check, for probes that cannot send metadata; it says nothing but that the process serves.
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
"""Environment of `python -m workers.engine`: the secret of a TCP port."""
MIN_SECRET_LENGTH = 16
_OPEN_METHODS = ("/grpc.health.v1.Health/Check",)
_UNIX = "unix:"


def authorization(secret: str) -> tuple[tuple[str, str], ...]:
    """Metadata of a call."""
    return (("authorization", f"Bearer {secret}"),) if secret else ()


class SecretInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # no generic at run time
    """Refuses calls without the secret, before their messages are read."""

    def __init__(self, secret: str) -> None:
        ((_, wanted),) = authorization(secret)
        self._wanted = wanted.encode()

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        """See grpc.aio.ServerInterceptor."""
        sent = dict(handler_call_details.invocation_metadata).get("authorization", "")
        if handler_call_details.method in _OPEN_METHODS or hmac.compare_digest(_bytes(sent), self._wanted):
            return await continuation(handler_call_details)
        return grpc.stream_stream_rpc_method_handler(_refuse)


def check_address(address: str, secret: str | None) -> None:
    """Refuse an address on which others could use the engine, or that something else serves.

    Raises:
        ConfigError: one sentence.
    """
    if not address.startswith(_UNIX):
        if secret is None or len(secret) < MIN_SECRET_LENGTH:
            raise ConfigError(
                f"an engine on a TCP port needs a secret of {MIN_SECRET_LENGTH} characters or more, which "
                f"its callers send: set "
                f"{SECRET_VARIABLE} in its environment, or leave --address out for a Unix socket that only "
                f"this user can reach"
            )
        return
    path = address.removeprefix(_UNIX)
    if len(os.fsencode(path)) > LONGEST_SOCKET_PATH:
        raise ConfigError(
            f"the path of the socket {path} is longer than {LONGEST_SOCKET_PATH} bytes: choose a shorter one"
        )
    # gRPC would take the socket away from a server that lives.
    with socket.socket(socket.AF_UNIX) as probe:
        if probe.connect_ex(path) == 0:
            raise ConfigError(f"cannot listen on {address}: another server does")


def close_to_others(address: str) -> None:
    """Let only this user connect to a socket that has been bound, whatever folder it is in."""
    if address.startswith(_UNIX):
        Path(address.removeprefix(_UNIX)).chmod(0o600)


async def _refuse(requests: object, context: "grpc.aio.ServicerContext[Any, Any]") -> None:
    await context.abort(
        grpc.StatusCode.UNAUTHENTICATED, "this engine wants its secret in the metadata of a call"
    )


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value
