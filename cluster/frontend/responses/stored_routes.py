"""Stored responses: `GET`, `DELETE` and the list of input items."""

from typing import Literal

import orjson
from fastapi import FastAPI, Request, Response
from typing_extensions import TypedDict

from cluster.frontend.openapi import Schemas
from cluster.frontend.responses import answers
from cluster.frontend.responses.pages import PARAMETERS, ItemList, page_body, page_query
from cluster.state.responses import Responses
from cluster.state.state import State
from workers.errors import InvalidRequest


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


def add_stored(app: FastAPI, state: State | None, schemas: Schemas) -> None:
    """Add the routes."""
    one = "/v1/responses/{response_id}"

    @app.get(one, openapi_extra=schemas.describe(None, answers.ResponseBody))
    async def get_response(request: Request, response_id: str) -> Response:
        """A stored response."""
        found = await stored_responses(state).get(response_id, request.state.owner)
        return _json(found.body)

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


def _json(value: object) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
