"""Admission: the limits on the number of choices that a gateway runs at once, and on what it keeps
of their prompts."""

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import Gauge

from workers.errors import InvalidRequest, Overloaded

MAX_SCORES = 2**21
"""Maximum number of log-probabilities of prompt tokens in flight, alternatives included; 256
MiB."""


class Ticket:
    """The place of a request among those in flight. It is given back once; later calls do
    nothing."""

    def __init__(self, admission: "Admission", num_choices: int) -> None:
        self._admission: Admission | None = admission
        self._num_choices = num_choices
        self._num_scores = 0

    def add_scores(self, number: int) -> None:
        """Count log-probabilities of prompt tokens that the answer will have.

        Raises:
            Overloaded: more than there is room for now.
        """
        admission = self._admission
        if admission is None or not number:
            return
        if admission.num_scores + number > MAX_SCORES:
            raise Overloaded(
                "The server returns log-probabilities of too many prompt tokens now; retry after 1 s."
            )
        admission.num_scores += number
        self._num_scores += number

    def give_back(self) -> None:
        """Free the place for other requests. Calls after the first do nothing."""
        admission, self._admission = self._admission, None
        if admission is not None:
            admission._count(-self._num_choices)
            admission.num_scores -= self._num_scores


class Admission:
    """The counter of choices in flight, which refuses choices over the limit.

    Attributes:
        max_in_flight: maximum number of choices at once; may be changed while requests run.
        num_in_flight: number of choices now.
        num_scores: number of log-probabilities of prompt tokens now.
    """

    def __init__(self, max_in_flight: int, gauge: Gauge) -> None:
        self.max_in_flight = max_in_flight
        self._gauge = gauge
        self.num_in_flight = 0
        self.num_scores = 0

    @contextmanager
    def admit(self, num_choices: int) -> Iterator[Ticket]:
        """Yield a ticket. It is given back if the block fails; otherwise the receiver in the block
        owns it.

        Raises:
            InvalidRequest: more choices than the limit allows at any time.
            Overloaded: more choices than there is room for now.
        """
        limit = self.max_in_flight
        if num_choices > limit:
            raise InvalidRequest(
                f"n requests {num_choices} choices at once; this server allows {limit} "
                f"(gateway.max_in_flight_requests).",
                "n",
            )
        if self.num_in_flight + num_choices > limit:
            raise Overloaded("The server is at capacity (gateway.max_in_flight_requests); retry after 1 s.")
        self._count(num_choices)
        ticket = Ticket(self, num_choices)
        try:
            yield ticket
        except BaseException:
            ticket.give_back()
            raise

    def _count(self, change: int) -> None:
        self.num_in_flight += change
        self._gauge.set(self.num_in_flight)
