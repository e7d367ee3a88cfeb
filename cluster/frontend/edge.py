"""The outermost layer of the HTTP app: request ids, API keys, errors as answers, the count of requests."""

import asyncio
import hmac
import logging
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.frontend import errors
from cluster.metrics import GatewayMetrics
from workers.errors import Cancelled, CantataError

_log = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health", "/ready", "/metrics", "/version", "/docs", "/openapi.json"})
"""Served without an API key: they tell nothing about requests."""


class Edge:
    """Gives each request an id (`scope["state"]["request_id"]`, header `x-request-id`), lets it in, and answers what it raises.

    Args:
        api_keys: if there are any, a request needs one of them as `Authorization: Bearer …`.
    """

    def __init__(self, app: ASGIApp, metrics: GatewayMetrics, api_keys: Sequence[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._api_keys = tuple(api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request; an error of the app never goes further up."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send, request_id=uuid.uuid4().hex)
        scope.setdefault("state", {})["request_id"] = answer.request_id
        status = 499
        try:
            status = await self._serve(scope, receive, answer)
        except asyncio.CancelledError:
            raise
        except OSError:
            _log.info("request %s: the client left", answer.request_id)
        finally:
            # Left by an exception, the client is gone: 499.
            endpoint = getattr(scope.get("route"), "path", "unknown")
            self._metrics.requests.labels(endpoint, str(status)).inc()

    async def _serve(self, scope: Scope, receive: Receive, answer: "_Answer") -> int:
        try:
            self._check_key(scope)
            await self._app(scope, receive, answer.send)
        except Exception as error:  # the request's edge
            failure = errors.as_cantata_error(error, answer.request_id)
            if not isinstance(failure, Cancelled) and answer.status is None:
                await answer.fail(failure)
            return errors.row_of(failure).http_status
        return answer.status or 499

    def _check_key(self, scope: Scope) -> None:
        if not self._api_keys or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not is_known_key(key.strip(), self._api_keys):
            raise errors.Unauthenticated("Send an API key of this server in the header Authorization: Bearer KEY.")


def is_known_key(key: str, api_keys: Sequence[str]) -> bool:
    """Whether it is one of the keys; takes the same time whichever it is."""
    matches = [hmac.compare_digest(key.encode("utf-8", "replace"), known.encode()) for known in api_keys]
    return any(matches)


class _Answer:
    """The way to the client: adds the request id, remembers the status."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self.request_id = request_id
        self.status: int | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(raw=message.setdefault("headers", []))["x-request-id"] = self.request_id
        await self._send(message)

    async def fail(self, error: CantataError) -> None:
        body = errors.body(error)
        headers = {"content-type": "application/json", "content-length": str(len(body)), **errors.headers(error)}
        raw = [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": errors.row_of(error).http_status, "headers": raw})
        await self.send({"type": "http.response.body", "body": body, "more_body": False})
