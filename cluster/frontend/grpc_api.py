"""The public gRPC API over a GenerationService: `cantata.inference.v1.Inference`, health and
reflection."""

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, TypeVar

import grpc.aio
from google.protobuf import struct_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cluster.config import GatewayConfig
from cluster.events import (
    ChoiceDelta,
    ChoiceFinish,
    FinishReason,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)
from cluster.frontend.edge import is_known_key
from cluster.frontend.errors import Unauthenticated, as_cantata_error
from cluster.frontend.grpc_handlers import DecodeErrors, add_InferenceServicer_to_server, decoded
from cluster.generation import ChatRequest, FieldNames, Generation, GenerationService
from cluster.generation.requests import check_num_messages
from cluster.harmony.conversation import ChatMessage, ReasoningEffort, Role, ToolCall, ToolDefinition
from cluster.rpc import inference_pb2 as pb
from cluster.rpc import inference_pb2_grpc
from workers.errors import CantataError, InvalidRequest
from workers.request import SamplingParams
from workers.rpc.convert import error_to_metadata

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[object, object]

T = TypeVar("T")

_log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 32 * 2**20
SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Inference"].full_name
_HEALTH_PERIOD_S = 1.0
_INLINE_BYTES = 64 * 1024

_ROLES: dict[int, Role] = {
    pb.ROLE_SYSTEM: "system",
    pb.ROLE_DEVELOPER: "developer",
    pb.ROLE_USER: "user",
    pb.ROLE_ASSISTANT: "assistant",
    pb.ROLE_TOOL: "tool",
}
_EFFORTS: dict[int, ReasoningEffort | None] = {
    pb.REASONING_EFFORT_UNSPECIFIED: None,
    pb.REASONING_EFFORT_LOW: "low",
    pb.REASONING_EFFORT_MEDIUM: "medium",
    pb.REASONING_EFFORT_HIGH: "high",
}
_FINISH: dict[FinishReason, pb.FinishReason.ValueType] = {
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "tool_calls": pb.FINISH_REASON_TOOL_CALLS,
}


class InferenceApi:
    """The API in terms of its messages, without a server: errors are raised as CantataError."""

    def __init__(self, service: GenerationService, max_messages: int) -> None:
        self._service = service
        self._max_messages = max_messages

    async def chat(self, request: pb.ChatRequest, request_id: str | None = None) -> pb.ChatResponse:
        """A whole answer."""
        generation = await self._service.chat(await self._asked(request), request_id)
        try:
            return await _response(generation, request)
        finally:
            await generation.aclose()

    async def chat_stream(
        self, request: pb.ChatRequest, request_id: str | None = None
    ) -> AsyncGenerator[pb.ChatEvent, None]:
        """Deltas, one Finish per choice, then Usage. Closing the iterator cancels the engines'
        work."""
        generation = await self._service.chat(await self._asked(request), request_id)
        try:
            async for event in generation:
                yield _event(generation.id, event)
        finally:
            await generation.aclose()

    async def _asked(self, request: pb.ChatRequest) -> ChatRequest:
        """Large requests are converted in a thread."""
        check_num_messages(
            len(request.messages) + sum(len(message.tool_calls) for message in request.messages),
            self._max_messages,
        )
        if request.ByteSize() <= _INLINE_BYTES:
            return chat_request(request)
        return await asyncio.to_thread(chat_request, request)

    def list_models(self) -> pb.ListModelsResponse:
        """What is served."""
        return pb.ListModelsResponse(
            models=[
                pb.Model(id=model.id, max_model_len=model.max_model_len) for model in self._service.models()
            ]
        )


def chat_request(request: pb.ChatRequest) -> ChatRequest:
    """What the service is asked. Fields are named in errors as the HTTP API spells them.

    Raises:
        InvalidRequest: a role, effort or schema that is none.
    """
    if request.reasoning_effort not in _EFFORTS:
        raise InvalidRequest("reasoning_effort must be LOW, MEDIUM or HIGH.", "reasoning_effort")
    return ChatRequest(
        messages=tuple(
            _message(message, f"messages[{index}]") for index, message in enumerate(request.messages)
        ),
        sampling=_sampling(request),
        tools=tuple(_tool(tool) for tool in request.tools),
        stop=tuple(request.stop),
        reasoning_effort=_EFFORTS[request.reasoning_effort],
        model=request.model or None,
        names=FieldNames(logprobs="top_logprobs"),
    )


def _message(message: pb.Message, path: str) -> ChatMessage:
    if message.role not in _ROLES:
        raise InvalidRequest(
            f"{path}.role must be SYSTEM, DEVELOPER, USER, ASSISTANT or TOOL.", f"{path}.role"
        )
    role = _ROLES[message.role]
    return ChatMessage(
        role=role,
        content=message.content,
        reasoning=(message.reasoning or None) if role == "assistant" else None,
        tool_calls=tuple(ToolCall(call.id, call.name, call.arguments) for call in message.tool_calls),
        tool_call_id=message.tool_call_id or None,
    )


def _tool(tool: pb.Tool) -> ToolDefinition:
    return ToolDefinition(
        tool.name, tool.description, _plain_object(tool.parameters) if tool.HasField("parameters") else None
    )


def _plain_object(struct: struct_pb2.Struct) -> dict[str, object]:
    # A Struct has no order; sorted, the same tools give the same prompt in every process, and so
    # the same cached prefix.
    return {name: _plain(struct.fields[name]) for name in sorted(struct.fields)}


def _plain(value: struct_pb2.Value) -> object:
    """As JSON would have been read: a Struct knows only floating-point numbers, and whole ones are
    integers."""
    match value.WhichOneof("kind"):
        case "number_value":
            return int(value.number_value) if value.number_value.is_integer() else value.number_value
        case "string_value":
            return value.string_value
        case "bool_value":
            return value.bool_value
        case "struct_value":
            return _plain_object(value.struct_value)
        case "list_value":
            return [_plain(entry) for entry in value.list_value.values]
        case _:
            return None


def _sampling(request: pb.ChatRequest) -> SamplingParams:
    default = SamplingParams()
    return SamplingParams(
        max_tokens=request.max_tokens if request.HasField("max_tokens") else None,
        temperature=request.temperature if request.HasField("temperature") else default.temperature,
        top_p=request.top_p if request.HasField("top_p") else default.top_p,
        top_k=request.top_k if request.HasField("top_k") else default.top_k,
        min_p=request.min_p if request.HasField("min_p") else default.min_p,
        presence_penalty=request.presence_penalty
        if request.HasField("presence_penalty")
        else default.presence_penalty,
        frequency_penalty=request.frequency_penalty
        if request.HasField("frequency_penalty")
        else default.frequency_penalty,
        repetition_penalty=request.repetition_penalty
        if request.HasField("repetition_penalty")
        else default.repetition_penalty,
        logit_bias=tuple(sorted(request.logit_bias.items())),
        seed=request.seed if request.HasField("seed") else None,
        logprobs=request.top_logprobs if request.HasField("top_logprobs") else None,
        stop_token_ids=tuple(request.stop_token_ids),
        min_tokens=request.min_tokens if request.HasField("min_tokens") else default.min_tokens,
        ignore_eos=request.ignore_eos if request.HasField("ignore_eos") else default.ignore_eos,
        n=request.n if request.HasField("n") else default.n,
    )


async def _response(generation: Generation, request: pb.ChatRequest) -> pb.ChatResponse:
    response = pb.ChatResponse(
        id=generation.id, model=generation.model, created_unix_s=generation.created_unix_s
    )
    texts: list[tuple[list[str], list[str]]] = []
    arguments: list[list[list[str]]] = []
    for index in range(request.n if request.HasField("n") else 1):
        response.choices.add(index=index).message.role = pb.ROLE_ASSISTANT
        texts.append(([], []))
        arguments.append([])
    async for event in generation:
        if isinstance(event, Usage):
            response.usage.CopyFrom(_usage(event))
            continue
        choice = response.choices[event.choice]
        choice.logprobs.extend(map(_logprob, event.logprobs))
        if isinstance(event, ChoiceFinish):
            choice.finish_reason = _FINISH[event.reason]
            continue
        match event.delta:
            case TextDelta(text):
                texts[event.choice][0].append(text)
            case ReasoningDelta(text):
                texts[event.choice][1].append(text)
            case ToolCallDelta() as delta:
                if delta.name is not None:
                    choice.message.tool_calls.add(id=delta.id or "", name=delta.name)
                    arguments[event.choice].append([])
                arguments[event.choice][delta.call_index].append(delta.arguments)
    for choice, (content, reasoning), calls in zip(response.choices, texts, arguments, strict=True):
        choice.message.content = "".join(content)
        choice.message.reasoning = "".join(reasoning)
        for call, pieces in zip(choice.message.tool_calls, calls, strict=True):
            call.arguments = "".join(pieces)
    return response


def _event(id: str, event: ChoiceDelta | ChoiceFinish | Usage) -> pb.ChatEvent:
    match event:
        case Usage():
            return pb.ChatEvent(id=id, usage=_usage(event))
        case ChoiceFinish():
            return pb.ChatEvent(id=id, choice=event.choice, finish=pb.Finish(reason=_FINISH[event.reason]))
    match event.delta:
        case TextDelta(text):
            return pb.ChatEvent(
                id=id,
                choice=event.choice,
                text=pb.TextDelta(text=text, logprobs=map(_logprob, event.logprobs)),
            )
        case ReasoningDelta(text):
            return pb.ChatEvent(id=id, choice=event.choice, reasoning=pb.ReasoningDelta(text=text))
        case ToolCallDelta() as delta:
            call = pb.ToolCallDelta(
                call_index=delta.call_index,
                id=delta.id or "",
                name=delta.name or "",
                arguments=delta.arguments,
            )
            return pb.ChatEvent(id=id, choice=event.choice, tool_call=call)


def _usage(usage: Usage) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
        reasoning_tokens=usage.reasoning_tokens,
    )


def _logprob(entry: TokenLogprob) -> pb.TokenLogprob:
    return pb.TokenLogprob(
        token=entry.chosen.token_bytes,
        token_id=entry.chosen.token_id,
        logprob=entry.chosen.logprob,
        top=[
            pb.TokenLogprob.Candidate(
                token=candidate.token_bytes, token_id=candidate.token_id, logprob=candidate.logprob
            )
            for candidate in entry.top
        ],
    )


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """The API on a grpc.aio server: checks keys, decodes messages, turns errors into statuses,
    counts requests.

    Args:
        config: its keys, of which a call needs one in the metadata `authorization: Bearer …` if
            there are any, and its limits.
    """

    def __init__(self, service: GenerationService, config: GatewayConfig) -> None:
        self._api = InferenceApi(service, config.max_messages)
        self._requests = service.metrics.requests
        self._api_keys = config.api_keys
        self._send_timeout_s = config.send_timeout_s

    async def Chat(self, request: bytes | pb.ChatRequest, context: "Context") -> pb.ChatResponse:
        """See inference.proto."""
        return await self._answer(
            "Chat", context, lambda request_id: self._api.chat(decoded(request, pb.ChatRequest), request_id)
        )

    async def ChatStream(self, request: bytes | pb.ChatRequest, context: "Context") -> None:  # type: ignore[override]
        """See inference.proto."""

        # Written here instead of yielded to grpc, which would leave a generator unclosed when the
        # client leaves while it sends.
        async def write_events(request_id: str) -> None:
            async with aclosing(
                self._api.chat_stream(decoded(request, pb.ChatRequest), request_id)
            ) as events:
                async for event in events:
                    try:
                        async with asyncio.timeout(self._send_timeout_s):
                            await context.write(event)
                    except TimeoutError:
                        _log.info(
                            "request %s: the client has taken nothing for %g s and is cut off",
                            request_id,
                            self._send_timeout_s,
                        )
                        # A status would wait behind what is not read; a call whose servicer is
                        # cancelled is reset.
                        raise asyncio.CancelledError from None

        await self._answer("ChatStream", context, write_events)

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

    def _check_key(self, context: "Context") -> None:
        if not self._api_keys:
            return
        for name, value in context.invocation_metadata() or ():
            scheme, _, key = str(value).partition(" ")
            if (
                name == "authorization"
                and scheme.lower() == "bearer"
                and is_known_key(key.strip(), self._api_keys)
            ):
                return
        raise Unauthenticated("Send an API key of this server in the metadata authorization: Bearer KEY.")


async def _abort(context: "Context", error: CantataError) -> None:
    await context.abort(grpc.StatusCode[error.status], error.message, error_to_metadata(error))


class GrpcServer:
    """A running server.

    Attributes:
        address: `host:port` it is bound to.
    """

    def __init__(self, server: grpc.aio.Server, address: str, health_watch: "asyncio.Task[None]") -> None:
        self._server = server
        self.address = address
        self._health_watch = health_watch

    async def stop(self, grace_s: float) -> None:
        """Take no more calls; those that run have `grace_s` seconds to end, then they are
        cancelled."""
        self._health_watch.cancel()
        await asyncio.gather(self._health_watch, return_exceptions=True)
        await self._server.stop(grace_s)


async def start_grpc_server(service: GenerationService, address: str, config: GatewayConfig) -> GrpcServer:
    """Serve the public API, health and reflection.

    Args:
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
    reflection.enable_server_reflection((SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise OSError(f"{address} cannot be bound: {error}") from error
    await server.start()
    watch = asyncio.create_task(_watch_health(service, health_servicer.set))
    return GrpcServer(server, f"{address.rpartition(':')[0]}:{port}", watch)


async def _watch_health(
    service: GenerationService, set_status: Callable[[str, int], Awaitable[None]]
) -> None:
    """The server as a whole is up; the Inference service is serving while a replica answers."""
    await set_status("", health_pb2.HealthCheckResponse.SERVING)
    while True:
        ready = await service.ready()
        status = (
            health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        await set_status(SERVICE_NAME, status)
        await asyncio.sleep(_HEALTH_PERIOD_S)
