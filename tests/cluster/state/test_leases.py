"""Which copy of the gateway makes a background response, and its tokens, on both databases."""

from cluster.state.background import _TURNS_UNTIL_TAKEN, Background
from cluster.state.responses import ResponseRecord
from cluster.state.rows import StoredItem
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
    # Its commit was not confirmed, and more has come meanwhile.
    assert await one.add({"a": (2, OUTPUTS[1:])}) == frozenset()
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
