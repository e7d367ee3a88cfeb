"""gRPC handlers whose servicers decode messages themselves, so that they answer for undecodable
ones.

The generated code leaves decoding to gRPC, which answers UNKNOWN with the name of a Python class
and writes a traceback, before any key was checked. Serve's proxies import this module: keep it
light.
"""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import grpc.aio
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health_pb2

from cluster.rpc import inference_pb2 as pb
from workers.errors import InvalidRequest

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[object, object]

Kind = TypeVar("Kind", bound=Message)

_log = logging.getLogger(__name__)


def decoded(data: bytes | Kind, kind: type[Kind]) -> Kind:
    """Return the message; a server without these handlers has decoded it already.

    Raises:
        InvalidRequest: the bytes are no such message.
    """
    if not isinstance(data, bytes):
        return data
    try:
        return kind.FromString(data)
    except DecodeError:
        _log.info("a message cannot be decoded as %s", kind.DESCRIPTOR.full_name)
        raise InvalidRequest(
            f"The message cannot be decoded as {kind.DESCRIPTOR.full_name}: it is truncated, has text that "
            "is not UTF-8, or is nested too deeply (a schema in a Struct can have about 30 levels)."
        ) from None


def add_InferenceServicer_to_server(servicer: object, server: grpc.aio.Server) -> None:
    """Register a servicer that takes bytes; for Serve's `grpc_servicer_functions` too."""
    _add(pb.DESCRIPTOR.services_by_name["Inference"], servicer, server)


def add_HealthServicer_to_server(servicer: object, server: grpc.aio.Server) -> None:
    """Register a servicer of grpc.health.v1.Health that takes bytes."""
    _add(health_pb2.DESCRIPTOR.services_by_name["Health"], servicer, server)


def _add(service: ServiceDescriptor, servicer: object, server: grpc.aio.Server) -> None:
    handlers: dict[str, Any] = {}
    for method in service.methods:
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        make = stream if method.server_streaming else unary
        handlers[method.name] = make(getattr(servicer, method.name), response_serializer=_serialized)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))


def _serialized(message: Message) -> bytes:
    return message.SerializeToString()


class DecodeErrors(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic for type checkers only
    """Answers INVALID_ARGUMENT to undecodable messages for servicers of libraries (health,
    reflection).

    Args:
        count: told the method (`Health/Check`) of each such call.
    """

    def __init__(self, count: Callable[[str], None]) -> None:
        self._count = count

    async def intercept_service(
        self,
        continuation: Callable[[Any], Awaitable[Any]],
        handler_call_details: Any,
    ) -> Any:
        """Return the handler with a decoder that does not raise."""
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
    """Stands for a message that could not be decoded."""


def _lenient(deserializer: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def decode(data: bytes) -> Any:
        try:
            return deserializer(data)
        except DecodeError:
            return _Undecodable()

    return decode
