"""`/v1/conversations`: conversations and their items."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import orjson
from fastapi import FastAPI, Request, Response
from pydantic import Field
from typing_extensions import TypedDict

from cluster.frontend import body
from cluster.frontend.openapi import Schemas
from cluster.frontend.responses.answers import OutputItem
from cluster.frontend.responses.pages import PARAMETERS, ItemList, page_body, page_query
from cluster.frontend.responses.schema import Metadata
from cluster.frontend.responses.schema_items import Item
from cluster.frontend.responses.stored import new_id, stored_items
from cluster.frontend.schema_base import Body
from cluster.state.conversations import Conversation, Conversations
from cluster.state.rows import Page, PageQuery, StoredItem
from cluster.state.state import State
from workers.errors import InvalidRequest

MAX_ITEMS = 20
"""Items of one request, as OpenAI's API has it."""


class CreateConversation(Body):
    """`POST /v1/conversations`."""

    items: list[Item] | None = Field(default=None, description=f"At most {MAX_ITEMS}.")
    metadata: Metadata | None = None


class UpdateConversation(Body):
    """`POST /v1/conversations/{conversation_id}`."""

    metadata: Metadata | None = Field(description="Replaces what was there; null: nothing.")


class AddItems(Body):
    """`POST /v1/conversations/{conversation_id}/items`."""

    items: list[Item] = Field(description=f"At most {MAX_ITEMS}.")


class ConversationBody(TypedDict):
    id: str
    object: Literal["conversation"]
    created_at: int
    metadata: dict[str, str]


class DeletedConversation(TypedDict):
    id: str
    object: Literal["conversation.deleted"]
    deleted: bool


@dataclass(frozen=True, slots=True)
class ConversationsApi:
    """What the routes of conversations share.

    Attributes:
        max_items: maximum number of entries of an array of a body.
    """

    state: State | None
    limits: body.BodyLimits
    max_items: int

    @property
    def store(self) -> Conversations:
        """Return the stored conversations.

        Raises:
            InvalidRequest: there are none on this server.
        """
        if self.state is None:
            raise InvalidRequest("This server keeps no conversations: its state is off (state.url).")
        return self.state.conversations


def add_conversations(app: FastAPI, api: ConversationsApi, schemas: Schemas) -> None:
    """Add the routes."""
    base = "/v1/conversations"
    one = base + "/{conversation_id}"

    @app.post(base, openapi_extra=schemas.describe(CreateConversation, ConversationBody))
    async def create_conversation(request: Request) -> Response:
        """Begin a conversation."""
        store = api.store
        parsed, items = await body.read(
            request,
            CreateConversation,
            api.limits,
            api.max_items,
            lambda asked, _: _checked(asked.items or ()),
        )
        made = await store.create(new_id("conv"), request.state.owner, parsed.metadata or {}, items)
        return _json(_body(made))

    @app.get(one, openapi_extra=schemas.describe(None, ConversationBody))
    async def get_conversation(request: Request, conversation_id: str) -> Response:
        """One conversation."""
        return _json(_body(await api.store.get(conversation_id, request.state.owner)))

    @app.post(one, openapi_extra=schemas.describe(UpdateConversation, ConversationBody))
    async def update_conversation(request: Request, conversation_id: str) -> Response:
        """Replace a conversation's metadata."""
        store = api.store
        parsed, _ = await body.read(
            request, UpdateConversation, api.limits, api.max_items, lambda asked, _: None
        )
        return _json(_body(await store.update(conversation_id, request.state.owner, parsed.metadata or {})))

    @app.delete(one, openapi_extra=schemas.describe(None, DeletedConversation))
    async def delete_conversation(request: Request, conversation_id: str) -> Response:
        """Delete a conversation and its items."""
        await api.store.delete(conversation_id, request.state.owner)
        deleted: DeletedConversation = {
            "id": conversation_id,
            "object": "conversation.deleted",
            "deleted": True,
        }
        return _json(deleted)

    _add_items(app, api, schemas, f"{one}/items")


def _add_items(app: FastAPI, api: ConversationsApi, schemas: Schemas, path: str) -> None:
    @app.post(path, openapi_extra=schemas.describe(AddItems, ItemList))
    async def add_conversation_items(request: Request, conversation_id: str) -> Response:
        """Append items to a conversation."""
        store = api.store
        _, items = await body.read(
            request, AddItems, api.limits, api.max_items, lambda asked, _: _checked(asked.items)
        )
        await store.add(conversation_id, request.state.owner, items)
        return _json(_list(items))

    @app.get(path, openapi_extra=schemas.describe(None, ItemList) | {"parameters": PARAMETERS})
    async def list_conversation_items(request: Request, conversation_id: str) -> Response:
        """A page of a conversation's items."""
        query: PageQuery = page_query(request)
        return _json(page_body(await api.store.items(conversation_id, request.state.owner, query)))

    @app.get(f"{path}/{{item_id}}", openapi_extra=schemas.describe(None, OutputItem))
    async def get_conversation_item(request: Request, conversation_id: str, item_id: str) -> Response:
        """One item of a conversation."""
        return _json((await api.store.item(conversation_id, request.state.owner, item_id)).body)

    @app.delete(f"{path}/{{item_id}}", openapi_extra=schemas.describe(None, ConversationBody))
    async def delete_conversation_item(request: Request, conversation_id: str, item_id: str) -> Response:
        """Delete one item of a conversation, which is answered."""
        return _json(_body(await api.store.delete_item(conversation_id, request.state.owner, item_id)))


def _checked(items: Sequence[Item]) -> tuple[StoredItem, ...]:
    if len(items) > MAX_ITEMS:
        raise InvalidRequest(f"items has {len(items)} entries; add at most {MAX_ITEMS} at a time.", "items")
    return stored_items(items, "items")


def _list(items: tuple[StoredItem, ...]) -> object:
    return page_body(Page(items, has_more=False))


def _body(conversation: Conversation) -> ConversationBody:
    return {
        "id": conversation.id,
        "object": "conversation",
        "created_at": conversation.created_at,
        "metadata": conversation.metadata,
    }


def _json(value: object) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
