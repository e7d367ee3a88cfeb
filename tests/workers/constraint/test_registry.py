"""Automata by id: what an engine remembers, and what the scheduler has its ranks hold."""

import random
from collections import Counter

from workers.constraint.codec import Constraint, automaton_id
from workers.constraint.registry import HeldAutomata, KnownAutomata


def constraint(number: int, num_bytes: int = 100) -> Constraint:
    body = number.to_bytes(4, "big") + bytes(num_bytes - 4)
    return Constraint(automaton_id(body), body)


def test_the_least_recently_used_is_forgotten_first() -> None:
    known = KnownAutomata(max_bytes=300)
    first, second, third, fourth = map(constraint, range(4))
    for entry in (first, second, third):
        known.add(entry)
    assert known.get(first.id) == first
    known.add(first)
    known.add(fourth)
    assert [known.get(entry.id) for entry in (first, second, third, fourth)] == [first, None, third, fourth]


def test_one_that_is_larger_than_the_bound_is_not_remembered() -> None:
    known = KnownAutomata(max_bytes=300)
    known.add(constraint(1))
    known.add(constraint(2, num_bytes=301))
    assert known.get(constraint(1).id) is None
    known.add(constraint(3))
    assert known.get(constraint(3).id) is not None, "the count of bytes went wrong"


def test_ranks_get_each_once_and_drop_what_no_sequence_uses_beyond_the_bound() -> None:
    draw = random.Random(2)
    held = HeldAutomata(max_bytes=500)
    on_ranks: set[bytes] = set()
    users: list[Constraint] = []
    sent: Counter[bytes] = Counter()
    for _ in range(2000):
        while users and draw.random() < 0.5:
            held.release(users.pop(draw.randrange(len(users))))
        for _ in range(draw.randrange(3)):
            users.append(constraint(draw.randrange(12)))
            held.use(users[-1])
        new, dropped = held.take_changes()
        on_ranks -= set(dropped)
        for key, body in new:
            assert key not in on_ranks, "sent though it is there"
            assert automaton_id(body) == key
            on_ranks.add(key)
            sent[key] += 1
        in_use = {user.id for user in users}
        assert in_use <= on_ranks
        assert held.num_bytes == 100 * len(on_ranks)
        if new and held.num_bytes > 500:
            assert on_ranks == in_use, "over the bound with more than is in use"
    assert len(sent) == 12
    assert min(sent.values()) > 1, "nothing was ever dropped"
