"""`/v1/responses`: responses, whole and in events, the tokens of an input, and compaction."""

import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace

import orjson
from fastapi import FastAPI, Request, Response

from cluster.frontend import body, sse
from cluster.frontend.openapi import Schemas
from cluster.frontend.responses import answers
from cluster.frontend.responses.background import BackgroundRuns
from cluster.frontend.responses.events import ResponseEvents, sse_frame
from cluster.frontend.responses.items import REASONING, Seals
from cluster.frontend.responses.prior import NOTHING_BEFORE, Fields, Prior, repeated, with_prior
from cluster.frontend.responses.request import Asked, asked_prompt, asked_response
from cluster.frontend.responses.saver import Saver
from cluster.frontend.responses.schema import InputTokensRequest, ResponsesRequest
from cluster.frontend.responses.stored_stream import StoredStream
from cluster.frontend.responses.views import Json, ResponseRecord, unix_s
from cluster.generation import Generation, GenerationService
from cluster.generation.threads import INLINE_CHARS
from cluster.sealing import Sealer
from cluster.state.state import State
from workers.grammars.grammar import is_gbnf


@dataclass(frozen=True, slots=True)
class ResponsesApi:
    """What the routes of the Responses API share."""

    service: GenerationService
    sealer: Sealer
    limits: body.BodyLimits
    times: sse.StreamTimes
    state: State | None = None

    def seals(self, owner: str) -> Seals:
        """Return what is sealed for the owner of a request's API key."""
        return Seals(self.sealer, owner)

    async def read(self, request: Request, kind: type[Fields]) -> tuple[Fields, int, Prior]:
        """Return a request's body, with the stored items that it continues before its own; the
        size of all of it in bytes; and what precedes.

        Raises:
            CantataError: see `body.read` and `with_prior`.
        """
        given, num_bytes = await body.read(
            request, kind, self.limits, self.service.served.info.max_model_len, lambda _, num_bytes: num_bytes
        )
        parsed, prior = await self.with_prior(given, num_bytes, owner_of(request))
        return parsed, num_bytes + prior.num_bytes, prior

    async def with_prior(self, given: Fields, num_bytes: int, owner: str) -> tuple[Fields, Prior]:
        """Return a body with what precedes it; see `prior.with_prior`."""
        threads = self.service.prompts.threads
        return await with_prior(given, num_bytes, owner, self.state, threads, self.limits.max_messages)

    async def asked(
        self, asked: ResponsesRequest, num_bytes: int, seals: Seals, prior: Prior = NOTHING_BEFORE
    ) -> Asked:
        """Return what a body asks for, under a new id. Large ones, and those with GBNF, are
        converted in a thread."""
        grammar = asked.structured_outputs.grammar if asked.structured_outputs else None
        if grammar is not None and is_gbnf(grammar):
            num_chars = max(num_bytes, INLINE_CHARS + 1)
        else:
            num_chars = num_bytes
        return await self.service.prompts.threads.run(
            num_chars, lambda: self._asked(asked, num_bytes, seals, prior)
        )

    def _asked(self, asked: ResponsesRequest, num_bytes: int, seals: Seals, prior: Prior) -> Asked:
        made = asked_response(
            asked,
            num_bytes,
            seals,
            id=new_id(),
            created_at=unix_s(),
            model=self.service.served.info.id,
            num_before=prior.num_before,
        )
        again = repeated(prior, store=self.stores(asked), background=bool(asked.background))
        fields = {**made.record.fields, **again}
        return replace(made, record=replace(made.record, fields=fields))

    def stores(self, asked: ResponsesRequest) -> bool:
        """Return whether a response is stored."""
        return self.state is not None and asked.store is not False

    def saver(self, asked: ResponsesRequest, made: Asked, prior: Prior, owner: str) -> Saver | None:
        """Return what stores a response at its end; None if it is not stored."""
        return Saver(self.state, made.record, prior, owner) if self.state and self.stores(asked) else None


def new_id() -> str:
    """Return the id of a new response, which cannot be guessed."""
    return f"resp_{uuid.uuid4().hex}"


def make_events(record: ResponseRecord, seals: Seals) -> ResponseEvents:
    """Return the maker of a new response's events."""
    return ResponseEvents(record, unix_s, lambda text: seals.seal(text, REASONING))


def add_responses(
    app: FastAPI, api: ResponsesApi, schemas: Schemas, runs: BackgroundRuns | None = None
) -> None:
    """Add the routes.

    Args:
        runs: makes background responses; None: there are none.
    """

    @app.post(
        "/v1/responses",
        openapi_extra=schemas.describe(
            ResponsesRequest, answers.ResponseBody, stream=answers.ResponseEventBody
        ),
    )
    async def respond(request: Request) -> Response:
        """Answer with a response: its items, or with `stream` the events by which they are made."""
        owner = owner_of(request)
        seals = api.seals(owner)
        parsed, num_bytes, prior = await api.read(request, ResponsesRequest)
        asked = await api.asked(parsed, num_bytes, seals, prior)
        if parsed.background and runs is not None:
            begun = await runs.begin(asked, prior, parsed, owner)
            if not parsed.stream:
                return _json(begun)
            return await stored_stream(request, api, runs, asked.record.id, None)
        saver = api.saver(parsed, asked, prior, owner)
        if saver is not None:
            await saver.check()
        start = api.service.chat(asked.chat, asked.record.id)
        events = make_events(asked.record, seals)
        if parsed.stream:
            form = sse.StreamForm(failed=lambda error: sse_frame(events.fail(error)))
            return await sse.stream(
                request,
                start,
                lambda generation: _frames(generation, events, saver),
                api.times,
                request.state.request_id,
                form,
            )
        generation = await sse.begin(request, start)
        try:
            return _json(await sse.until_gone(request, _whole(generation, events, saver)))
        finally:
            await generation.aclose()

    _add_input_tokens(app, api, schemas)


def _add_input_tokens(app: FastAPI, api: ResponsesApi, schemas: Schemas) -> None:
    @app.post(
        "/v1/responses/input_tokens",
        openapi_extra=schemas.describe(InputTokensRequest, answers.InputTokensBody),
    )
    async def count_input_tokens(request: Request) -> Response:
        """The number of tokens of the prompt that a request makes."""
        seals = api.seals(owner_of(request))
        parsed, num_bytes, prior = await api.read(request, InputTokensRequest)
        chat = await api.service.prompts.threads.run(
            num_bytes, lambda: asked_prompt(parsed, num_bytes, seals, prior.num_before)
        )
        api.service.served.check(chat.model)
        ids = await api.service.prompts.chat(chat)
        return _json({"object": "response.input_tokens", "input_tokens": len(ids)})


async def stored_stream(
    request: Request, api: ResponsesApi, runs: BackgroundRuns, id: str, starting_after: int | None
) -> Response:
    """Return the stream of a background response; see StoredStream."""
    owner = owner_of(request)
    encoding, seals = api.service.prompts.encoding, api.seals(owner)
    stream = StoredStream(runs.background, runs, encoding, seals, starting_after)
    return await sse.stream(
        request,
        stream.open(id, owner),
        lambda opened: opened.frames(),
        api.times,
        request.state.request_id,
    )


def owner_of(request: Request) -> str:
    """Return the owner of a request's API key."""
    owner: str = getattr(request.state, "owner", "")
    return owner


async def _frames(
    generation: Generation, events: ResponseEvents, saver: Saver | None
) -> AsyncGenerator[bytes, None]:
    yield sse_frame(events.begin())
    async for event in generation:
        if made := events.add(event):
            if saver is not None and events.response is not None:
                made = await saver.saved(events.response, made)
            yield sse_frame(made)


async def _whole(generation: Generation, events: ResponseEvents, saver: Saver | None) -> Json:
    events.begin()
    async for event in generation:
        events.add(event)
    assert events.response is not None
    if saver is not None:
        await saver.save(events.response)
    return events.response


def _json(value: object) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
