"""Answers of a gRPC server to messages that cannot be decoded. Without these, gRPC answers UNKNOWN
with the name of a Python class, and logs a traceback."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc.aio
from google.protobuf.message import DecodeError

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[object, object]

_log = logging.getLogger(__name__)


class DecodeErrors(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic for type checkers only
    """Answers INVALID_ARGUMENT to undecodable messages, with one line in the log, for servicers
    whose messages gRPC decodes.

    Args:
        count: called with the method (`Health/Check`) of each such call.
    """

    def __init__(self, count: Callable[[str], None]) -> None:
        self._count = count

    async def intercept_service(
        self,
        continuation: Callable[[Any], Awaitable[Any]],
        handler_call_details: Any,
    ) -> Any:
        """Return the method's handler with a decoder that does not raise."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_deserializer is None:
            return handler
        service, _, method = handler_call_details.method.rpartition("/")
        name = f"{service.rpartition('.')[2]}/{method}"

        async def check(request: object, context: "Context") -> None:
            if isinstance(request, _Undecodable):
                _log.info("a message to %s cannot be decoded", name)
                self._count(name)
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "The message cannot be decoded.")

        def one(behaviour: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
            async def answer(request: Any, context: "Context") -> Any:
                await check(request, context)
                return await behaviour(request, context)

            return answer

        def many(
            behaviour: Callable[[Any, Any], AsyncIterator[Any]],
        ) -> Callable[[Any, Any], AsyncIterator[Any]]:
            async def checked(requests: AsyncIterator[Any], context: "Context") -> AsyncIterator[Any]:
                async for request in requests:
                    await check(request, context)
                    yield request

            async def answer(requests: AsyncIterator[Any], context: "Context") -> AsyncIterator[Any]:
                async for response in behaviour(checked(requests, context), context):
                    yield response

            return answer

        return handler._replace(
            request_deserializer=_lenient(handler.request_deserializer),
            unary_unary=handler.unary_unary and one(handler.unary_unary),
            unary_stream=handler.unary_stream and one(handler.unary_stream),
            stream_stream=handler.stream_stream and many(handler.stream_stream),
        )


class _Undecodable:
    """Placeholder for a message that could not be decoded."""


def _lenient(deserializer: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def decode(data: bytes) -> Any:
        try:
            return deserializer(data)
        except DecodeError:
            return _Undecodable()

    return decode
