"""The record of prompts by replica, and how long it lasts."""

import random

from cluster.fleet.prefixes import PrefixIndex
from cluster.fleet.table import LoadTable, Replica, RoutingHint


def blocks(text: str) -> list[bytes]:
    """Return one block for each letter; as with chained hashes, blocks are equal only after equal
    beginnings."""
    return [text[: end + 1].encode() for end in range(len(text))]


def test_the_longest_common_beginning_is_found() -> None:
    index = PrefixIndex()
    index.add("a", blocks("system prompt one"))
    index.add("a", blocks("another"))
    index.add("b", blocks("system"))
    assert index.match("a", blocks("system prompt two")) == len("system prompt ")
    assert index.match("b", blocks("system prompt two")) == len("system")
    assert index.match("a", blocks("an")) == 2
    assert index.match("a", blocks("x")) == index.match("c", blocks("system")) == index.match("a", []) == 0
    index.forget("a")
    assert index.match("a", blocks("system")) == 0
    index.forget("nobody")


def test_the_least_recently_sent_is_forgotten_from_its_end() -> None:
    index = PrefixIndex(max_blocks=10)
    index.add("a", blocks("12345678"))
    index.add("a", blocks("abcdef"))
    assert index.match("a", blocks("abcdef")) == 6
    assert index.match("a", blocks("12345678")) == 4
    index.add("a", blocks("12345678"))
    assert index.match("a", blocks("12345678")) == 8
    assert index.match("a", blocks("abcdef")) == 2


def test_it_never_holds_more_than_it_may_and_never_a_block_without_its_beginning() -> None:
    rng = random.Random(0)
    index = PrefixIndex(max_blocks=50)
    for _ in range(300):
        index.add("a", blocks("".join(rng.choices("ab", k=rng.randrange(20)))))
        held = index._sent["a"]
        assert index.num_blocks == {"a": len(held)}
        assert len(held) <= 50
        assert all(block[:-1] in held for block in held if len(block) > 1)


def test_reported_loads_of_others_count_and_our_own_are_not_counted_twice() -> None:
    table = LoadTable(seed=1)
    a, b = Replica("a", "x:1"), Replica("b", "x:2")
    hint = RoutingHint()
    for _ in range(3):
        table.pick([a], frozenset(), hint)
    table.report({"a": 3, "b": 2})  # the three on a are ours; two on b are another gateway's
    assert table.pick([a, b], frozenset(), hint) == b
    table.report({"a": 0, "b": 9})
    assert table.pick([a, b], frozenset(), hint) == a
    table.gone(b)
    assert table.pick([a, b], frozenset(), hint) == b


def test_a_replica_that_failed_has_lost_its_cache() -> None:
    now = 0.0
    table = LoadTable(seed=1, clock=lambda: now, penalty_s=2.0)
    a, b = Replica("a", "x:1"), Replica("b", "x:2")
    hint = RoutingHint(blocks("a long conversation"))
    home = table.pick([a, b], frozenset(), hint)
    other = b if home == a else a
    table.release(home)
    table.pick([other], frozenset(), RoutingHint(blocks("else")))
    table.release(other)
    assert table.pick([a, b], frozenset(), hint) == home
    table.release(home)
    table.failed(home)
    now = 5.0
    # No prefix speaks for it any more, so its load decides.
    table.pick([home], frozenset(), RoutingHint())
    assert table.pick([a, b], frozenset(), hint) == other
