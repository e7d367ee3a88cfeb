"""gRPC handlers whose servicers decode messages themselves, so that they can answer undecodable
messages.

The generated code leaves decoding to gRPC, which answers UNKNOWN with the name of a Python class
and writes a traceback, before any key was checked. Serve's proxies import this module: keep it
light.
"""

import logging
from typing import Any, TypeVar

import grpc.aio
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health_pb2

from cluster.rpc import inference_pb2 as pb
from workers.errors import InvalidRequest

Kind = TypeVar("Kind", bound=Message)

_log = logging.getLogger(__name__)


class ReceivedHere(bytes):
    """A message that a gRPC server of this process has received. Another process to which it is
    sent gets plain bytes."""

    def __reduce__(self) -> tuple[type[bytes], tuple[bytes]]:
        """Return what pickle makes of it."""
        return bytes, (bytes(self),)


def decoded(data: bytes | Kind, kind: type[Kind]) -> Kind:
    """Return the message; a server without these handlers has already decoded it.

    Raises:
        InvalidRequest: the bytes are not such a message.
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
        handlers[method.name] = make(
            getattr(servicer, method.name), request_deserializer=ReceivedHere, response_serializer=_serialized
        )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))


def _serialized(message: Message) -> bytes:
    return message.SerializeToString()
