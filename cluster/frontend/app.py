"""The HTTP app: the APIs of OpenAI and Anthropic over a GenerationService."""

import importlib.metadata
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from starlette.routing import Match

from cluster.config import GatewayConfig
from cluster.fleet.status import FleetStatus
from cluster.frontend import answers, body, chat, completions, errors, schema, sse
from cluster.frontend.anthropic.routes import MessagesApi, add_messages
from cluster.frontend.chat_page import PATHS as PAGE_PATHS
from cluster.frontend.chat_page import add_page, refuse_page
from cluster.frontend.continuity import KeptReasoning
from cluster.frontend.docs_page import add_docs
from cluster.frontend.edge import Edge
from cluster.frontend.llama_cpp import add_llama_cpp
from cluster.frontend.models import add_models
from cluster.frontend.openapi import Schemas
from cluster.frontend.rate_limits import LIMIT, REMAINING, RESET, RateLimits
from cluster.frontend.responses.background import BackgroundRuns
from cluster.frontend.responses.compact import add_compact
from cluster.frontend.responses.conversations import ConversationsApi, add_conversations
from cluster.frontend.responses.routes import ResponsesApi, add_responses
from cluster.frontend.responses.stored_routes import add_stored
from cluster.frontend.responses.websocket import add_websocket
from cluster.frontend.tokenize import to_tokenize
from cluster.frontend.unknown_fields import HEADER as IGNORED_FIELDS
from cluster.generation import Generation, GenerationService
from cluster.metrics import CONTENT_TYPE
from cluster.sealing import Sealer, new_secret
from cluster.state.state import State
from workers.errors import NoReplica

_SHOWN_PATH = 100
"""Maximum number of characters of a client's path that an answer repeats."""


def build_app(
    service: GenerationService,
    status: FleetStatus,
    config: GatewayConfig | None = None,
    *,
    state: State | None = None,
    server_has_ids: bool = False,
) -> FastAPI:
    """Build the ASGI app. It owns neither the service nor the state: their creator closes them.

    Args:
        config: its API keys, which health, readiness, metrics, version, docs and the page do not
            require, its limits, whether it has the page, and the web origins whose pages may call
            the API; None: the defaults.
        state: what is remembered between requests; None: nothing.
        server_has_ids: the server gives each request its id in the header `x-request-id`, and puts
            it into the answer, as Ray Serve does.
    """
    config = config or GatewayConfig()
    limits = body.BodyLimits.of(config)
    app = FastAPI(
        title="Cantata",
        description="The APIs of OpenAI and Anthropic for gpt-oss.",
        version=importlib.metadata.version("cantata"),
        openapi_url=None,
        redirect_slashes=False,
    )
    _add_layers(app, service, config, server_has_ids)
    app.add_exception_handler(HTTPException, _refuse_route)
    app.state.state = state
    schemas = Schemas()
    times = sse.StreamTimes(config.stream_headers_s, config.stream_keep_alive_s)
    kept = KeptReasoning(None if state is None else state.continuity, service.metrics)
    _add_generation(app, service, schemas, limits, times, kept)
    sealer = Sealer((config.secret or new_secret()).encode())
    _add_stateful(app, ResponsesApi(service, sealer, limits, times, state), config, schemas)
    add_messages(app, MessagesApi(service, limits, times, sealer, kept), schemas)
    _add_tokens(app, service, schemas, limits)
    add_llama_cpp(app, service, schemas, limits)
    add_models(app, service, schemas)
    _add_status(app, status, schemas)
    _add_probes(app, service, status, schemas)
    add_docs(app)
    if config.page:
        add_page(app)
    else:
        refuse_page(app)

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = schemas.document(app, service.served.info.vocab_size)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def _add_stateful(app: FastAPI, api: ResponsesApi, config: GatewayConfig, schemas: Schemas) -> None:
    """Add what can remember: responses and conversations."""
    runs = None if api.state is None else BackgroundRuns(api, api.state)
    if api.state is not None and runs is not None:
        api.state.employ(runs)
    add_responses(app, api, schemas, runs)
    add_websocket(app, api, config)
    add_compact(app, api, schemas)
    add_stored(app, api, schemas, runs)
    conversations = ConversationsApi(api.state, api.limits, api.service.served.info.max_model_len)
    add_conversations(app, conversations, schemas)


def _add_layers(
    app: FastAPI, service: GenerationService, config: GatewayConfig, server_has_ids: bool
) -> None:
    app.add_middleware(
        Edge,
        metrics=service.metrics,
        api_keys=config.api_keys,
        send_timeout_s=config.send_timeout_s,
        server_has_ids=server_has_ids,
        open_paths=PAGE_PATHS if config.page else frozenset(),
        cors_origins=config.cors_origins,
    )
    app.add_middleware(RateLimits, service=service)
    if config.cors_origins:  # outside the edge, so that a page can read errors too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=("GET", "HEAD", "POST", "DELETE"),
            allow_headers=("*",),
            expose_headers=(
                *("x-request-id", "request-id", "retry-after", IGNORED_FIELDS),
                *(LIMIT, REMAINING, RESET),
            ),
        )


def _add_generation(
    app: FastAPI,
    service: GenerationService,
    schemas: Schemas,
    limits: body.BodyLimits,
    times: sse.StreamTimes,
    kept: KeptReasoning,
) -> None:
    @app.post(
        "/v1/chat/completions",
        openapi_extra=schemas.describe(
            schema.ChatCompletionRequest, answers.ChatCompletion, stream=answers.ChatCompletionChunk
        ),
    )
    async def chat_completions(request: Request) -> Response:
        """Answer a chat."""
        asked, wanted = await body.read(
            request,
            schema.ChatCompletionRequest,
            limits,
            service.served.info.max_model_len,
            chat.chat_request,
        )
        fingerprint = service.served.info.fingerprint
        wanted = await kept.restored(wanted, request.state.owner)
        return await _answer(
            request,
            kept.watched(lambda: service.chat(wanted, request.state.request_id), wanted, request.state.owner),
            lambda generation: chat.answer(generation, asked, fingerprint),
            lambda generation: chat.chunks(generation, asked, fingerprint),
            times if asked.stream else None,
        )

    @app.post(
        "/v1/completions",
        openapi_extra=schemas.describe(
            schema.CompletionRequest, answers.TextCompletion, stream=answers.TextCompletion
        ),
    )
    async def text_completions(request: Request) -> Response:
        """Continue raw prompts."""
        asked, wanted = await body.read(
            request,
            schema.CompletionRequest,
            limits,
            service.served.info.max_model_len,
            lambda body, _: completions.completion_request(body),
        )
        fingerprint = service.served.info.fingerprint
        return await _answer(
            request,
            service.complete(wanted, request.state.request_id),
            lambda generation: completions.answer(generation, asked, fingerprint),
            lambda generation: completions.chunks(generation, asked, fingerprint),
            times if asked.stream else None,
        )


async def _answer(
    request: Request,
    start: Coroutine[Any, Any, Generation],
    whole: Callable[[Generation], Coroutine[Any, Any, object]],
    chunks: Callable[[Generation], AsyncGenerator[bytes, None]],
    times: sse.StreamTimes | None,
) -> Response:
    """Return the answer that a generation gives: a stream of its chunks, or without `times` the
    whole of it."""
    if times is not None:
        return await sse.stream(request, start, chunks, times, request.state.request_id)
    generation = await sse.begin(request, start)
    try:
        return _json(await sse.until_gone(request, whole(generation)))
    finally:
        await generation.aclose()


def _add_tokens(app: FastAPI, service: GenerationService, schemas: Schemas, limits: body.BodyLimits) -> None:
    @app.post("/tokenize", openapi_extra=schemas.describe(schema.TokenizeRequest, answers.TokenizeAnswer))
    async def tokenize(request: Request) -> Response:
        """Token ids of a prompt, or of a chat as the model sees it."""
        asked, wanted = await body.read(
            request, schema.TokenizeRequest, limits, service.served.info.max_model_len, to_tokenize
        )
        service.served.check(asked.model)
        ids = await (
            service.prompts.tokenize(wanted)
            if isinstance(wanted, str)
            else service.prompts.chat(wanted, begins_answer=asked.add_generation_prompt is not False)
        )
        answer: answers.TokenizeAnswer = {
            "count": len(ids),
            "max_model_len": service.served.info.max_model_len,
            "tokens": ids,
            "token_strs": service.prompts.token_texts(ids) if asked.return_token_strs else None,
        }
        return _json(answer)

    @app.post(
        "/detokenize", openapi_extra=schemas.describe(schema.DetokenizeRequest, answers.DetokenizeAnswer)
    )
    async def detokenize(request: Request) -> Response:
        """The text of token ids."""
        asked, tokens = await body.read(
            request,
            schema.DetokenizeRequest,
            limits,
            service.served.info.max_model_len,
            lambda body, _: body.tokens,
        )
        service.served.check(asked.model)
        answer: answers.DetokenizeAnswer = {"prompt": await service.prompts.detokenize(tokens)}
        return _json(answer)


def _add_status(app: FastAPI, status: FleetStatus, schemas: Schemas) -> None:
    version: answers.VersionAnswer = {"version": app.version}

    @app.get(
        "/metrics",
        openapi_extra={
            "responses": {"200": {"description": "Prometheus text.", "content": {"text/plain": {}}}}
        },
    )
    async def metrics() -> Response:
        """Metrics of this gateway and of the engines it knows."""
        return Response(await status.metrics_text(), headers={"content-type": CONTENT_TYPE})

    @app.get("/version", openapi_extra=schemas.describe(None, answers.VersionAnswer))
    async def get_version() -> Response:
        """Cantata's version."""
        return _json(version)


def _add_probes(app: FastAPI, service: GenerationService, status: FleetStatus, schemas: Schemas) -> None:
    @app.get("/health", openapi_extra=schemas.describe(None, answers.StatusAnswer))
    async def health() -> Response:
        """This process is alive."""
        alive: answers.StatusAnswer = {"status": "ok"}
        return _json(alive)

    @app.get("/ready", openapi_extra=schemas.describe(None, answers.StatusAnswer))
    async def ready() -> Response:
        """Some replica takes requests; 503 until then."""
        if not await status.ready():
            raise NoReplica("No replica answers yet.")
        answer: answers.StatusAnswer = {"status": "ready"}
        return _json(answer)

    @app.get("/load", openapi_extra=schemas.describe(None, answers.LoadAnswer))
    async def load() -> Response:
        """The number of choices that this gateway is generating, as vLLM reports its load."""
        current: answers.LoadAnswer = {"server_load": service.num_in_flight}
        return _json(current)

    @app.get("/ping")
    @app.post("/ping")
    async def ping() -> Response:
        """Some replica takes requests; 503 until then. The body is empty, as SageMaker expects."""
        if not await status.ready():
            raise NoReplica("No replica answers yet.")
        return Response()


def _json(value: object) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")


async def _refuse_route(request: Request, error: Exception) -> Response:
    """Raise routing's own refusals again as ours, for the edge to answer."""
    if isinstance(error, HTTPException) and error.status_code == 405:
        allow = (error.headers or {}).get("Allow", "")
        raise errors.WrongMethod(
            f"{request.method} is not allowed on this path{f': use {allow}' if allow else ''}.", allow
        )
    path = str(request.scope["path"])
    raise errors.UnknownRoute(f"Invalid URL ({request.method} {path[:_SHOWN_PATH]}){_hint(request, path)}")


def _hint(request: Request, path: str) -> str:
    """Return a hint at the path that was probably meant by an unknown one, as the end of a
    sentence."""
    bare = path.rstrip("/")
    for meant in (bare, f"/v1{bare}", bare.removeprefix("/v1")):
        if meant != path and _is_known(request, meant):
            return (
                f": {'the API is under /v1, ' if meant.startswith('/v1') else ''}use {meant[:_SHOWN_PATH]}."
            )
    return "."


def _is_known(request: Request, path: str) -> bool:
    scope = {**request.scope, "path": path}
    return any(route.matches(scope)[0] is not Match.NONE for route in request.app.routes)
