"""The outermost layer of the HTTP app: request ids, API keys, errors as answers, the count of
requests, clients that do not read."""

import asyncio
import hmac
import logging
import re
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.frontend import errors, unknown_fields
from cluster.frontend.anthropic import errors as messages_errors
from cluster.frontend.docs_page import DOCS_PATHS
from cluster.metrics import GatewayMetrics
from cluster.state.owners import owner_of
from workers.errors import Cancelled, CantataError

_log = logging.getLogger(__name__)

ABORT = "cantata.abort"
"""Extension of the ASGI scope that our own server provides: `abort` ends the connection and drops
unsent output."""
OPEN_PATHS = frozenset({"/health", "/ready", "/ping", "/load", "/metrics", "/version"}) | DOCS_PATHS
"""Paths served without an API key; their answers contain no data of requests."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
"""Pattern of a request id from a header, possibly the client's own, that may enter logs and ids."""


class Edge:
    """The layer that gives each request an id (`scope["state"]["request_id"]`, header
    `x-request-id`) and, by its API key, an owner (`scope["state"]["owner"]`), admits it, turns its
    errors into answers, and names the fields of its body that were ignored
    (`scope["state"]["ignored_fields"]`).

    Args:
        api_keys: if there are any, a request needs one of them as `Authorization: Bearer …` or as
            `x-api-key`.
        send_timeout_s: seconds without progress in sending after which the client counts as gone.
        open_paths: paths that are served without an API key, beside OPEN_PATHS.
        cors_origins: web origins whose pages may open a WebSocket beside our own; `*` for all.
        server_has_ids: take the id from the request's header, and leave the answer's to the server.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: GatewayMetrics,
        api_keys: Sequence[str],
        send_timeout_s: float,
        server_has_ids: bool,
        open_paths: frozenset[str] = frozenset(),
        cors_origins: Sequence[str] = (),
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._api_keys = tuple(api_keys)
        self._send_timeout_s = send_timeout_s
        self._server_has_ids = server_has_ids
        self._open_paths = OPEN_PATHS | open_paths
        self._cors_origins = frozenset(cors_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; an error of the app is not passed up."""
        if scope["type"] == "websocket":
            await self._connect(scope, receive, send)
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        abort = scope.get("extensions", {}).get(ABORT, {}).get("abort")
        given = Headers(scope=scope).get("x-request-id") if self._server_has_ids else None
        request_id = given if given and _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        form = error_form(scope["path"].removeprefix(scope.get("root_path", "")))
        answer = _Answer(send, state, _id_headers(form, given is None), self._send_timeout_s, abort)
        status = 499
        try:
            status = await self._serve(scope, receive, answer, form)
        except asyncio.CancelledError:
            raise
        except OSError:
            _log.info("request %s: the client left", answer.request_id)
        finally:
            # Left by an exception, the client is gone: 499.
            endpoint = getattr(scope.get("route"), "path", "unknown")
            self._metrics.requests.labels(endpoint, str(status)).inc()
            if ignored := state.get("ignored_fields"):
                self._metrics.ignored_fields.labels(endpoint).inc(len(ignored))

    async def _connect(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a WebSocket; without a key, or from a foreign page, it is refused with the answer
        of a request."""
        state = scope.setdefault("state", {})
        state["request_id"] = uuid.uuid4().hex
        status = 101
        try:
            self._check_origin(Headers(scope=scope))
            state["owner"] = owner_of(self._checked_key(scope))
        except (errors.ForeignOrigin, errors.Unauthenticated) as error:
            status = errors.row_of(error).http_status
            refusal = _Answer(_as_denial(send), state, ("x-request-id",), self._send_timeout_s, None)
            await receive()  # the handshake
            await refusal.fail(error, errors.OPENAI)
        else:
            await self._app(scope, receive, send)
        finally:
            endpoint = getattr(scope.get("route"), "path", "unknown")
            self._metrics.requests.labels(endpoint, str(status)).inc()

    async def _serve(self, scope: Scope, receive: Receive, answer: "_Answer", form: errors.ErrorForm) -> int:
        try:
            scope["state"]["owner"] = owner_of(self._checked_key(scope))
            await self._app(scope, receive, answer.send)
        except Exception as error:  # the request's edge
            failure = errors.as_cantata_error(error, answer.request_id)
            if not isinstance(failure, Cancelled) and answer.status is None:
                await answer.fail(failure, form)
            return form.status(failure)
        return answer.status or 499

    def _check_origin(self, headers: Headers) -> None:
        """Refuse a WebSocket of a foreign web page: browsers open it without asking as they do
        before other requests. Clients that are no browsers send no origin."""
        origin = headers.get("origin")
        if origin is None or self._cors_origins & {"*", origin} or is_own_origin(origin, headers):
            return
        raise errors.ForeignOrigin(
            "Pages of this origin may not call the server: add the origin to gateway.cors_origins."
        )

    def _checked_key(self, scope: Scope) -> str | None:
        """Return the request's API key; None where it needs none."""
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        method = scope.get("method")
        is_probe = method == "OPTIONS" or (method == "HEAD" and path == "/")
        if not self._api_keys or path in self._open_paths or is_probe:
            return None
        keys = sent_keys(Headers(scope=scope))
        if not keys:
            raise errors.Unauthenticated(
                "Send an API key of this server in the header Authorization: Bearer KEY, or in x-api-key."
            )
        known = [key for key in keys if is_known_key(key, self._api_keys)]
        if not known:
            raise errors.Unauthenticated("Incorrect API key provided.")
        return known[0]


def sent_keys(headers: Headers) -> list[str]:
    """Return the API keys that a request has: clients of Anthropic's API may send both headers."""
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    keys = (bearer if scheme.lower() == "bearer" else "", headers.get("x-api-key", ""))
    return [key.strip() for key in keys if key.strip()]


def is_own_origin(origin: str, headers: Headers) -> bool:
    """Return whether a page of this origin came from the host that the request is for. The scheme
    does not count: a proxy may end TLS."""
    _, _, host = origin.partition("://")
    return bool(host) and host.lower() == headers.get("host", "").lower()


def error_form(path: str) -> errors.ErrorForm:
    """Return how the API of a path writes its errors."""
    messages = messages_errors.PATH
    return messages_errors.FORM if path == messages or path.startswith(f"{messages}/") else errors.OPENAI


def _id_headers(form: errors.ErrorForm, shows_id: bool) -> tuple[str, ...]:
    return (*(("x-request-id",) if shows_id else ()), *((form.id_header,) if form.id_header else ()))


def is_known_key(key: str, api_keys: Sequence[str]) -> bool:
    """Return whether the key is one of the known keys, in the same time for all."""
    matches = [hmac.compare_digest(key.encode("utf-8", "replace"), known.encode()) for known in api_keys]
    return any(matches)


def _as_denial(send: Send) -> Send:
    """Return what sends a request's answer as the refusal of a WebSocket."""

    async def denied(message: Message) -> None:
        await send({**message, "type": message["type"].replace("http.", "websocket.http.", 1)})

    return denied


class _Answer:
    """The path to the client: adds the request id, in `id_headers`, and the names of ignored
    fields, remembers the status."""

    def __init__(
        self,
        send: Send,
        state: dict[str, Any],
        id_headers: Sequence[str],
        timeout_s: float,
        abort: Callable[[], None] | None,
    ) -> None:
        self._send = send
        self.request_id: str = state["request_id"]
        self._state = state
        self._id_headers = id_headers
        self.status: int | None = None
        self._timeout_s = timeout_s
        self._abort = abort

    async def send(self, message: Message) -> None:
        """Send a message. Raises Cancelled if the client takes nothing for too long."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(raw=message.setdefault("headers", []))
            for name in self._id_headers:
                headers[name] = self.request_id
            if ignored := self._state.get("ignored_fields"):
                headers[unknown_fields.HEADER] = unknown_fields.header_value(ignored)
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._send(message)
        except TimeoutError:
            _log.info(
                "request %s: the client has taken nothing for %g s and is cut off",
                self.request_id,
                self._timeout_s,
            )
            if self._abort is not None:
                self._abort()
                await asyncio.sleep(0)  # for the server to notice
            raise Cancelled("The client does not read its answer.") from None

    async def fail(self, error: CantataError, form: errors.ErrorForm) -> None:
        body = form.body(error, self.request_id)
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            **errors.headers(error),
        }
        raw = [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": form.status(error), "headers": raw})
        await self.send({"type": "http.response.body", "body": body, "more_body": False})
