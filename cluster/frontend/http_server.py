"""The HTTP server of standalone serving: uvicorn with bounds on the cost of a connection.

uvicorn bounds only the time that an idle connection is kept. On Ray, Serve's HAProxy stands in its
place and has bounds of its own (docs/operations.md).
"""

import asyncio
import contextlib
import logging
import math
import re
import uuid
from contextlib import nullcontext
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from cluster.config import GatewayConfig
from cluster.frontend import errors
from cluster.frontend.edge import ABORT, error_form
from cluster.metrics import GatewayMetrics
from workers.errors import CantataError, InvalidRequest

_connection_log = logging.getLogger("uvicorn.error.connections")
# uvicorn warns of faulty requests: these are counted like answers, not logged one by one.
_connection_log.setLevel(logging.ERROR)
_LINGER_S = 5.0
"""Seconds to read an answer that was sent before the request was complete; then the connection
closes."""
_LONGEST_SWEEP_S = 1.0
_WEBSOCKET_REQUEST = b"GET /v1/responses"
"""Beginning of the only requests that may become a WebSocket."""
_UPGRADE = re.compile(rb"(?<=\r\n)upgrade(?=:)", re.IGNORECASE)


class HttpServer(uvicorn.Server):
    """A uvicorn server without signal handlers of its own, with limits.

    Args:
        metrics: counter of the answers that the app did not give.
        graceful_s: seconds that running requests have to end after `should_exit`; None: no bound.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: GatewayConfig,
        metrics: GatewayMetrics,
        graceful_s: float | None = None,
    ) -> None:
        config = _Config(
            app,
            http=_Protocol,
            ws="websockets-sansio",
            ws_max_size=limits.max_body_bytes,
            ws_per_message_deflate=False,
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=None if graceful_s is None else math.ceil(graceful_s),
        )
        config.limits, config.metrics = limits, metrics
        # An int by its annotation; uvicorn passes it to call_later.
        config.timeout_keep_alive = limits.keep_alive_timeout_s  # type: ignore[assignment]
        super().__init__(config)
        self._sweep_s = min(_LONGEST_SWEEP_S, limits.header_timeout_s / 4, limits.send_timeout_s / 4)

    def capture_signals(self) -> "nullcontext[None]":  # type: ignore[override]
        """Leave signals to the process."""
        return nullcontext()

    async def serve(self, sockets: Any = None) -> None:
        """Serve as uvicorn does, and check connections from time to time."""
        sweeping = asyncio.create_task(self._sweep())
        try:
            await super().serve(sockets)
        finally:
            sweeping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sweeping

    async def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._sweep_s)
            for connection in list(self.server_state.connections):
                if isinstance(connection, _Protocol):
                    connection.check(loop.time())


class _Config(uvicorn.Config):
    limits: GatewayConfig
    metrics: GatewayMetrics


class _Protocol(HttpToolsProtocol):
    """A connection that knows what it waits for, and since when."""

    config: _Config

    def __init__(
        self,
        config: _Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: Any = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.logger = _connection_log
        self._limits = config.limits
        self._bytes_without_body = 0
        self._in_message = False
        self._in_body = False
        self._may_upgrade = False
        self._refused = False
        # Since when, on the loop's clock, the connection waits: for headers; for the rest of a
        # message that was answered early; for its output to be read before it closes.
        self._headers_since: float | None = None
        self._rest_since: float | None = None
        self._closing_since: float | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol."""
        super().connection_made(transport)
        self._headers_since = self.loop.time()

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if self._refused:
            return
        idle = self.cycle is None or self.cycle.response_complete
        if idle and not self._in_message and self._headers_since is None:
            self._headers_since = self.loop.time()
        self._bytes_without_body += len(data)
        if not self._in_message:
            self._may_upgrade = data.startswith(_WEBSOCKET_REQUEST)
        passes = self._in_body or self._may_upgrade
        super().data_received(data if passes else _without_upgrade(data))
        if self._bytes_without_body > self._limits.max_header_bytes and not self._refused:
            self._refuse(self._headers_too_large())

    def on_message_begin(self) -> None:
        """See httptools."""
        super().on_message_begin()
        self._in_message = True

    def on_headers_complete(self) -> None:
        """See httptools."""
        self._headers_since = None
        self._bytes_without_body = 0
        num_bytes = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if num_bytes > self._limits.max_header_bytes:
            self._refuse(self._headers_too_large())
        if not self._refused:
            self.scope["extensions"] = {ABORT: {"abort": self.transport.abort}}
            super().on_headers_complete()
            self._in_body = True

    def on_body(self, body: bytes) -> None:
        """See httptools."""
        self._bytes_without_body = 0
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """See httptools."""
        self._bytes_without_body = 0
        self._in_message = self._in_body = False
        self._rest_since = None
        if not self._refused:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """See uvicorn."""
        super().on_response_complete()
        if self._is_answered() and self.expect_100_continue:
            # the client may send the body it asked about, or the next request
            self.transport.close()
        elif self._is_answered():
            self._rest_since = self.loop.time()
        elif self._in_message and not self._in_body:
            self._headers_since = self.loop.time()  # of a request that was sent before this answer

    def send_400_response(self, msg: str) -> None:
        """See uvicorn; the body has the form of all errors."""
        if not self._refused:
            self._refuse(InvalidRequest("The request is not valid HTTP."))

    def check(self, now: float) -> None:
        """Close the connection if one of its waits has taken too long."""
        limits = self._limits
        if self.transport.is_closing():
            self._closing_since = now if self._closing_since is None else self._closing_since
            if now - self._closing_since > limits.send_timeout_s:
                self.transport.abort()
        elif self._rest_since is not None:
            if now - self._rest_since > _LINGER_S:
                self.transport.abort()
        elif self._headers_since is not None and now - self._headers_since > limits.header_timeout_s:
            if self._in_message:
                limit = f"{limits.header_timeout_s:g} s"
                self._refuse(errors.RequestTimeout(f"The request's headers took longer than {limit}."))
            else:
                self.transport.close()

    def _headers_too_large(self) -> CantataError:
        limit = self._limits.max_header_bytes
        return errors.HeadersTooLarge(
            f"The request's headers are larger than the {limit} bytes of this server."
        )

    def _is_answered(self) -> bool:
        """Return whether the message that is arriving has already been answered."""
        return self._in_body and self.cycle.response_complete

    def _refuse(self, error: CantataError) -> None:
        """Answer in place of the app, drop further input, and close after a time to read the
        answer."""
        self._refused = True
        self._headers_since = None
        request_id = uuid.uuid4().hex
        path = (self.url or b"").partition(b"?")[0].decode("latin-1")  # None before the first request
        form = error_form(path)
        status, body = form.status(error), form.body(error, request_id)
        names = filter(None, ("x-request-id", form.id_header))
        id_headers = "".join(f"{name}: {request_id}\r\n" for name in names)
        if self._is_answered():
            pass  # a second answer would be taken for that of the next request
        elif self.cycle is None or self.cycle.response_complete:
            self.config.metrics.requests.labels("unknown", str(status)).inc()
            self._write_answer(status, id_headers, body)
        elif self.pipeline or self.cycle.response_started:
            self.transport.close()  # in the middle of an answer, or before an earlier one
            return
        else:
            # For the app, which counts it, the client has left.
            self.cycle.disconnected, self.cycle.waiting_for_100_continue = True, False
            self.cycle.message_event.set()
            self._write_answer(status, id_headers, body)
        # Not closed at once: the reset that follows further input could overtake the answer.
        self._rest_since = self.loop.time()
        self.transport.write_eof()

    def _write_answer(self, status: int, id_headers: str, body: bytes) -> None:
        head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n"
        self.transport.write(STATUS_LINE[status] + f"{head}{id_headers}\r\n".encode() + body)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        if cycle.scope["http_version"] == "1.0":
            app = _without_chunks(app, cycle)
        super()._start_asgi_task(cycle, app)


def _without_upgrade(data: bytes) -> bytes:
    """Return data that begin with headers, or in the middle of them, without the offer of another
    protocol.

    The parser drops the body of a request with one, and it may be declined: Java's client offers
    HTTP/2 with its first requests.
    """
    head, end, body = data.partition(b"\r\n\r\n")
    return _UPGRADE.sub(b"x-upgrade", head) + end + body


def _without_chunks(app: ASGIApp, cycle: RequestResponseCycle) -> Any:
    """Return the app for an HTTP/1.0 client, which knows no chunks.

    A body without a length ends with its connection, which uvicorn closes.
    """

    async def plain(scope: Scope, receive: Receive, send: Send) -> None:
        has_length = False

        async def send_plain(message: Message) -> None:
            nonlocal has_length
            if message["type"] == "http.response.start":
                has_length = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
                if not has_length:
                    cycle.chunked_encoding = False
            elif not has_length:
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await app(scope, receive, send_plain)

    return plain
