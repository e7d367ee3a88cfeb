"""Lists of items, a page at a time."""

from typing import Any, Literal

from fastapi import Request
from typing_extensions import TypedDict

from cluster.frontend.responses.answers import OutputItem
from cluster.frontend.responses.views import Json
from cluster.state.rows import Page, PageQuery
from workers.errors import InvalidRequest

MAX_LIMIT = 100
PARAMETERS = [
    {
        "name": "limit",
        "in": "query",
        "description": "Number of items of a page.",
        "schema": {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": 20},
    },
    {
        "name": "order",
        "in": "query",
        "description": "desc: newest first.",
        "schema": {"type": "string", "enum": ["asc", "desc"], "default": "desc"},
    },
    {
        "name": "after",
        "in": "query",
        "description": "Id of the item before the page.",
        "schema": {"type": "string"},
    },
]
"""The query's parameters, for the OpenAPI document."""


class ItemList(TypedDict):
    """A page of items."""

    object: Literal["list"]
    data: list[OutputItem]
    first_id: str | None
    last_id: str | None
    has_more: bool


def page_query(request: Request) -> PageQuery:
    """Return the page that a request's query asks for.

    Raises:
        InvalidRequest: a parameter is wrong.
    """
    query = request.query_params
    limit, order = query.get("limit", "20"), query.get("order", "desc")
    if not (limit.isascii() and limit.isdigit() and len(limit) <= 3 and 1 <= int(limit) <= MAX_LIMIT):
        raise InvalidRequest(f"limit must be a number from 1 to {MAX_LIMIT}.", "limit")
    if order not in ("asc", "desc"):
        raise InvalidRequest("order must be 'asc' or 'desc'.", "order")
    return PageQuery(int(limit), query.get("after") or None, newest_first=order == "desc")


def page_body(page: Page) -> Json:
    """Return a page as the API shows it."""
    data: list[dict[str, Any]] = [item.body for item in page.items]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": page.has_more,
    }
