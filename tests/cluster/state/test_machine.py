"""The stores against a model of plain dicts, over drawn sequences of accesses by two owners."""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.state.errors import NotStored
from cluster.state.responses import ResponseRecord
from cluster.state.rows import PageQuery, StoredItem
from tests.cluster.state.conftest import Stores, opened
from workers.errors import InvalidRequest

OWNERS = ("one", "two")
NAMES = [f"x{index}" for index in range(6)]
Step = tuple[str, str, str, str | None, int]
KINDS = (
    *("respond", "respond", "respond", "in_conversation", "delete", "history", "input_items"),
    *("create", "add", "update", "drop", "drop_item", "list"),
)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(KINDS),
        st.sampled_from(OWNERS),
        st.sampled_from(NAMES),
        st.one_of(st.none(), st.sampled_from(NAMES)),
        st.integers(0, 3),
    ),
    max_size=40,
)


@dataclass
class Response:
    owner: str
    inputs: list[str]
    outputs: list[str]
    previous: str | None = None
    conversation: tuple[str, int] | None = None


@dataclass
class Conversation:
    owner: str
    metadata: dict[str, str]
    items: dict[int, str] = field(default_factory=dict)  # by place, which is never used again
    end: int = 0

    def add(self, ids: list[str]) -> None:
        if len(set(ids)) < len(ids) or set(ids) & set(self.items.values()):
            raise InvalidRequest("twice")
        self.items |= dict(enumerate(ids, self.end))
        self.end += len(ids)


class Model:
    """What the stores should say."""

    def __init__(self) -> None:
        self.responses: dict[str, Response] = {}
        self.conversations: dict[str, Conversation] = {}

    def of(self, kind: dict[str, Any], id: str, owner: str) -> Any:
        if id not in kind or kind[id].owner != owner:
            raise NotStored(id)
        return kind[id]

    def history(self, id: str, owner: str) -> list[str]:
        found: Response = self.of(self.responses, id, owner)
        own = [*found.inputs, *found.outputs]
        if found.previous is not None:
            return [*self.history(found.previous, owner), *own]
        if found.conversation is not None:
            name, end = found.conversation
            items = self.of(self.conversations, name, owner).items
            return [*(item for place, item in items.items() if place < end), *own]
        return own


@given(steps=STEPS)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_stores_say_what_a_model_says(steps: list[Step], tmp_path_factory: Any) -> None:
    asyncio.run(_compare(steps, tmp_path_factory.mktemp("state")))


async def _compare(steps: list[Step], folder: Path) -> None:
    stores = await opened(f"sqlite:///{folder / 'state.sqlite3'}")
    model = Model()
    try:
        for number, (kind, owner, name, other, size) in enumerate(steps):
            ids = [f"i{number}-{index}" for index in range(size)]
            expected = _answer_of(model, kind, owner, name, other, ids)
            assert await _answer(stores, kind, owner, name, other, ids) == expected, (kind, name)
    finally:
        await stores.database.close()


def _answer_of(model: Model, kind: str, owner: str, name: str, other: str | None, ids: list[str]) -> Any:
    try:
        return _expected(model, kind, owner, name, other, ids)
    except (NotStored, InvalidRequest) as error:
        return type(error)


def _expected(model: Model, kind: str, owner: str, name: str, other: str | None, ids: list[str]) -> Any:
    match kind:
        case "respond" | "in_conversation":
            if name in model.responses:  # ids are drawn once
                return None
            made = Response(owner, ids, [f"{id}-out" for id in ids])
            if kind == "respond" and other is not None:
                model.history(other, owner)
                made.previous = other
            if kind == "in_conversation" and other is not None:
                conversation = model.of(model.conversations, other, owner)
                made.conversation = (other, conversation.end)
                conversation.add([*made.inputs, *made.outputs])
            model.responses[name] = made
            return None
        case "delete":
            model.of(model.responses, name, owner)
            del model.responses[name]
            return None
        case "history":
            return model.history(name, owner)
        case "input_items":
            inputs = model.of(model.responses, name, owner).inputs
            return [*reversed(inputs)][:2], len(inputs) > 2
        case "create":
            if name not in model.conversations:
                model.conversations[name] = made_one = Conversation(owner, {})
                made_one.add(ids)
            return None
        case "add":
            model.of(model.conversations, name, owner).add(ids)
            return None
        case "update":
            model.of(model.conversations, name, owner).metadata = {"n": str(len(ids))}
            return {"n": str(len(ids))}
        case "drop":
            model.of(model.conversations, name, owner)
            del model.conversations[name]
            return None
        case "drop_item":
            items = model.of(model.conversations, name, owner).items
            if not items:
                raise NotStored(name)
            del items[min(items)]
            return list(items.values())
        case _:
            return list(model.of(model.conversations, name, owner).items.values())


async def _answer(stores: Stores, kind: str, owner: str, name: str, other: str | None, ids: list[str]) -> Any:
    try:
        return await _done(stores, kind, owner, name, other, ids)
    except (NotStored, InvalidRequest) as error:
        return type(error)


async def _done(stores: Stores, kind: str, owner: str, name: str, other: str | None, ids: list[str]) -> Any:
    items = [StoredItem({"id": id}) for id in ids]
    responses, conversations = stores.responses, stores.conversations
    match kind:
        case "respond" | "in_conversation":
            if await _exists(stores, "responses", name):
                return None
            place: dict[str, Any] = {}
            if kind == "respond" and other is not None:
                await responses.history(other, owner)
                place = {"previous_response_id": other}
            if kind == "in_conversation" and other is not None:
                turns = await conversations.history(other, owner)
                place = {"conversation_id": other, "conversation_position": turns.conversation_position}
            record = ResponseRecord(name, owner, int(stores.clock.now), {}, tuple(items), **place)
            outputs = [StoredItem({"id": f"{id}-out"}) for id in ids]
            await responses.put(record, "completed", {}, outputs)
        case "delete":
            await responses.delete(name, owner)
        case "history":
            return [item.id for item in (await responses.history(name, owner)).items]
        case "input_items":
            page = await responses.input_items(name, owner, PageQuery(limit=2))
            return [item.id for item in page.items], page.has_more
        case "create":
            if not await _exists(stores, "conversations", name):
                await conversations.create(name, owner, {}, items)
        case "add":
            await conversations.add(name, owner, items)
        case "update":
            await conversations.update(name, owner, {"n": str(len(ids))})
            return (await conversations.get(name, owner)).metadata
        case "drop":
            await conversations.delete(name, owner)
        case "drop_item":
            first = await conversations.items(name, owner, PageQuery(limit=1, newest_first=False))
            if not first.items:
                raise NotStored(name)
            await conversations.delete_item(name, owner, first.items[0].id)
            return await _all(stores, name, owner)
        case _:
            return await _all(stores, name, owner)
    return None


async def _all(stores: Stores, name: str, owner: str) -> list[str]:
    return [item.id for item in (await stores.conversations.history(name, owner)).items]


async def _exists(stores: Stores, kind: str, name: str) -> bool:
    for owner in OWNERS:
        try:
            await getattr(stores, kind).get(name, owner)
        except NotStored:
            continue
        return True
    return False
