"""In-flight counts and recent failures."""

import pytest

from cluster.router.table import LoadTable, Replica, RoutingHint, StaticReplicas
from workers.errors import NoReplica

HINT = RoutingHint("r")
A, B = Replica("a", "127.0.0.1:1"), Replica("b", "127.0.0.1:2")


def test_load_is_spread_and_comes_back_with_release() -> None:
    table = LoadTable()
    first, second = table.pick([A, B], frozenset(), HINT), table.pick([A, B], frozenset(), HINT)
    assert {first, second} == {A, B}
    table.release(A)
    assert (table.in_flight(A), table.in_flight(B)) == (0, 1)
    assert table.pick([A, B], frozenset(), HINT) == A


def test_a_failed_replica_is_avoided_for_a_while_but_used_when_it_is_the_only_one() -> None:
    now = 100.0
    table = LoadTable(clock=lambda: now, penalty_s=2.0)
    table.failed(A)
    assert [table.pick([A, B], frozenset(), HINT) for _ in range(3)] == [B, B, B]
    assert table.pick([A, B], frozenset({"b"}), HINT) == A
    now = 102.5
    assert table.pick([A, B], frozenset(), HINT) == A


async def test_nobody_left() -> None:
    replicas = StaticReplicas([A, B])
    assert list(replicas.known()) == [A, B]
    with pytest.raises(NoReplica):
        await replicas.choose(RoutingHint("r"), frozenset({"a", "b"}))
