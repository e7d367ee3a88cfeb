"""Choices in flight: counted, refused when too many, and given back once."""

import pytest
from prometheus_client import CollectorRegistry, Gauge

from cluster.generation.admission import Admission
from workers.errors import InvalidRequest, Overloaded


def admission(limit: int) -> tuple[Admission, Gauge]:
    gauge = Gauge("in_flight", "Choices.", registry=CollectorRegistry())
    return Admission(limit, gauge), gauge


def in_flight(gauge: Gauge) -> float:
    return next(iter(gauge.collect())).samples[0].value


def test_a_ticket_is_given_back_once() -> None:
    room, gauge = admission(10)
    with room.admit(3) as ticket, room.admit(4) as other:
        pass
    assert in_flight(gauge) == 7, "a ticket outlives the block that got it"
    for _ in range(3):
        ticket.give_back()
    assert in_flight(gauge) == 4
    other.give_back()
    assert in_flight(gauge) == 0


def test_a_block_that_fails_gives_its_ticket_back() -> None:
    room, gauge = admission(10)
    seen = []

    def begin(over: bool) -> None:
        with room.admit(3) as ticket:
            seen.append(in_flight(gauge))
            if over:  # what the block began has ended
                ticket.give_back()
            raise KeyError

    for over in (False, True):
        with pytest.raises(KeyError):
            begin(over)
        assert in_flight(gauge) == 0
    assert seen == [3, 3]


def test_what_there_is_no_room_for_is_refused_and_not_counted() -> None:
    room, gauge = admission(4)
    with pytest.raises(InvalidRequest) as caught, room.admit(5):
        pass
    assert (caught.value.param, type(caught.value)) == ("n", InvalidRequest)
    with room.admit(3) as ticket:
        with pytest.raises(Overloaded), room.admit(2):
            pass
        with room.admit(1) as small:
            assert in_flight(gauge) == 4
    ticket.give_back()
    with room.admit(3) as again:
        assert in_flight(gauge) == 4
    room.max_in_flight = 2
    with pytest.raises(Overloaded), room.admit(1):
        pass
    small.give_back()
    again.give_back()
    with room.admit(2):
        assert in_flight(gauge) == 2
