"""Stored responses: `GET`, `DELETE` and the list of input items."""

from typing import Literal

import orjson
from fastapi import FastAPI, Request, Response
from typing_extensions import TypedDict

from cluster.frontend.openapi import Schemas
from cluster.frontend.responses import answers
from cluster.frontend.responses.background import BackgroundRuns
from cluster.frontend.responses.pages import PARAMETERS, ItemList, page_body, page_query
from cluster.frontend.responses.replay import record_of
from cluster.frontend.responses.routes import ResponsesApi, stored_stream
from cluster.frontend.responses.views import Json
from cluster.state.responses import UNFINISHED, Responses, StoredResponse
from cluster.state.state import State
from workers.errors import InvalidRequest

_PARAMETERS = [
    {
        "name": "stream",
        "in": "query",
        "description": "The events of a background response instead.",
        "schema": {"type": "boolean"},
    },
    {
        "name": "starting_after",
        "in": "query",
        "description": "With stream: only the events after the one with this sequence number.",
        "schema": {"type": "integer", "minimum": 0},
    },
]


class DeletedResponse(TypedDict):
    id: str
    object: Literal["response"]
    deleted: bool


def stored_responses(state: State | None) -> Responses:
    """Return the stored responses.

    Raises:
        InvalidRequest: this server stores none.
    """
    if state is None:
        raise InvalidRequest("This server stores no responses: its state is off (state.url).")
    return state.responses


def add_stored(app: FastAPI, api: ResponsesApi, schemas: Schemas, runs: BackgroundRuns | None) -> None:
    """Add the routes.

    Args:
        runs: makes background responses; None: there are none.
    """
    state = api.state
    one = "/v1/responses/{response_id}"

    @app.get(
        one,
        openapi_extra=schemas.describe(None, answers.ResponseBody, stream=answers.ResponseEventBody)
        | {"parameters": _PARAMETERS},
    )
    async def get_response(request: Request, response_id: str) -> Response:
        """A stored response; of a background response also its events, from any of them on."""
        responses = stored_responses(state)
        starting_after = _starting_after(request)
        if runs is not None and request.query_params.get("stream") == "true":
            return await stored_stream(request, api, runs, response_id, starting_after)
        return _json(_shown(await responses.get(response_id, request.state.owner)))

    @app.post(f"{one}/cancel", openapi_extra=schemas.describe(None, answers.ResponseBody))
    async def cancel_response(request: Request, response_id: str) -> Response:
        """End a background response; one that has ended is answered as it is."""
        responses, owner = stored_responses(state), request.state.owner
        found = await responses.get(response_id, owner)
        if runs is None or "reader" not in found.request:
            raise InvalidRequest("Only a response that was created with background: true can be cancelled.")
        if found.status in UNFINISHED:
            await runs.cancel(response_id, owner)
            found = await responses.get(response_id, owner)
        return _json(_shown(found))

    @app.delete(one, openapi_extra=schemas.describe(None, DeletedResponse))
    async def delete_response(request: Request, response_id: str) -> Response:
        """Delete a stored response. Responses that continue it cannot be continued any more."""
        await stored_responses(state).delete(response_id, request.state.owner)
        deleted: DeletedResponse = {"id": response_id, "object": "response", "deleted": True}
        return _json(deleted)

    @app.get(
        f"{one}/input_items",
        openapi_extra=schemas.describe(None, ItemList) | {"parameters": PARAMETERS},
    )
    async def list_input_items(request: Request, response_id: str) -> Response:
        """A page of the items of a stored response's own input."""
        query, owner = page_query(request), request.state.owner
        return _json(page_body(await stored_responses(state).input_items(response_id, owner, query)))


def _starting_after(request: Request) -> int | None:
    text = request.query_params.get("starting_after")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 12):
        raise InvalidRequest("starting_after must be the sequence number of an event.", "starting_after")
    return int(text)


def _shown(found: StoredResponse) -> Json:
    """Return the Response object; while there is none yet, one without output."""
    if found.body is not None:
        return found.body
    return record_of(found.request).response(found.status)


def _json(value: object) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
