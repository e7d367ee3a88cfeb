"""Answers over HTTP that end when the client leaves: whole ones and server-sent events."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import orjson
from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from cluster.frontend import errors
from workers.errors import Cancelled, CantataError

T = TypeVar("T")


class Source(Protocol):
    """What the chunks of a stream are made from, such as a Generation."""

    async def aclose(self) -> None:
        """Stop all running work."""


S = TypeVar("S", bound=Source)

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
"""A comment, which clients skip."""


def error_event(error: CantataError) -> bytes:
    """Return the event of an error in OpenAI's form."""
    return b"data: " + errors.body(error) + b"\n\n"


@dataclass(frozen=True, slots=True)
class StreamForm:
    """How an API's streams end, and what they send in silence.

    Attributes:
        failed: returns the events of an error that ends a stream.
        end: what follows the last event in any case.
    """

    failed: Callable[[CantataError], bytes] = error_event
    end: bytes = DONE
    keep_alive: bytes = KEEP_ALIVE


@dataclass(frozen=True, slots=True)
class StreamTimes:
    """When a stream sends something although there is no event.

    Attributes:
        headers_s: seconds that a stream waits for its first event before it sends its headers; a
            refusal in this time has its own status.
        keep_alive_s: seconds of silence after which a stream sends a comment.
    """

    headers_s: float
    keep_alive_s: float


async def until_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`, which is cancelled at once if the client leaves first. The body
    must have been read.

    Raises:
        Cancelled: the client left.
    """
    return await _race(work, _gone(request.receive))


async def begin(request: Request, start: Coroutine[Any, Any, S]) -> S:
    """Run `until_gone` for a generation. A generation that began after its client had disconnected
    is closed."""
    opening = asyncio.create_task(start)
    try:
        return await until_gone(request, _result(opening))
    except BaseException:
        await _close(opening)
        raise


async def stream(
    request: Request,
    start: Coroutine[Any, Any, S],
    chunks: Callable[[S], AsyncGenerator[bytes, None]],
    times: StreamTimes,
    request_id: str,
    form: StreamForm | None = None,
) -> "EventStream[S]":
    """Return the stream of a generation when its first event is there, or when it has been awaited
    for `times.headers_s`.

    Args:
        start: returns the generation with its first event ready.
        chunks: yields the generation's complete server-sent events.
        form: None: that of chat.
    Raises:
        CantataError: the generation failed before that, or the client left.
    """
    opening = asyncio.create_task(start)
    try:
        await until_gone(request, asyncio.wait({opening}, timeout=times.headers_s))
        if opening.done():
            opening.result()
    except BaseException:
        await _close(opening)
        raise
    return EventStream(opening, chunks, times, request_id, form)


async def _result(task: "asyncio.Task[T]") -> T:
    return await task


async def _close(opening: "asyncio.Task[S]") -> None:
    """End the task and the generation that it may have begun."""

    async def close() -> None:
        opening.cancel()
        await asyncio.wait({opening})
        if not opening.cancelled() and opening.exception() is None:
            await opening.result().aclose()

    # Shielded: Serve cancels the request of a client that has left, possibly in the middle of this.
    await asyncio.shield(asyncio.create_task(close()))


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _race(work: Coroutine[Any, Any, T], *watches: Coroutine[Any, Any, None]) -> T:
    """Return the result of `work`; a watch ends first, by returning or raising, if the client
    left."""
    worker, watchers = asyncio.create_task(work), [asyncio.create_task(watch) for watch in watches]
    try:
        await asyncio.wait({worker, *watchers}, return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            return worker.result()
        for watcher in watchers:
            if watcher.done():
                watcher.result()
        raise Cancelled("The client left.")
    finally:
        for task in (worker, *watchers):
            task.cancel()
        await asyncio.gather(worker, *watchers, return_exceptions=True)


def event(body: object) -> bytes:
    """Return one server-sent event."""
    return b"data: " + orjson.dumps(body) + b"\n\n"


class EventStream(Response, Generic[S]):
    """An answer that sends the chunks of a generation, which may not have begun yet, and comments
    while there are none. An error after the status becomes an error event; then the stream ends.
    The generation is closed in every case; if the client leaves, at once.

    Args:
        opening: returns the generation with its first event ready.
        chunks: yields the generation's complete server-sent events.
        form: None: that of chat.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        opening: "asyncio.Task[S]",
        chunks: Callable[[S], AsyncGenerator[bytes, None]],
        times: StreamTimes,
        request_id: str,
        form: StreamForm | None = None,
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._opening = opening
        self._chunks = chunks
        self._times = times
        self._request_id = request_id
        self._form = form or StreamForm()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream. Raises Cancelled if the client leaves, the generation's error after it
        has been sent."""
        try:
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )
            output = _Output(send, self._times.keep_alive_s, self._form.keep_alive)
            failure = await _race(self._send_all(output), output.keep_alive(), _gone(receive))
        finally:
            await _close(self._opening)
        if failure is not None:
            raise failure

    async def _send_all(self, output: "_Output") -> Exception | None:
        failure = None
        try:
            async with aclosing(self._chunks(await self._opening)) as chunks:
                async for chunk in chunks:
                    await output.send(chunk)
        except Cancelled:
            raise
        except Exception as error:  # the request's edge: sent in the stream; logged if not ours
            failure = errors.as_cantata_error(error, self._request_id)
            await output.send(self._form.failed(failure))
        await output.send(self._form.end)
        await output.send(b"", more=False)
        return failure


class _Output:
    """The body of a stream, and a comment after each silence.

    Args:
        keep_alive_s: the longest silence, in seconds.
        comment: what is sent then.
    """

    def __init__(self, send: Send, keep_alive_s: float, comment: bytes = KEEP_ALIVE) -> None:
        self._send = send
        self._comment = comment
        self._keep_alive_s = keep_alive_s
        self._now_s = asyncio.get_running_loop().time
        self._last_s = self._now_s()
        self._is_sending = False

    async def send(self, data: bytes, *, more: bool = True) -> None:
        """Send a part of the body. Raises Cancelled if the client has left."""
        self._is_sending = True
        try:
            await self._send({"type": "http.response.body", "body": data, "more_body": more})
        except OSError as error:
            raise Cancelled("The client left.") from error
        self._is_sending = False
        self._last_s = self._now_s()

    async def keep_alive(self) -> None:
        """Send comments until cancelled. Raises Cancelled if the client has left."""
        while True:
            last_s = self._last_s
            # A client that takes nothing gets no comments on top.
            rest_s = 0.0 if self._is_sending else self._now_s() - last_s
            await asyncio.sleep(self._keep_alive_s - rest_s)
            if self._last_s == last_s and not self._is_sending:
                await self.send(self._comment)
