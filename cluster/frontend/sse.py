"""Answers over HTTP that end when the client leaves: whole ones and server-sent events."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

import orjson
from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from cluster.frontend import errors
from cluster.generation import Generation
from workers.errors import Cancelled

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"


async def until_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`, which is cancelled at once if the client leaves first. The body
    must have been read.

    Raises:
        Cancelled: the client left.
    """
    return await _race(work, _gone(request.receive))


async def begin(request: Request, start: Coroutine[Any, Any, Generation]) -> Generation:
    """Run `until_gone` for a generation. A generation that began after its client had disconnected
    is closed."""
    worker = asyncio.create_task(start)
    try:
        return await until_gone(request, _result(worker))
    except BaseException:
        worker.cancel()
        await asyncio.wait({worker})
        if not worker.cancelled() and worker.exception() is None:
            await worker.result().aclose()
        raise


async def _result(task: "asyncio.Task[T]") -> T:
    return await task


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _race(work: Coroutine[Any, Any, T], gone: Coroutine[Any, Any, None]) -> T:
    worker, watcher = asyncio.create_task(work), asyncio.create_task(gone)
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            return worker.result()
        raise Cancelled("The client left.")
    finally:
        for task in (worker, watcher):
            task.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)


def event(body: object) -> bytes:
    """Return one server-sent event."""
    return b"data: " + orjson.dumps(body) + b"\n\n"


class EventStream(Response):
    """An answer that sends the chunks of a generation whose first event is there. An error after
    the status becomes an error event; then the stream ends. The generation is closed in every case;
    if the client leaves, at once.

    Args:
        chunks: complete server-sent events; made from `generation`.
    """

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, chunks: AsyncGenerator[bytes, None], request_id: str) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._generation = generation
        self._chunks = chunks
        self._request_id = request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream. Raises Cancelled if the client leaves, the generation's error after it
        has been sent."""
        try:
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )
            failure = await _race(self._send_all(send), _gone(receive))
        finally:
            # First the engines' calls, then the generator over them.
            await self._generation.aclose()
            await self._chunks.aclose()
        if failure is not None:
            raise failure

    async def _send_all(self, send: Send) -> Exception | None:
        failure = None
        try:
            async for chunk in self._chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except Cancelled:
            raise
        except OSError as error:
            raise Cancelled("The client left.") from error
        except Exception as error:  # the request's edge: sent in the stream; logged if not ours
            failure = errors.as_cantata_error(error, self._request_id)
            await send(
                {
                    "type": "http.response.body",
                    "body": b"data: " + errors.body(failure) + b"\n\n",
                    "more_body": True,
                }
            )
        await send({"type": "http.response.body", "body": DONE, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return failure
