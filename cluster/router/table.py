"""The replicas a gateway knows, and how busy it keeps each. One interface: a static list here, Ray Serve's in `cluster/serve`."""

import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.router import policy
from cluster.router.prefixes import PrefixIndex, SharedBeginnings
from workers.errors import NoReplica


@dataclass(frozen=True, slots=True)
class Replica:
    """One engine.

    Attributes:
        id: stable for the replica's life; a label in metrics.
        address: `host:port` of its engine gRPC server.
    """

    id: str
    address: str


@dataclass(frozen=True, slots=True)
class RoutingHint:
    """What the choice of a replica may depend on.

    Attributes:
        block_hashes: of the prompt's full KV blocks, from its beginning; may be cut.
        tail: hash of what follows these blocks; empty where they were cut.
    """

    request_id: str
    block_hashes: Sequence[bytes] = ()
    tail: bytes = b""


class ReplicaDirectory(Protocol):
    """Where requests can go. Every `choose` is followed by one `release`."""

    async def choose(self, hint: RoutingHint, excluded: frozenset[str]) -> Replica:
        """A replica whose id is not excluded; it counts as busier until `release`.

        Raises:
            NoReplica: none is left.
        """

    def release(self, replica: Replica) -> None:
        """The sequence that `choose` was called for has ended there."""

    def failed(self, replica: Replica) -> None:
        """The replica could not be reached or died: avoid it for a short time. `release` comes as well."""

    def known(self) -> Sequence[Replica]:
        """All replicas that requests may go to, reachable or not."""

    def missing(self) -> Sequence[str]:
        """Ids of replicas that should be there and have no address: they died and start again."""


REPORT_AGE_S = 4.0
"""A report may be this old when it comes: Serve asks engines every 2 s and passes on what it heard."""


class LoadTable:
    """What this gateway knows about replicas: its own sequences in flight, what was sent where, recent failures, and the loads that they
    report, in which other gateways' sequences count.

    Args:
        clock: monotonic seconds.
        penalty_s: how long a replica that failed is avoided while there are others.
        seed: of the draw between equally loaded replicas.
        prefixes: what was sent where; None: a new one.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        penalty_s: float = 2.0,
        seed: int = 0,
        prefixes: PrefixIndex | None = None,
    ) -> None:
        self._clock = clock
        self._penalty_s = penalty_s
        self._rng = random.Random(seed)
        self._in_flight: Counter[str] = Counter()
        self._prefixes = PrefixIndex() if prefixes is None else prefixes
        self._shared = SharedBeginnings()
        # Most of our own at once in this period of REPORT_AGE_S and in the one before.
        self._peaks: tuple[Counter[str], Counter[str]] = Counter(), Counter()
        self._period_began = clock()
        # Reported minus the most that may have been our own at that time: what comes from others.
        self._from_others: dict[str, int] = {}
        self._suspect_until: dict[str, float] = {}

    def pick(self, replicas: Sequence[Replica], excluded: frozenset[str], hint: RoutingHint) -> Replica:
        """The policy's choice, counted as in flight and as having the prompt.

        Raises:
            NoReplica: all of `replicas` are excluded.
        """
        now = self._clock()
        self._suspect_until = {replica_id: until for replica_id, until in self._suspect_until.items() if until > now}
        num_shared = self._shared.add(hint.block_hashes, hint.tail)
        candidates = [self._candidate(entry.id, hint, num_shared) for entry in replicas]
        chosen = policy.choose(candidates, excluded, self._rng)
        for replica in replicas:
            if replica.id == chosen:
                self._in_flight[chosen] += 1
                self._note_peaks(now)
                self._prefixes.add(chosen, hint.block_hashes)
                return replica
        raise NoReplica("No replica is ready to take the request; try again in a moment.")

    def _candidate(self, replica_id: str, hint: RoutingHint, num_shared: int) -> policy.Candidate:
        matched = self._prefixes.match(replica_id, hint.block_hashes)
        return policy.Candidate(
            replica_id,
            self._in_flight[replica_id] + self._from_others.get(replica_id, 0),
            matched,
            max(matched - num_shared, 0),
            replica_id in self._suspect_until,
        )

    def release(self, replica: Replica) -> None:
        """One sequence less in flight."""
        self._note_peaks(self._clock())
        self._in_flight[replica.id] -= 1
        if self._in_flight[replica.id] <= 0:
            del self._in_flight[replica.id]

    def failed(self, replica: Replica) -> None:
        """Avoid the replica for `penalty_s`, and expect its cache to be lost."""
        self._suspect_until[replica.id] = self._clock() + self._penalty_s
        self._prefixes.forget(replica.id)

    def report(self, loads: Mapping[str, int]) -> None:
        """Sequences that each replica says it has, by id; the latest report counts until the next.

        It tells of a moment up to REPORT_AGE_S ago: sequences of ours that have ended since are not taken for somebody else's.
        """
        self._note_peaks(self._clock())
        newer, older = self._peaks
        self._from_others = {replica_id: max(load - max(newer[replica_id], older[replica_id]), 0) for replica_id, load in loads.items()}

    def _note_peaks(self, now: float) -> None:
        num_periods = int((now - self._period_began) / REPORT_AGE_S)
        if num_periods:
            # Every change is noted, so in a whole period without a note the numbers were those of now.
            self._peaks = Counter(), self._peaks[0] if num_periods == 1 else Counter(self._in_flight)
            self._period_began = now
        for replica_id, count in self._in_flight.items():
            self._peaks[0][replica_id] = max(self._peaks[0][replica_id], count)

    def gone(self, replica_id: str) -> None:
        """The replica takes no more requests; what it had cached is of no use. Sequences that still run there are released as ever."""
        self._prefixes.forget(replica_id)
        self._from_others.pop(replica_id, None)

    def in_flight(self, replica: Replica) -> int:
        """Sequences open there."""
        return self._in_flight[replica.id]


class StaticReplicas:
    """A ReplicaDirectory over a list that never changes."""

    def __init__(self, replicas: Sequence[Replica], loads: LoadTable | None = None) -> None:
        self._replicas = tuple(replicas)
        self._loads = loads or LoadTable()

    async def choose(self, hint: RoutingHint, excluded: frozenset[str]) -> Replica:
        """See ReplicaDirectory."""
        return self._loads.pick(self._replicas, excluded, hint)

    def release(self, replica: Replica) -> None:
        """See ReplicaDirectory."""
        self._loads.release(replica)

    def failed(self, replica: Replica) -> None:
        """See ReplicaDirectory."""
        self._loads.failed(replica)

    def known(self) -> Sequence[Replica]:
        """See ReplicaDirectory."""
        return self._replicas

    def missing(self) -> Sequence[str]:
        """See ReplicaDirectory."""
        return ()
