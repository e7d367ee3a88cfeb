"""In-flight counts and recent failures."""

from collections import Counter
from collections.abc import Sequence

import pytest

from cluster.fleet.prefixes import PrefixIndex
from cluster.fleet.table import REPORT_AGE_S, LoadTable, Replica, RoutingHint
from workers.errors import NoReplica

HINT = RoutingHint()
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


def test_what_was_known_of_a_replica_ends_with_it() -> None:
    """One that comes back under its key is neither silent nor has it others' load."""
    table = LoadTable()
    table.silent(A, True)
    table.report({"a": 6})
    assert [table.pick([A, B], frozenset(), HINT) for _ in range(3)] == [B, B, B]
    table.gone(A)
    assert table.pick([A, B], frozenset(), HINT) == A


def test_no_replica_is_left() -> None:
    with pytest.raises(NoReplica):
        LoadTable().pick([A, B], frozenset({"a", "b"}), HINT)


def test_the_sequences_of_a_prompt_are_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look-up of thousands of blocks takes milliseconds of the event loop."""
    prefixes = PrefixIndex()
    table = LoadTable(prefixes=prefixes)
    num_added = Counter[str]()
    add, match = prefixes.add, prefixes.match
    num_matched = Counter[str]()

    def spied_add(key: str, hashes: Sequence[bytes]) -> None:
        num_added[key] += 1
        add(key, hashes)

    def spied_match(key: str, hashes: Sequence[bytes]) -> int:
        num_matched[key] += 1
        return match(key, hashes)

    monkeypatch.setattr(prefixes, "add", spied_add)
    monkeypatch.setattr(prefixes, "match", spied_match)
    prompt = RoutingHint([bytes([number]) for number in range(200)])
    for _ in range(64):
        table.pick([A, B], frozenset(), prompt)
    assert num_matched == num_added == {"a": 1, "b": 1}
    # Another prompt comes between, and a replica loses what it had.
    table.pick([A, B], frozenset(), HINT)
    table.pick([A, B], frozenset(), prompt)
    assert num_matched == {"a": 3, "b": 3}
    table.failed(A)
    table.pick([A], frozenset(), prompt)
    assert num_matched["a"] == 4
    assert prefixes.match("a", prompt.block_hashes) == 200


def test_a_report_that_is_older_than_the_end_of_our_sequences_counts_none_of_them_as_others() -> None:
    now = 100.0
    table = LoadTable(clock=lambda: now)
    replicas = [A, B]
    for _ in range(6):
        assert table.pick([A], frozenset(), HINT) == A
    # They run for long and end just before a report of them comes.
    now = 120.0
    for _ in range(6):
        table.release(A)
    now = 122.0
    table.report({"a": 6, "b": 1})
    assert table.pick(replicas, frozenset(), HINT) == A
    table.release(A)
    now = 122.0 + 2 * REPORT_AGE_S
    table.report({"a": 6, "b": 1})  # too late to be ours
    assert table.pick(replicas, frozenset(), HINT) == B


def test_sequences_that_ended_in_the_period_before_the_report_are_our_own() -> None:
    now = 100.0
    table = LoadTable(clock=lambda: now)
    for _ in range(6):
        table.pick([A], frozenset(), HINT)
    now = 101.0
    for _ in range(6):
        table.release(A)
    for periods in (1.5, 1.9):
        now = 100.0 + periods * REPORT_AGE_S
        table.report({"a": 6, "b": 1})
        assert table.pick([A, B], frozenset(), HINT) == A
        table.release(A)
    now = 100.0 + 2.5 * REPORT_AGE_S
    table.report({"a": 6, "b": 1})
    assert table.pick([A, B], frozenset(), HINT) == B


def test_long_running_sequences_stay_our_own() -> None:
    now = 0.0
    table = LoadTable(clock=lambda: now)
    for _ in range(5):
        table.pick([A], frozenset(), HINT)
    for later in (1.0, 4.5, 9.0, 30.0, 31.0):
        now = later
        table.report({"a": 5, "b": 4})
        # Five of ours on a against four of others on b.
        assert table.pick([A, B], frozenset(), HINT) == B
        table.release(B)
