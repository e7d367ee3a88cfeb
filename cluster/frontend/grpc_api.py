"""The public gRPC API over a GenerationService: `cantata.inference.v1.Inference`, health and
reflection."""

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, TypeVar

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from cluster.config import GatewayConfig
from cluster.frontend.edge import is_known_key
from cluster.frontend.errors import Unauthenticated, as_cantata_error
from cluster.frontend.grpc_handlers import add_InferenceServicer_to_server, decoded
from cluster.frontend.grpc_messages import ChatEvents, chat_request, chat_response
from cluster.frontend.grpc_reflection import add_reflection
from cluster.frontend.grpc_size import check_size
from cluster.generation import ChatRequest, GenerationService
from cluster.generation.limits import check_num_messages
from cluster.rpc import inference_pb2 as pb
from cluster.rpc import inference_pb2_grpc
from workers.errors import CantataError
from workers.grammars.grammar import is_gbnf
from workers.rpc.convert import error_to_metadata
from workers.rpc.decode_errors import DecodeErrors

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[object, object]

T = TypeVar("T")

_log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 32 * 2**20
SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Inference"].full_name
_HEALTH_PERIOD_S = 1.0
_INLINE_BYTES = 64 * 1024


class InferenceApi:
    """The API in terms of its messages, without a server: errors are raised as CantataError."""

    def __init__(self, service: GenerationService, max_messages: int) -> None:
        self._service = service
        self._max_messages = max_messages

    async def chat(self, request: pb.ChatRequest, request_id: str | None = None) -> pb.ChatResponse:
        """Return a whole answer."""
        generation = await self._service.chat(await self._asked(request), request_id)
        try:
            return await chat_response(generation, request, self._service.served.info.fingerprint)
        finally:
            await generation.aclose()

    async def chat_stream(
        self, request: pb.ChatRequest, request_id: str | None = None
    ) -> AsyncGenerator[pb.ChatEvent, None]:
        """Yield deltas, one Finish per choice, then Usage. Closing the iterator cancels the
        engines' work."""
        generation = await self._service.chat(await self._asked(request), request_id)
        try:
            messages = ChatEvents(generation, request, self._service.served.info.fingerprint)
            async for event in generation:
                message = messages.add(event)
                if message is not None:
                    yield message
        finally:
            await generation.aclose()

    async def _asked(self, request: pb.ChatRequest) -> ChatRequest:
        """Convert a request; large ones, and those with GBNF, in a thread."""
        check_num_messages(
            len(request.messages) + sum(len(message.tool_calls) for message in request.messages),
            self._max_messages,
        )
        has_gbnf = is_gbnf(request.structured_outputs.grammar)
        if request.ByteSize() <= _INLINE_BYTES and not has_gbnf:
            return chat_request(request)
        return await asyncio.to_thread(chat_request, request)

    def list_models(self) -> pb.ListModelsResponse:
        """List the served model under each of its names."""
        model = self._service.served.info
        return pb.ListModelsResponse(
            models=[pb.Model(id=name, max_model_len=model.max_model_len) for name in model.names]
        )


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """The API on a grpc.aio server: checks keys, decodes messages, turns errors into statuses,
    counts requests.

    Args:
        config: its API keys and limits. If there are keys, a call needs one in the metadata
            `authorization: Bearer …`.
    """

    def __init__(self, service: GenerationService, config: GatewayConfig) -> None:
        self._api = InferenceApi(service, config.max_messages)
        self._requests = service.metrics.requests
        self._api_keys = config.api_keys
        self._send_timeout_s = config.send_timeout_s
        self._stream_headers_s = config.stream_headers_s
        self._max_messages, self._max_fields = config.max_messages, config.max_json_values

    async def Chat(self, request: bytes | pb.ChatRequest, context: "Context") -> pb.ChatResponse:
        """See inference.proto."""
        return await self._answer(
            "Chat", context, lambda request_id: self._api.chat(self._decoded_chat(request), request_id)
        )

    async def ChatStream(self, request: bytes | pb.ChatRequest, context: "Context") -> None:  # type: ignore[override]
        """See inference.proto."""

        # Written here instead of yielded to grpc, which would leave a generator unclosed when the
        # client leaves while it sends.
        async def write_events(request_id: str) -> None:
            async with aclosing(self._api.chat_stream(self._decoded_chat(request), request_id)) as events:
                event = await self._first(events, context)
                while event is not None:
                    await self._write(event, context, request_id)
                    event = await anext(events, None)

        await self._answer("ChatStream", context, write_events)

    async def _first(
        self, events: AsyncGenerator[pb.ChatEvent, None], context: "Context"
    ) -> pb.ChatEvent | None:
        """Return a stream's first message. If it takes long, send the initial metadata
        meanwhile."""

        async def first() -> pb.ChatEvent | None:
            return await anext(events, None)

        waiting = asyncio.create_task(first())
        try:
            done, _ = await asyncio.wait({waiting}, timeout=self._stream_headers_s)
            if not done:
                await context.send_initial_metadata(())
            return await waiting
        finally:
            if not waiting.done():
                waiting.cancel()
                await asyncio.wait({waiting})

    async def _write(self, event: pb.ChatEvent, context: "Context", request_id: str) -> None:
        try:
            async with asyncio.timeout(self._send_timeout_s):
                await context.write(event)
        except TimeoutError:
            _log.info(
                "request %s: the client has taken nothing for %g s and is cut off",
                request_id,
                self._send_timeout_s,
            )
            # A status would wait for unread output to go; a call whose servicer is cancelled is
            # reset.
            raise asyncio.CancelledError from None

    async def ListModels(
        self, request: bytes | pb.ListModelsRequest, context: "Context"
    ) -> pb.ListModelsResponse:
        """See inference.proto."""

        async def models(_: str) -> pb.ListModelsResponse:
            decoded(request, pb.ListModelsRequest)
            return self._api.list_models()

        return await self._answer("ListModels", context, models)

    async def _answer(self, method: str, context: "Context", work: Callable[[str], Awaitable[T]]) -> T:
        request_id = uuid.uuid4().hex
        status = "CANCELLED"
        try:
            self._check_key(context)
            answer = await work(request_id)
            status = "OK"
            return answer
        except Exception as error:  # the request's edge
            failure = as_cantata_error(error, request_id)
            status = failure.status
            await _abort(context, failure)
            raise
        finally:
            self._requests.labels(f"Inference/{method}", status).inc()

    def _decoded_chat(self, request: bytes | pb.ChatRequest) -> pb.ChatRequest:
        if isinstance(request, bytes):
            check_size(request, max_messages=self._max_messages, max_fields=self._max_fields)
        return decoded(request, pb.ChatRequest)

    def _check_key(self, context: "Context") -> None:
        if not self._api_keys:
            return
        found = False
        for name, value in context.invocation_metadata() or ():
            scheme, _, key = str(value).partition(" ")
            if name == "authorization" and scheme.lower() == "bearer" and key.strip():
                if is_known_key(key.strip(), self._api_keys):
                    return
                found = True
        if found:
            raise Unauthenticated("Incorrect API key provided.")
        raise Unauthenticated("Send an API key of this server in the metadata authorization: Bearer KEY.")


async def _abort(context: "Context", error: CantataError) -> None:
    await context.abort(grpc.StatusCode[error.status], error.message, error_to_metadata(error))


class GrpcServer:
    """A running server.

    Attributes:
        address: `host:port` to which it is bound.
    """

    def __init__(self, server: grpc.aio.Server, address: str, health_watch: "asyncio.Task[None]") -> None:
        self._server = server
        self.address = address
        self._health_watch = health_watch

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls; running calls have `grace_s` seconds to end, then they are
        cancelled."""
        self._health_watch.cancel()
        await asyncio.gather(self._health_watch, return_exceptions=True)
        await self._server.stop(grace_s)


async def start_grpc_server(
    service: GenerationService, ready: Callable[[], Awaitable[bool]], address: str, config: GatewayConfig
) -> GrpcServer:
    """Serve the public API, health and reflection.

    Args:
        ready: returns whether a replica takes requests.
        address: `host:port`; port 0 takes a free one.
    Raises:
        OSError: the address cannot be bound.
    """
    server = grpc.aio.server(
        interceptors=(
            DecodeErrors(lambda method: service.metrics.requests.labels(method, "INVALID_ARGUMENT").inc()),
        ),
        options=(
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.so_reuseport", 0),
        ),
    )
    add_InferenceServicer_to_server(InferenceServicer(service, config), server)
    health_servicer = health.aio.HealthServicer()  # type: ignore[attr-defined]
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    add_reflection(server)
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise OSError(f"{address} cannot be bound: {error}") from error
    await server.start()
    watch = asyncio.create_task(_watch_health(ready, health_servicer.set))
    return GrpcServer(server, f"{address.rpartition(':')[0]}:{port}", watch)


async def _watch_health(
    ready: Callable[[], Awaitable[bool]], set_status: Callable[[str, int], Awaitable[None]]
) -> None:
    """Keep the health statuses current: the server as a whole is up; the Inference service is
    serving while a replica answers."""
    await set_status("", health_pb2.HealthCheckResponse.SERVING)
    while True:
        status = (
            health_pb2.HealthCheckResponse.SERVING
            if await ready()
            else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        await set_status(SERVICE_NAME, status)
        await asyncio.sleep(_HEALTH_PERIOD_S)
