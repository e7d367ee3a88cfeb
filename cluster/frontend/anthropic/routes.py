"""Anthropic's Messages API over a GenerationService: `/v1/messages` and the count of its tokens."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass

import orjson
from fastapi import FastAPI, Request, Response

from cluster.frontend import body, sse
from cluster.frontend.anthropic import errors
from cluster.frontend.anthropic.answers import MessageAnswer, MessageEvent, MessagesError, TokensCounted
from cluster.frontend.anthropic.blocks import events, whole_message
from cluster.frontend.anthropic.request import ThinkingShown, chat_request, counted_request
from cluster.frontend.anthropic.schema import CountTokensRequest, MessagesRequest
from cluster.frontend.anthropic.signatures import Signatures
from cluster.frontend.continuity import KeptReasoning
from cluster.frontend.openapi import Schemas
from cluster.generation import ChatRequest, Generation, GenerationService
from cluster.sealing import Sealer
from workers.errors import ContextLengthExceeded


def stream_form(request_id: str) -> sse.StreamForm:
    """Return the events of a stream that are no part of its message."""
    return sse.StreamForm(
        failed=lambda error: b"event: error\ndata: %b\n\n" % errors.body(error, request_id),
        end=b"",
        keep_alive=b'event: ping\ndata: {"type":"ping"}\n\n',
    )


@dataclass(frozen=True, slots=True)
class MessagesApi:
    """What the routes of the Messages API need.

    Attributes:
        sealer: of the signatures of thinking, the same for all gateways.
        kept: reasoning for clients that drop it.
    """

    service: GenerationService
    limits: body.BodyLimits
    times: sse.StreamTimes
    sealer: Sealer
    kept: KeptReasoning


def add_messages(app: FastAPI, api: MessagesApi, schemas: Schemas) -> None:
    """Add the routes of the Messages API."""
    _add_create(app, api, schemas)
    _add_count(app, api, schemas)

    @app.head("/", include_in_schema=False)
    @app.head(errors.PATH, include_in_schema=False)
    async def probe() -> Response:
        """Whether there is a server, which Claude Code asks at its start."""
        return Response()


def _add_create(app: FastAPI, api: MessagesApi, schemas: Schemas) -> None:
    service = api.service

    @app.post(
        errors.PATH,
        openapi_extra=schemas.describe(
            MessagesRequest, MessageAnswer, stream=MessageEvent, error=MessagesError
        ),
    )
    async def create_message(request: Request) -> Response:
        """Answer a conversation, in the form of Anthropic's Messages API."""
        request_id, owner = request.state.request_id, request.state.owner
        signatures = Signatures(api.sealer, owner)
        asked, wanted = await body.read(
            request,
            MessagesRequest,
            api.limits,
            service.served.info.max_model_len,
            lambda body, num_bytes: chat_request(body, num_bytes, signatures),
        )
        shown = ThinkingShown.of(asked)
        wanted = await api.kept.restored(wanted, owner)
        start = api.kept.watched(lambda: _begin(service, wanted, request_id), wanted, owner)
        if asked.stream:

            def chunks(generation: Generation) -> AsyncGenerator[bytes, None]:
                return events(generation, shown, signatures, asked.max_tokens)

            return await sse.stream(request, start, chunks, api.times, request_id, stream_form(request_id))
        generation = await sse.begin(request, start)
        try:
            whole = whole_message(generation, shown, signatures, asked.max_tokens)
            return _json(await sse.until_gone(request, whole))
        finally:
            await generation.aclose()


def _add_count(app: FastAPI, api: MessagesApi, schemas: Schemas) -> None:
    service = api.service

    @app.post(
        f"{errors.PATH}/count_tokens",
        openapi_extra=schemas.describe(CountTokensRequest, TokensCounted, error=MessagesError),
    )
    async def count_tokens(request: Request) -> Response:
        """The number of tokens that a conversation's prompt has."""
        owner = request.state.owner
        signatures = Signatures(api.sealer, owner)
        asked, wanted = await body.read(
            request,
            CountTokensRequest,
            api.limits,
            service.served.info.max_model_len,
            lambda body, num_bytes: counted_request(body, num_bytes, signatures),
        )
        service.served.check(asked.model)
        wanted = await api.kept.restored(wanted, owner, counts=False)
        counted: TokensCounted = {"input_tokens": await service.prompts.count(wanted)}
        return _json(counted)


async def _begin(service: GenerationService, wanted: ChatRequest, request_id: str) -> Generation:
    """Begin a generation; a prompt that is too long is refused with the words and the numbers that
    clients read."""
    try:
        return await service.chat(wanted, request_id)
    except ContextLengthExceeded:
        context = service.served.info.max_model_len
        num_tokens = await service.prompts.count(wanted)
        if num_tokens < context:
            raise
        raise ContextLengthExceeded(
            f"{errors.TOO_LONG}: {num_tokens} tokens > {context - 1} maximum", "messages"
        ) from None


def _json(value: object) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
