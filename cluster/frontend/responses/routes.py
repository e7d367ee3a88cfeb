"""`/v1/responses`: responses, whole and in events, the tokens of an input, and compaction."""

import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass

import orjson
from fastapi import FastAPI, Request, Response

from cluster.frontend import body, sse
from cluster.frontend.openapi import Schemas
from cluster.frontend.responses import answers
from cluster.frontend.responses.events import ResponseEvents, sse_frame
from cluster.frontend.responses.items import REASONING, Seals
from cluster.frontend.responses.request import Asked, asked_prompt, asked_response
from cluster.frontend.responses.schema import InputTokensRequest, ResponsesRequest
from cluster.frontend.responses.views import Json, ResponseRecord
from cluster.generation import Generation, GenerationService
from cluster.sealing import Sealer


@dataclass(frozen=True, slots=True)
class ResponsesApi:
    """What the routes of the Responses API share."""

    service: GenerationService
    sealer: Sealer
    limits: body.BodyLimits
    times: sse.StreamTimes

    def seals(self, owner: str) -> Seals:
        """Return what is sealed for the owner of a request's API key."""
        return Seals(self.sealer, owner)

    def asked(self, asked: ResponsesRequest, num_bytes: int, seals: Seals) -> Asked:
        """Return what a body asks for, under a new id."""
        return asked_response(
            asked, num_bytes, seals, id=new_id(), created_at=unix_s(), model=self.service.served.info.id
        )


def new_id() -> str:
    """Return the id of a new response, which cannot be guessed."""
    return f"resp_{uuid.uuid4().hex}"


def unix_s() -> int:
    """Return the current time in Unix seconds."""
    return int(time.time())


def make_events(record: ResponseRecord, seals: Seals) -> ResponseEvents:
    """Return the maker of a new response's events."""
    return ResponseEvents(record, unix_s, lambda text: seals.seal(text, REASONING))


def add_responses(app: FastAPI, api: ResponsesApi, schemas: Schemas) -> None:
    """Add the routes."""

    @app.post(
        "/v1/responses",
        openapi_extra=schemas.describe(
            ResponsesRequest, answers.ResponseBody, stream=answers.ResponseEventBody
        ),
    )
    async def respond(request: Request) -> Response:
        """Answer with a response: its items, or with `stream` the events by which they are made."""
        seals = api.seals(owner_of(request))
        parsed, asked = await body.read(
            request,
            ResponsesRequest,
            api.limits,
            api.service.served.info.max_model_len,
            lambda parsed, num_bytes: api.asked(parsed, num_bytes, seals),
        )
        start = api.service.chat(asked.chat, asked.record.id)
        events = make_events(asked.record, seals)
        if parsed.stream:
            form = sse.StreamForm(failed=lambda error: sse_frame(events.fail(error)))
            return await sse.stream(
                request,
                start,
                lambda generation: _frames(generation, events),
                api.times,
                request.state.request_id,
                form,
            )
        generation = await sse.begin(request, start)
        try:
            return _json(await sse.until_gone(request, _whole(generation, events)))
        finally:
            await generation.aclose()

    @app.post(
        "/v1/responses/input_tokens",
        openapi_extra=schemas.describe(InputTokensRequest, answers.InputTokensBody),
    )
    async def count_input_tokens(request: Request) -> Response:
        """The number of tokens of the prompt that a request makes."""
        seals = api.seals(owner_of(request))
        _, chat = await body.read(
            request,
            InputTokensRequest,
            api.limits,
            api.service.served.info.max_model_len,
            lambda parsed, num_bytes: asked_prompt(parsed, num_bytes, seals),
        )
        api.service.served.check(chat.model)
        ids = await api.service.prompts.chat(chat)
        return _json({"object": "response.input_tokens", "input_tokens": len(ids)})


def owner_of(request: Request) -> str:
    """Return the owner of a request's API key."""
    owner: str = getattr(request.state, "owner", "")
    return owner


async def _frames(generation: Generation, events: ResponseEvents) -> AsyncGenerator[bytes, None]:
    yield sse_frame(events.begin())
    async for event in generation:
        if made := events.add(event):
            yield sse_frame(made)


async def _whole(generation: Generation, events: ResponseEvents) -> Json:
    events.begin()
    async for event in generation:
        events.add(event)
    assert events.response is not None
    return events.response


def _json(value: object) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
