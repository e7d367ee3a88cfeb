"""The deadlines of requests, soonest first."""

import math

from workers.engine.requests import Deadlines


def test_deadlines_expire_in_order_and_each_once() -> None:
    deadlines = Deadlines()
    for seq_id, deadline_s in ((1, 30.0), (2, 10.0), (3, 20.0), (4, 20.0)):
        deadlines.add(deadline_s, seq_id)
    assert deadlines.expired(9.9) == []
    assert deadlines.expired(20.0) == [2, 3, 4]
    assert deadlines.expired(20.0) == []
    assert deadlines.expired(30.0) == [1]


def test_deadlines_of_ended_requests_are_dropped_once_they_are_many() -> None:
    """Requests that end long before their deadlines would fill the memory."""
    deadlines = Deadlines()
    for seq_id in range(1000):
        deadlines.add(1000.0 - seq_id, seq_id)
    deadlines.prune(1000, lambda seq_id: True)
    live = {7, 500}
    deadlines.prune(len(live), live.__contains__)
    assert deadlines.expired(math.inf) == [500, 7]
