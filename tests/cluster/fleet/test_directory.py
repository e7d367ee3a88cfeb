"""The directory whose list changes under running requests."""

import pytest

from cluster.fleet.directory import ReplicaSet
from cluster.fleet.table import Replica, ReplicaDirectory, RoutingHint
from workers.errors import NoReplica

HINT = RoutingHint()
NONE: frozenset[str] = frozenset()


async def test_an_empty_set_has_no_replica() -> None:
    directory: ReplicaDirectory = ReplicaSet()
    assert directory.known() == ()
    with pytest.raises(NoReplica):
        await directory.choose(HINT, NONE)


async def test_a_replaced_list_is_used_at_once_and_keeps_the_counts() -> None:
    replicas = ReplicaSet()
    a, b = Replica("a", "127.0.0.1:1"), Replica("b", "127.0.0.1:2")
    replicas.replace([a])
    busy = await replicas.choose(HINT, NONE)
    assert busy == a
    replicas.replace([a, b])
    assert await replicas.choose(HINT, NONE) == b  # a has one in flight, from before
    replicas.release(a)
    assert await replicas.choose(HINT, NONE) == a
    replicas.replace([b])
    assert replicas.known() == (b,)
    with pytest.raises(NoReplica):
        await replicas.choose(HINT, frozenset({"b"}))


async def test_replicas_that_are_missing_take_no_requests() -> None:
    replicas = ReplicaSet()
    a = Replica("a", "127.0.0.1:1")
    replicas.replace([a], missing=["b"])
    assert (replicas.known(), replicas.missing()) == ((a,), ("b",))
    assert [await replicas.choose(HINT, NONE) for _ in range(3)] == [a, a, a]
    replicas.replace([a])
    assert replicas.missing() == ()


async def test_silence_of_a_replica_that_has_left_is_not_kept() -> None:
    """A call there may end after it has left the list; it may come back under its key."""
    replicas = ReplicaSet()
    a, b = Replica("a", "127.0.0.1:1"), Replica("b", "127.0.0.1:2")
    replicas.replace([b])
    replicas.silent(a, True)
    replicas.replace([a, b])
    assert await replicas.choose(HINT, frozenset({"a"})) == b
    assert await replicas.choose(HINT, NONE) == a, "the least loaded one"


async def test_gone_addresses_are_reported_once() -> None:
    replicas = ReplicaSet()
    gone: list[Replica] = []
    replicas.on_gone(gone.append)
    first, second = Replica("a", "127.0.0.1:1"), Replica("a", "127.0.0.1:2")
    replicas.replace([first])
    replicas.replace([first])
    assert gone == []
    replicas.replace([second])  # restarted: the same id at another address
    replicas.replace([])
    replicas.replace([])
    assert gone == [first, second]


async def test_a_replica_that_drains_is_gone_with_its_last_sequence() -> None:
    replicas = ReplicaSet()
    gone: list[Replica] = []
    replicas.on_gone(gone.append)
    draining, other = Replica("a", "127.0.0.1:1"), Replica("a", "127.0.0.1:2")
    replicas.replace([draining])
    first, second = [await replicas.choose(HINT, NONE) for _ in range(2)]
    replicas.replace([other])
    new = await replicas.choose(HINT, NONE)
    replicas.release(first)
    assert gone == []
    replicas.release(second)
    assert gone == [draining]
    replicas.release(new)
    assert gone == [draining]


async def test_a_replica_that_starts_again_has_lost_its_cache() -> None:
    replicas = ReplicaSet()
    a, b, again = Replica("a", "127.0.0.1:1"), Replica("b", "127.0.0.1:2"), Replica("a", "127.0.0.1:3")
    prompt = RoutingHint([bytes([number]) for number in range(20)])
    replicas.replace([a])
    replicas.release(await replicas.choose(prompt, NONE))
    replicas.replace([a, b])
    busy = await replicas.choose(prompt, NONE)
    assert busy == a, "it has the prompt"
    replicas.replace([again, b])
    assert await replicas.choose(prompt, NONE) == b, "a has one in flight, and no cache any more"


async def test_the_end_of_a_replica_is_not_held_against_its_successor_at_the_same_address() -> None:
    replicas = ReplicaSet()
    a, b, again = Replica("a", "unix:a", "1"), Replica("b", "unix:b", "1"), Replica("a", "unix:a", "2")
    prompt = RoutingHint([bytes([number]) for number in range(20)])
    replicas.replace([a])
    await replicas.choose(prompt, NONE)
    replicas.replace([again])
    assert await replicas.choose(prompt, frozenset({a.key})) == again
    replicas.failed(a)  # heard of late
    replicas.release(a)
    replicas.release(again)
    replicas.replace([again, b])
    assert await replicas.choose(prompt, NONE) == again, "it has the prompt, and nothing against it"


async def test_a_failed_replica_is_avoided_while_there_is_another() -> None:
    replicas = ReplicaSet()
    a, b = Replica("a", "127.0.0.1:1"), Replica("b", "127.0.0.1:2")
    replicas.replace([a, b])
    replicas.failed(a)
    assert [await replicas.choose(HINT, NONE) for _ in range(3)] == [b, b, b]
    assert await replicas.choose(HINT, frozenset({"b"})) == a
