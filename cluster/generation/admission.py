"""Admission: the limit on what a gateway runs at once."""

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import Gauge

from workers.errors import InvalidRequest, Overloaded


class Ticket:
    """The place of a request among those in flight. It is given back once, however often it is
    returned."""

    def __init__(self, admission: "Admission", num_choices: int) -> None:
        self._admission: Admission | None = admission
        self._num_choices = num_choices

    def give_back(self) -> None:
        """Make room for others. Calls after the first do nothing."""
        admission, self._admission = self._admission, None
        if admission is not None:
            admission._count(-self._num_choices)


class Admission:
    """Counts the choices in flight and refuses those that are too many.

    Attributes:
        max_in_flight: choices at once; may be changed while requests run.
    """

    def __init__(self, max_in_flight: int, gauge: Gauge) -> None:
        self.max_in_flight = max_in_flight
        self._gauge = gauge
        self._num_in_flight = 0

    @contextmanager
    def admit(self, num_choices: int) -> Iterator[Ticket]:
        """Yield a ticket, which is given back if the block fails, and else belongs to what the
        block handed it to.

        Raises:
            InvalidRequest: more choices than there is room for at any time.
            Overloaded: more than there is room for now.
        """
        limit = self.max_in_flight
        if num_choices > limit:
            raise InvalidRequest(
                f"n requests {num_choices} choices at once; this server allows {limit} "
                f"(gateway.max_in_flight_requests).",
                "n",
            )
        if self._num_in_flight + num_choices > limit:
            raise Overloaded("The server is at capacity (gateway.max_in_flight_requests); retry after 1 s.")
        self._count(num_choices)
        ticket = Ticket(self, num_choices)
        try:
            yield ticket
        except BaseException:
            ticket.give_back()
            raise

    def _count(self, change: int) -> None:
        self._num_in_flight += change
        self._gauge.set(self._num_in_flight)
