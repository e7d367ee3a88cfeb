"""The headers by which OpenAI's clients see how much more a server takes: here, from the limit on
the choices that a gateway runs at once."""

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.generation import GenerationService

PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})
"""Paths whose requests are admitted by the number of their choices."""
LIMIT, REMAINING, RESET = (f"x-ratelimit-{name}-requests" for name in ("limit", "remaining", "reset"))
_RETRY = "1s"
"""When to try again where there is no room, as a refusal says."""


class RateLimits:
    """The layer that adds the headers to answers of requests that generate. A refused key learns
    nothing of the load."""

    def __init__(self, app: ASGIApp, service: GenerationService) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or scope["method"] != "POST" or path not in PATHS:
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] != 401:
                headers = MutableHeaders(raw=message.setdefault("headers", []))
                limit = self._service.max_in_flight
                remaining = max(0, limit - self._service.num_in_flight)
                headers[LIMIT], headers[REMAINING] = str(limit), str(remaining)
                headers[RESET] = "0s" if remaining else _RETRY
            await send(message)

        await self._app(scope, receive, send_with_headers)
