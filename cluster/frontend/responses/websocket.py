"""`GET /v1/responses` as a WebSocket: responses one after the other on one connection, each a
`response.create` of the client. The last response is kept in the connection's memory, so that the
next one can continue it although nothing is stored."""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import orjson
from fastapi import FastAPI, WebSocket
from pydantic import TypeAdapter
from starlette.websockets import WebSocketDisconnect, WebSocketState

from cluster.config import GatewayConfig
from cluster.events import Usage
from cluster.frontend import body, errors
from cluster.frontend.responses.events import Event, ResponseEvents
from cluster.frontend.responses.prior import Prior
from cluster.frontend.responses.request import Asked
from cluster.frontend.responses.routes import ResponsesApi, make_events
from cluster.frontend.responses.saver import Saver
from cluster.frontend.responses.schema import ResponsesRequest
from cluster.frontend.responses.schema_items import Item, MessageItem
from cluster.generation.limits import check_num_messages
from workers.errors import InvalidRequest

_log = logging.getLogger(__name__)
_ITEMS: TypeAdapter[list[Item]] = TypeAdapter(list[Item])

LONGEST_S = 3600.0
"""Seconds after which a connection takes no further requests, as in OpenAI's API."""
MAX_CONNECTIONS = 1024
MAX_QUEUED = 16
"""Maximum number of frames that wait for the response before them."""
MAX_KEPT_BYTES = 256 * 2**20
"""Maximum bytes of what all connections of a gateway keep of their last responses."""
ERROR_CODE = "invalid_request"
"""Code of errors that have none elsewhere: here it is required."""
_TRY_AGAIN_LATER, _TOO_LARGE = 1013, 1009


@dataclass
class Kept:
    """The bytes that connections keep, and their number."""

    num_bytes: int = 0
    num_connections: int = 0


@dataclass(frozen=True, slots=True)
class _Last:
    """The last response of a connection, with all items of its input and output."""

    id: str
    items: tuple[Item, ...]
    num_bytes: int
    is_stored: bool


class _Gone(Exception):
    """The client has left, or takes nothing."""


def add_websocket(app: FastAPI, api: ResponsesApi, config: GatewayConfig) -> None:
    """Add the route."""
    kept = Kept()

    @app.websocket("/v1/responses")
    async def connect(websocket: WebSocket) -> None:
        await websocket.accept()
        if kept.num_connections >= MAX_CONNECTIONS:
            await websocket.close(_TRY_AGAIN_LATER, "too many connections")
            return
        kept.num_connections += 1
        connection = Connection(websocket, api, config, kept)
        try:
            await connection.run()
        finally:
            connection.forget()
            kept.num_connections -= 1


class _Output:
    """The way to the client. Sending raises _Gone if the client has left, or takes nothing for
    `send_timeout_s` seconds."""

    def __init__(self, websocket: WebSocket, send_timeout_s: float, request_id: str) -> None:
        self._websocket = websocket
        self._send_timeout_s = send_timeout_s
        self._request_id = request_id

    async def made(self, made: Sequence[Event], maker: ResponseEvents, saver: Saver | None) -> None:
        """Send events; the last ones when the response is stored."""
        if saver is not None and maker.response is not None:
            made = await saver.saved(maker.response, made)
        await self.events(made)

    async def events(self, events: Sequence[Event]) -> None:
        """Send events."""
        for _, data in events:
            await self._send(data)

    async def error(self, status: int, error: dict[str, Any]) -> None:
        """Send an error that is no event of a response."""
        await self._send(orjson.dumps({"type": "error", "status": status, "error": error}))

    async def _send(self, data: bytes) -> None:
        try:
            async with asyncio.timeout(self._send_timeout_s):
                await self._websocket.send_text(data.decode())
        except (TimeoutError, OSError, RuntimeError) as error:  # RuntimeError: it is closed
            raise _Gone from error

    async def close(self, code: int) -> None:
        """Close the connection."""
        try:
            async with asyncio.timeout(self._send_timeout_s):
                await self._websocket.close(code)
        except (TimeoutError, OSError, RuntimeError):
            _log.info("request %s: the client does not read", self._request_id)


class Connection:
    """One connection."""

    def __init__(self, websocket: WebSocket, api: ResponsesApi, config: GatewayConfig, kept: Kept) -> None:
        self._websocket = websocket
        self._api = api
        self._kept = kept
        self._owner: str = websocket.scope.get("state", {}).get("owner", "")
        self._request_id: str = websocket.scope.get("state", {}).get("request_id", "")
        self._output = _Output(websocket, config.send_timeout_s, self._request_id)
        self._seals = api.seals(self._owner)
        self._last: _Last | None = None
        self._frames: asyncio.Queue[bytes] = asyncio.Queue(MAX_QUEUED)
        self._num_queued_bytes = 0

    async def run(self) -> None:
        """Answer until the client leaves or the connection's time is over."""
        reading = asyncio.create_task(self._read())
        answering = asyncio.create_task(self._answer_all())
        try:
            await asyncio.wait({reading, answering}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (reading, answering):
                task.cancel()
            await asyncio.gather(reading, answering, return_exceptions=True)
            if self._websocket.client_state is WebSocketState.CONNECTED:
                await self._output.close(_TOO_LARGE if self._frames.full() else 1000)

    def forget(self) -> None:
        """Drop the last response."""
        self._keep(None)

    async def _read(self) -> None:
        """Put frames into the queue until the client leaves or sends too many at once."""
        while True:
            message = await self._websocket.receive()
            if message["type"] != "websocket.receive":
                return
            text = message.get("text")
            data: bytes = (message.get("bytes") or b"") if text is None else text.encode("utf-8", "replace")
            if self._frames.full() or self._num_queued_bytes + len(data) > self._api.limits.max_bytes:
                return
            self._num_queued_bytes += len(data)
            self._frames.put_nowait(data)

    async def _answer_all(self) -> None:
        deadline = asyncio.get_running_loop().time() + LONGEST_S
        try:
            while True:
                async with asyncio.timeout_at(deadline):  # ends the wait, not a response
                    data = await self._frames.get()
                self._num_queued_bytes -= len(data)
                await self._answer(data)
        except TimeoutError:
            limit = "This connection is 60 minutes old: open another one."
            await self._output.error(400, {"code": "websocket_connection_limit_reached", "message": limit})
        except (_Gone, WebSocketDisconnect):
            return

    async def _answer(self, data: bytes) -> None:
        """Answer one frame; an error before its response has begun is an error frame."""
        try:
            body_, num_bytes, generates = await self._parsed(data)
            await self._respond(body_, num_bytes, generates=generates)
        except (_Gone, WebSocketDisconnect):
            raise
        except Exception as error:  # the request's edge
            failure = errors.as_cantata_error(error, self._request_id)
            row = errors.row_of(failure)
            self._keep(None)  # a response that could not be continued is forgotten
            sent = {"type": row.type, "code": row.code or ERROR_CODE, "message": failure.message}
            await self._output.error(row.http_status, {**sent, "param": failure.param})

    async def _parsed(self, data: bytes) -> tuple[ResponsesRequest, int, bool]:
        limits, max_items = self._api.limits, self._api.service.served.info.max_model_len

        def parse() -> tuple[ResponsesRequest, dict[str, Any]]:
            return body.parsed_frame(data, ResponsesRequest, limits, max_items, ("type", "generate"))

        parsed, envelope = await self._api.service.prompts.threads.run(len(data), parse)
        if envelope.get("type") != "response.create":
            raise InvalidRequest("type must be 'response.create'.", "type")
        if not isinstance(envelope.get("generate", True), bool):
            raise InvalidRequest("generate must be true or false.", "generate")
        return parsed, len(data), envelope.get("generate", True) is not False

    async def _respond(self, given: ResponsesRequest, num_bytes: int, *, generates: bool) -> None:
        if given.background:
            raise InvalidRequest("background is not offered on a WebSocket.", "background")
        whole, prior = await self._with_prior(given, num_bytes)
        num_all = num_bytes + prior.num_bytes
        asked = await self._api.asked(whole, num_all, self._seals, prior)
        events = make_events(asked.record, self._seals)
        saver = self._api.saver(whole, asked, prior, self._owner)
        if saver is not None:
            await saver.check()
        if generates:
            await self._generate(asked, events, saver)
        else:
            await self._warm(asked, events, saver)
        response = events.response
        if response is None or response["status"] == "failed":
            self._keep(None)
            return
        items = (
            [MessageItem(role="user", content=whole.input)] if isinstance(whole.input, str) else whole.input
        )
        output = _ITEMS.validate_python(response["output"])
        size = num_all + len(orjson.dumps(response["output"]))
        is_stored = saver is not None and response["store"]
        self._keep(_Last(asked.record.id, (*(items or ()), *output), size, is_stored))

    async def _with_prior(self, given: ResponsesRequest, num_bytes: int) -> tuple[ResponsesRequest, Prior]:
        """Return a request with what it continues: the last response where that is not stored, else
        what is stored."""
        last, id = self._last, given.previous_response_id
        if id is None or (self._api.state is not None and (last is None or last.id != id or last.is_stored)):
            return await self._api.with_prior(given, num_bytes, self._owner)
        if last is None or last.id != id:
            raise errors.PreviousResponseNotFound(
                f"Previous response with id '{id[:100]}' not found: nothing is stored, and this connection "
                f"keeps its last response only.",
                "previous_response_id",
            )
        own = given.input
        items = [MessageItem(role="user", content=own)] if isinstance(own, str) else own or ()
        check_num_messages(len(last.items) + len(items), self._api.limits.max_messages, "input")
        # What continues a response that is not stored cannot be stored either.
        whole = given.model_copy(update={"input": [*last.items, *items], "store": False})
        return whole, Prior((), len(last.items), last.num_bytes, id)

    async def _generate(self, asked: Asked, events: ResponseEvents, saver: Saver | None) -> None:
        generation = await self._api.service.chat(asked.chat, asked.record.id)
        async with aclosing(generation):
            try:
                await self._output.events(events.begin())
                async for event in generation:
                    if made := events.add(event):
                        await self._output.made(made, events, saver)
            except (_Gone, WebSocketDisconnect):
                raise
            except Exception as error:  # the request's edge: a failed response, logged if not ours
                failure = errors.as_cantata_error(error, self._request_id)
                await self._output.events(events.fail(failure))

    async def _warm(self, asked: Asked, events: ResponseEvents, saver: Saver | None) -> None:
        """Have the engine read the prompt, so that it is in its prefix cache, and answer without
        output."""
        sampling = replace(asked.chat.sampling, max_tokens=1, min_tokens=0)
        num_tokens = 0
        generation = await self._api.service.chat(replace(asked.chat, sampling=sampling), asked.record.id)
        async with aclosing(generation):
            async for event in generation:
                if isinstance(event, Usage):
                    num_tokens = event.prompt_tokens
        await self._output.events(events.begin())
        await self._output.made(events.add(Usage(num_tokens, 0, 0, 0)), events, saver)

    def _keep(self, last: _Last | None) -> None:
        """Keep a response as the last one, or, where all connections keep too much, none."""
        if self._last is not None:
            self._kept.num_bytes -= self._last.num_bytes
        if last is not None and self._kept.num_bytes + last.num_bytes > MAX_KEPT_BYTES:
            last = None
        self._last = last
        if last is not None:
            self._kept.num_bytes += last.num_bytes
