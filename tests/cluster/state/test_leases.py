"""Which copy of the gateway makes a background response, and its tokens, on both databases."""

import asyncio
from typing import Any

import pytest

from cluster.state import token_writer
from cluster.state.background import _TURNS_UNTIL_TAKEN, Background, pack_outputs
from cluster.state.errors import StateUnavailable
from cluster.state.responses import ResponseRecord
from cluster.state.rows import StoredItem
from cluster.state.sweeper import stored_bytes
from tests.cluster.state.conftest import Stores
from workers.request import EngineOutput, TokenLogprobs

OUTPUTS = [
    EngineOutput((1, 2), (TokenLogprobs(-0.5, ((2, -1.5),)), TokenLogprobs(-0.25)), num_cached_tokens=16),
    EngineOutput((3,)),
    EngineOutput((200_002,), finish_reason="stop", stop_token_id=200_002),
]


def copy_of(stores: Stores, name: str) -> Background:
    return Background(stores.database, stores.responses, name)


async def begin(stores: Stores, one: Background, id: str = "a", conversation: str | None = None) -> None:
    inputs = (StoredItem({"id": f"in_{id}"}),)
    created_at = int(stores.clock.now)
    await one.begin(ResponseRecord(id, "", created_at, {"x": 1}, inputs, conversation_id=conversation))


async def test_tokens_are_read_as_they_were_written(stores: Stores) -> None:
    one = copy_of(stores, "one")
    await begin(stores, one)
    assert (await one.progress("a", "")).stored.status == "queued"
    assert await one.add({"a": (0, OUTPUTS[:1])}) == frozenset()
    assert await one.add({"a": (2, OUTPUTS[1:2])}) == frozenset()
    # Its commit was not confirmed.
    assert await one.add({"a": (2, OUTPUTS[1:2])}) == frozenset()
    assert await one.add({"a": (3, OUTPUTS[2:])}) == frozenset()
    progress = await one.progress("a", "")
    assert progress.outputs == tuple(OUTPUTS)
    assert progress.stored.status == "in_progress"
    assert (await one.progress("a", "", after=2)).outputs == tuple(OUTPUTS[1:])


async def test_a_copy_that_says_nothing_loses_its_responses(stores: Stores) -> None:
    one, two, three = (copy_of(stores, name) for name in ("one", "two", "three"))
    await begin(stores, one)
    await one.add({"a": (0, OUTPUTS[:1])})
    for _ in range(2 * _TURNS_UNTIL_TAKEN):  # as long as it speaks, it keeps them
        assert (await one.turn(["a"])).lost == frozenset()
        assert (await two.turn([])).taken == ()
    taken = [found for _ in range(_TURNS_UNTIL_TAKEN) for found in (await two.turn([])).taken]
    assert [progress.stored.id for progress in taken] == ["a"]
    assert taken[0].outputs == tuple(OUTPUTS[:1])
    assert taken[0].num_attempts == 1
    assert (await three.turn([])).taken == ()
    # The first one comes back: it writes nothing more.
    assert await one.add({"a": (2, OUTPUTS[1:])}) == {"a"}
    assert await one.finish("a", "completed", {}, []) is False
    assert (await one.turn(["a"])).lost == {"a"}
    assert (await two.progress("a", "")).outputs == tuple(OUTPUTS[:1])
    assert await two.finish("a", "completed", {"id": "a"}, [StoredItem({"id": "out"})]) is True
    assert (await stores.responses.get("a", "")).body == {"id": "a"}
    assert [item.id for item in (await stores.responses.history("a", "")).items] == ["in_a", "out"]
    assert (await two.turn([])).taken == (await three.turn([])).taken == ()


async def test_responses_that_are_given_up_are_taken_at_once_by_one_copy(stores: Stores) -> None:
    one, two, three = (copy_of(stores, name) for name in ("one", "two", "three"))
    for id in ("a", "b"):
        await begin(stores, one, id)
    await one.release()
    taken = [*(await two.turn([])).taken, *(await three.turn([])).taken]
    assert sorted(progress.stored.id for progress in taken) == ["a", "b"]


async def test_a_copy_learns_of_a_cancellation(stores: Stores) -> None:
    one = copy_of(stores, "one")
    await begin(stores, one)
    assert (await one.turn(["a"])).cancelled == frozenset()
    await copy_of(stores, "two").ask_to_cancel("a", "")
    assert (await one.turn(["a"])).cancelled == {"a"}


async def test_the_end_extends_the_conversation(stores: Stores) -> None:
    one = copy_of(stores, "one")
    await stores.conversations.create("conv_1", "", {})
    await begin(stores, one, conversation="conv_1")
    assert await one.finish("a", "completed", {}, [StoredItem({"id": "out"})])
    items = (await stores.conversations.history("conv_1", "")).items
    assert [item.id for item in items] == ["in_a", "out"]


async def test_a_response_that_cannot_be_read_does_not_keep_others_from_being_taken(stores: Stores) -> None:
    one, two = copy_of(stores, "one"), copy_of(stores, "two")
    await begin(stores, one, "a")
    stores.clock.now += 2 * 86400  # it has expired, and no sweep has been there
    await begin(stores, one, "b")
    await one.release()
    assert [progress.stored.id for progress in (await two.turn([])).taken] == ["b"]


async def test_a_response_that_ends_while_it_is_taken_stays_ended(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = copy_of(stores, "one"), copy_of(stores, "two")
    await begin(stores, one)
    take = two._take

    async def take_late(free: Any) -> Any:
        assert await one.finish("a", "completed", {}, [])
        return await take(free)

    monkeypatch.setattr(two, "_take", take_late)
    turns = [await two.turn([]) for _ in range(_TURNS_UNTIL_TAKEN)]
    assert [turn.taken for turn in turns] == [()] * len(turns)
    assert (await two.turn([])).taken == ()
    assert (await stores.responses.get("a", "")).status == "completed"


async def test_only_a_copy_that_ends_without_a_word_counts_as_an_attempt(stores: Stores) -> None:
    one = copy_of(stores, "one")
    await begin(stores, one)
    for name in ("two", "three", "four", "five", "six"):
        await one.release()
        one = copy_of(stores, name)
        assert [progress.num_attempts for progress in (await one.turn([])).taken] == [0]


async def test_the_tokens_of_a_response_count_for_the_bound_of_the_state(stores: Stores) -> None:
    one = copy_of(stores, "one")
    sizes = []
    for id, num_tokens in (("a", 0), ("b", 3000)):
        await begin(stores, one, id)
        outputs = [EngineOutput((200_000,) * num_tokens)]
        await one.add({id: (0, outputs)})
        async with stores.database.read() as connection:
            before = await stored_bytes(connection)
        assert await one.finish(id, "completed", {}, [])
        async with stores.database.read() as connection:
            sizes.append(await stored_bytes(connection) - before)
    assert sizes[1] - sizes[0] == len(pack_outputs(outputs)) - len(pack_outputs([EngineOutput(())]))


async def test_a_reader_gets_every_token_after_a_commit_that_was_not_confirmed(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = copy_of(stores, "one")
    await begin(stores, one)
    writer = token_writer.TokenWriter(one, lambda id: None)
    writer.begin("a", 0)
    monkeypatch.setattr(token_writer, "_LONGEST_PAUSE_S", 0.0)
    add, read = one.add, []

    async def add_unconfirmed(batches: Any) -> Any:
        await add(batches)
        read.extend((await one.progress("a", "")).outputs)
        await writer.keep("a", EngineOutput((2,)))
        monkeypatch.setattr(one, "add", add)
        raise StateUnavailable("The commit was not confirmed.")

    monkeypatch.setattr(one, "add", add_unconfirmed)
    await writer.keep("a", EngineOutput((1,)))
    writing = asyncio.create_task(writer.run())
    async with asyncio.timeout(60):
        await writer.flush("a")
    writing.cancel()
    await asyncio.wait([writing])
    assert read == [EngineOutput((1,))]
    assert (await one.progress("a", "", after=1)).outputs == (EngineOutput((2,)),)
