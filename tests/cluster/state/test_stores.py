"""Responses, conversations, continuity and the sweep on databases of both kinds; `test_machine.py`
compares long sequences of accesses with a plain model."""

import asyncio
from typing import Any

import pytest
from sqlalchemy import update

from cluster.state import conversations
from cluster.state.errors import ItemTooLarge, NotStored
from cluster.state.owners import owner_of
from cluster.state.responses import ResponseRecord
from cluster.state.rows import PageQuery, StoredItem
from cluster.state.sweeper import stored_bytes
from cluster.state.tables import responses
from tests.cluster.state.conftest import Stores
from workers.errors import ContextLengthExceeded, InvalidRequest

ME, OTHER = owner_of("my key"), owner_of("another key")


def item(id: str, text: str = "", tokens: tuple[int, ...] | None = None) -> StoredItem:
    return StoredItem({"id": id, "type": "message", "text": text}, tokens)


def record(stores: Stores, id: str, **fields: Any) -> ResponseRecord:
    defaults: dict[str, Any] = {"owner": ME, "request": {"seed": 1}, "inputs": (item(f"in_{id}"),)}
    return ResponseRecord(id, created_at=int(stores.clock.now), **defaults | fields)


async def put(stores: Stores, id: str, **fields: Any) -> None:
    made = record(stores, id, **fields)
    await stores.responses.put(made, "completed", {"id": id}, [item(f"out_{id}", tokens=(1, 200_000))])


def ids(items: tuple[StoredItem, ...]) -> list[str]:
    return [item.id for item in items]


async def test_a_chain_is_its_items_oldest_first(stores: Stores) -> None:
    await put(stores, "a")
    await put(stores, "b", previous_response_id="a")
    await put(stores, "c", previous_response_id="b", inputs=(item("x"), item("y")))
    turns = await stores.responses.history("c", ME)
    assert ids(turns.items) == ["in_a", "out_a", "in_b", "out_b", "x", "y", "out_c"]
    assert turns.items[1].token_ids == (1, 200_000)
    found = await stores.responses.get("c", ME)
    assert (found.status, found.body, found.request) == ("completed", {"id": "c"}, {"seed": 1})


async def test_references_find_the_newest_items_up_to_a_size(stores: Stores) -> None:
    await put(stores, "a", inputs=(item("x", "old"), item("y", tokens=(7,))))
    stores.clock.now += 1
    await put(stores, "b", inputs=(item("x", "new"),))
    await put(stores, "c", inputs=(item("x", "theirs"),), owner=OTHER)
    wanted = ["x", "y", "out_a", "gone", "\0"]
    found = await stores.responses.items_by_id(ME, wanted, 10_000)
    assert found.items == {
        "x": item("x", "new"),
        "y": item("y", tokens=(7,)),
        "out_a": item("out_a", tokens=(1, 200_000)),
    }
    assert 600 < found.num_bytes < 1000
    assert (await stores.responses.items_by_id(ME, wanted, found.num_bytes)).items == found.items
    with pytest.raises(ContextLengthExceeded, match=r"refers to have \d+ bytes") as caught:
        await stores.responses.items_by_id(ME, wanted, found.num_bytes - 1)
    assert caught.value.param == "input"
    assert (await stores.responses.items_by_id(OTHER, ["out_a"], 10_000)).items == {}


async def test_another_keys_objects_are_not_found(stores: Stores) -> None:
    await put(stores, "a")
    await stores.conversations.create("conv_1", ME, {"a": "b"}, [item("i")])
    query = PageQuery()
    for access in (
        stores.responses.get("a", OTHER),
        stores.responses.history("a", OTHER),
        stores.responses.input_items("a", OTHER, query),
        stores.responses.delete("a", OTHER),
        stores.conversations.get("conv_1", OTHER),
        stores.conversations.update("conv_1", OTHER, {}),
        stores.conversations.delete("conv_1", OTHER),
        stores.conversations.items("conv_1", OTHER, query),
        stores.conversations.item("conv_1", OTHER, "i"),
        stores.conversations.delete_item("conv_1", OTHER, "i"),
        stores.conversations.add("conv_1", OTHER, [item("j")]),
        stores.conversations.history("conv_1", OTHER),
        stores.responses.get("no\0id", ME),
    ):
        with pytest.raises(NotStored, match=r"^\w+ with id '.*' not found\.$"):
            await access
    assert "my key" not in ME
    assert ME != OTHER
    assert owner_of(None) == ""


async def test_pages_of_items(stores: Stores) -> None:
    inputs = tuple(item(f"i{index}") for index in range(5))
    await put(stores, "a", inputs=inputs)

    async def page(**query: Any) -> tuple[list[str], bool]:
        found = await stores.responses.input_items("a", ME, PageQuery(**query))
        return ids(found.items), found.has_more

    assert await page() == (["i4", "i3", "i2", "i1", "i0"], False)
    assert await page(limit=2) == (["i4", "i3"], True)
    assert await page(limit=2, after="i3") == (["i2", "i1"], True)
    assert await page(limit=2, after="i1") == (["i0"], False)
    assert await page(limit=2, after="i1", newest_first=False) == (["i2", "i3"], True)
    for wrong in ("out_a", "i9", "\0"):
        with pytest.raises(InvalidRequest, match=r"no item of this list") as caught:
            await page(after=wrong)
        assert caught.value.param == "after"


async def test_a_page_has_a_size(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the first three items fit into a page; the last two are too large for any."""
    monkeypatch.setattr(conversations, "MAX_PAGE_BYTES", 700)
    texts = ("x" * 250, "x" * 250, "x" * 250, "x" * 1000, "x" * 1000)
    items = [item(f"i{index}", text) for index, text in enumerate(texts)]
    await put(stores, "a", inputs=tuple(items))
    await stores.conversations.create("conv_1", ME, {}, items)
    for read in (
        lambda query: stores.responses.input_items("a", ME, query),
        lambda query: stores.conversations.items("conv_1", ME, query),
    ):
        pages, after = [], None
        while not pages or pages[-1].has_more:
            pages.append(await read(PageQuery(100, after, newest_first=False)))
            after = pages[-1].items[-1].id
        assert [ids(page.items) for page in pages] == [["i0", "i1"], ["i2"], ["i3"], ["i4"]]


async def test_a_response_of_a_conversation_extends_it_and_can_be_continued(stores: Stores) -> None:
    await stores.conversations.create("conv_1", ME, {}, [item("first")])
    before = await stores.conversations.history("conv_1", ME)
    position = before.conversation_position
    await put(stores, "a", conversation_id="conv_1", conversation_position=position)
    await stores.conversations.add("conv_1", ME, [item("later")])
    assert ids((await stores.conversations.history("conv_1", ME)).items) == [
        "first",
        "in_a",
        "out_a",
        "later",
    ]
    assert ids((await stores.responses.history("a", ME)).items) == ["first", "in_a", "out_a"]
    with pytest.raises(InvalidRequest, match="the same id"):
        await put(stores, "b", conversation_id="conv_1", inputs=(item("later"),))
    with pytest.raises(NotStored):  # nothing of it was stored
        await stores.responses.get("b", ME)
    await stores.conversations.delete("conv_1", ME)
    with pytest.raises(NotStored, match="conv_1"):
        await stores.responses.history("a", ME)
    assert (await stores.responses.get("a", ME)).id == "a"


async def test_copies_that_add_at_once_lose_nothing(stores: Stores) -> None:
    await stores.conversations.create("conv_1", ME, {})
    added = [[item(f"{copy}-{index}") for index in range(3)] for copy in range(6)]
    await asyncio.gather(*(stores.conversations.add("conv_1", ME, items) for items in added))
    found = ids((await stores.conversations.history("conv_1", ME)).items)
    groups = [found[start : start + 3] for start in range(0, 18, 3)]
    assert sorted(groups) == [ids(tuple(items)) for items in added]


async def test_a_circle_of_previous_responses_is_told(stores: Stores) -> None:
    for id, previous in (("a", None), ("b", "a"), ("c", "b")):
        await put(stores, id, previous_response_id=previous)
    async with stores.database.write() as connection:  # by hand: no request makes one
        await connection.execute(
            update(responses).where(responses.c.id == "a").values(previous_response_id="b")
        )
    with pytest.raises(InvalidRequest, match="is a circle") as caught:
        await stores.responses.history("c", ME)
    assert caught.value.param == "previous_response_id"


async def test_a_chain_with_a_deleted_response_cannot_be_continued(stores: Stores) -> None:
    for id, previous in (("a", None), ("b", "a"), ("c", "b")):
        await put(stores, id, previous_response_id=previous)
    await stores.responses.delete("b", ME)
    with pytest.raises(NotStored, match="'b'"):
        await stores.responses.history("c", ME)
    assert ids((await stores.responses.history("a", ME)).items) == ["in_a", "out_a"]


async def test_items_have_bounds(stores: Stores) -> None:
    with pytest.raises(ItemTooLarge, match=r"^input\[1\] has \d+ bytes, more than the 4096 ") as caught:
        await stores.responses.check([item("a"), item("b", "x" * 4096)])
    assert caught.value.param == "input[1]"
    with pytest.raises(InvalidRequest, match=r"^input\[0\]\.id must"):
        await stores.responses.check([item("a b")])
    with pytest.raises(ItemTooLarge, match=r"^items\[0\]"):
        await stores.conversations.create("conv_1", ME, {}, [item("b", "x" * 4096)])


async def test_what_has_expired_is_not_found_and_is_swept(stores: Stores) -> None:
    await put(stores, "old")
    await put(stores, "root")
    await stores.conversations.create("conv_old", ME, {})
    await stores.conversations.create("conv_used", ME, {})
    stores.clock.now += 43_200
    await put(stores, "leaf", previous_response_id="root")
    await stores.conversations.update("conv_used", ME, {})
    stores.clock.now += 43_201  # a day and a second after the first
    with pytest.raises(NotStored):
        await stores.responses.get("old", ME)
    assert await stores.sweeper.sweep() == 2
    stores.clock.now -= 43_201
    for gone in (stores.responses.get("old", ME), stores.conversations.get("conv_old", ME)):
        with pytest.raises(NotStored):
            await gone
    # The root has expired too, but a response that lives continues it.
    assert ids((await stores.responses.history("leaf", ME)).items) == [
        "in_root",
        "out_root",
        "in_leaf",
        "out_leaf",
    ]
    stores.clock.now += 86_401
    await stores.sweeper.sweep()
    async with stores.database.read() as connection:
        assert await stored_bytes(connection) == 0


async def test_the_oldest_are_deleted_where_there_is_too_much(stores: Stores) -> None:
    object.__setattr__(stores.settings, "max_bytes", 400_000)
    for index in range(250):
        stores.clock.now += 1
        await put(stores, f"r{index}", inputs=(item("i", "x" * 2000),))
    await stores.conversations.create("conv_1", ME, {}, [item("i", "x" * 2000)])
    assert await stores.sweeper.sweep() in (100, 200)
    async with stores.database.read() as connection:
        assert await stored_bytes(connection) <= 400_000
    with pytest.raises(NotStored):
        await stores.responses.get("r0", ME)
    assert (await stores.responses.get("r249", ME)).id == "r249"
    assert (await stores.conversations.get("conv_1", ME)).id == "conv_1"


async def test_one_copy_sweeps(stores: Stores) -> None:
    from cluster.state.sweeper import Sweeper

    copies = [Sweeper(stores.database, stores.settings, stores.continuity) for _ in range(3)]
    for _ in range(2):  # they learn of each other
        for copy in copies:
            await copy.take_duty()
    for _ in range(5):
        assert sum([await copy.take_duty() for copy in copies]) == 1
    del copies[0]  # and when one ends, another goes on
    for copy in copies:
        await copy.take_duty()
    assert sum([await copy.take_duty() for copy in copies]) == 1


async def test_reasoning_is_kept_by_call_for_a_time(stores: Stores) -> None:
    await stores.continuity.put(ME, ["call_1", "call_2", "bad id"], "Because.")
    await stores.continuity.put(ME, ["call_2"], "For another reason.")
    wanted = ["call_1", "call_2", "bad id", "call_3"]
    assert await stores.continuity.get(ME, wanted) == {"call_1": "Because.", "call_2": "For another reason."}
    assert await stores.continuity.get(OTHER, wanted) == {}
    await stores.continuity.drop(ME, ["call_1"])
    assert await stores.continuity.get(ME, wanted) == {"call_2": "For another reason."}
    stores.clock.now += 3601
    assert await stores.continuity.get(ME, wanted) == {}
    assert await stores.continuity.sweep() == 1


async def test_reasoning_is_bounded_in_size(stores: Stores) -> None:
    await stores.continuity.put(ME, ["large"], "x" * 2049)  # a sixteenth of all
    assert await stores.continuity.get(ME, ["large"]) == {}
    for index in range(30):
        stores.clock.now += 1
        await stores.continuity.put(ME, [f"call_{index}"], "x" * 1800)
    assert await stores.continuity.sweep() == 14
    assert (await stores.continuity.get(ME, ["call_13", "call_14"])).keys() == {"call_14"}
