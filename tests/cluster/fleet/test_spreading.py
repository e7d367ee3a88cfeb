"""The distribution of requests over time: unrelated chats spread, conversations stay. A simulation
of gateways' tables, without engines."""

import hashlib
import random
from collections import Counter

import pytest

from cluster.fleet.prefixes import SharedBeginnings
from cluster.fleet.table import LoadTable, Replica, RoutingHint

AT_ONCE = 8


def replicas_of(count: int) -> list[Replica]:
    return [Replica(f"replica-{index}", f"host:{index}") for index in range(count)]


def hint(*texts: str) -> RoutingHint:
    """Return a prompt: a block for each letter of the texts, equal only where all before is equal,
    and an end of its own."""
    text = "|".join(texts)
    return RoutingHint([digest(text[: end + 1]) for end in range(len(text))], digest(f"{text} ends"))


def digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def spread(
    table: LoadTable, replicas: list[Replica], hints: list[RoutingHint], rng: random.Random
) -> list[Replica]:
    """Send the prompts, AT_ONCE at a time, which end in any order; the replica of each."""
    running: list[Replica] = []
    went = []
    for each in hints:
        if len(running) == AT_ONCE:
            table.release(running.pop(rng.randrange(AT_ONCE)))
        went.append(table.pick(replicas, frozenset(), each))
        running.append(went[-1])
    for replica in running:
        table.release(replica)
    return went


@pytest.mark.parametrize("num_replicas", [2, 3])
@pytest.mark.parametrize("num_shared", [4, 100])
@pytest.mark.parametrize("own_blocks", [0, 1, 6])
def test_unrelated_chats_spread_although_they_begin_alike(
    num_replicas: int, num_shared: int, own_blocks: int
) -> None:
    """`own_blocks` of 0: chats so short that they differ after their last full block only."""
    replicas, system = replicas_of(num_replicas), "s" * num_shared
    chats = [hint(system, chr(1000 + index) * own_blocks) for index in range(48)]
    if own_blocks == 0:
        chats = [RoutingHint(hint(system).block_hashes, digest(f"chat {index}")) for index in range(48)]
    for seed in range(10):
        counts = Counter(spread(LoadTable(seed=seed), replicas, chats, random.Random(seed)))
        assert max(counts.values()) <= 1.5 * 48 / num_replicas, counts


@pytest.mark.parametrize("turn_blocks", [4, 30])
def test_a_conversation_goes_back_to_its_replica(turn_blocks: int) -> None:
    rng = random.Random(0)
    table, replicas, system = LoadTable(seed=0), replicas_of(3), "s" * 6
    homes: dict[int, Replica] = {}
    returned = moved = 0
    for turn in range(1, 6):
        order = rng.sample(range(24), 24)
        prompts = [hint(system, *(chr(1000 + number) * turn_blocks for _ in range(turn))) for number in order]
        for number, replica in zip(order, spread(table, replicas, prompts, rng), strict=True):
            if number in homes:
                returned += replica == homes[number]
                moved += replica != homes[number]
            homes[number] = replica
    assert max(Counter(homes.values()).values()) <= 1.5 * 24 / 3
    assert moved <= 0.1 * returned, (moved, returned)


def test_one_conversation_is_not_taken_for_several() -> None:
    """A turn with a tool call goes on from where the answer began in three ways, turn after
    turn."""
    shared = SharedBeginnings()
    history = "system and first question"
    for turn in range(20):
        ways = [
            hint(history),
            hint(history, "reasoning, call, result"),
            hint(history, f"answer {turn}, question {turn}"),
        ]
        for way in ways:
            assert shared.add(way.block_hashes, way.tail) == 0
        history = f"{history}|answer {turn}, question {turn}"


def test_what_is_shared_ends_where_prompts_part() -> None:
    shared = SharedBeginnings()
    counts = [
        shared.add(found.block_hashes, found.tail)
        for found in (hint("system", f"{index} asks") for index in range(6))
    ]
    assert counts == [0, 0, 0, len("system|"), len("system|"), len("system|")]
    # The same prompt again and again is not several.
    again = SharedBeginnings()
    assert {again.add(found.block_hashes, found.tail) for found in [hint("the same")] * 9} == {0}


def test_memory_of_beginnings_is_bounded() -> None:
    shared = SharedBeginnings(max_blocks=50)
    for index in range(40):
        found = hint("system", f"{index} asks")
        shared.add(found.block_hashes, found.tail)
        assert shared.num_blocks <= 50
    last = hint("system", "another")
    assert shared.add(last.block_hashes, last.tail) == len("system|")
