"""The replicas a gateway knows, and how busy it keeps each. One interface: a static list here, Ray
Serve's in `cluster/serve`."""

import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cluster.fleet import policy
from cluster.fleet.prefixes import PrefixIndex, SharedBeginnings
from workers.errors import NoReplica


@dataclass(frozen=True, slots=True)
class Replica:
    """One engine, from its start to its end.

    Attributes:
        id: a label in metrics; an engine that is started again may have the id, and the address, of
            the one before.
        address: of its engine gRPC server, as gRPC names it: `host:port` or `unix:PATH`.
        start_id: drawn at random by the engine at its start.
        secret: what the engine wants to be sent with each call; empty: nothing.
    """

    id: str
    address: str
    start_id: str = ""
    secret: str = field(default="", repr=False)

    @property
    def key(self) -> str:
        """Names this engine and none that had, or will have, its id."""
        return f"{self.id}@{self.start_id}" if self.start_id else self.id


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
        """A replica whose key is not excluded; it counts as busier until `release`.

        Raises:
            NoReplica: none is left.
        """

    def release(self, replica: Replica) -> None:
        """The sequence that `choose` was called for has ended there."""

    def failed(self, replica: Replica) -> None:
        """The replica could not be reached or died: avoid it for a short time. `release` comes as
        well."""

    def known(self) -> Sequence[Replica]:
        """All replicas that requests may go to, reachable or not."""

    def missing(self) -> Sequence[str]:
        """Ids of replicas that should be there and have no address: they died and start again."""


REPORT_AGE_S = 4.0
"""A report may be this old when it comes: Serve asks engines every 2 s and passes on what it
heard."""


class LoadTable:
    """What this gateway knows about replicas: its own sequences in flight, what was sent where,
    recent failures, and the loads that they report, in which other gateways' sequences count.

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
        self._silent: set[str] = set()

    def pick(self, replicas: Sequence[Replica], excluded: frozenset[str], hint: RoutingHint) -> Replica:
        """The policy's choice, counted as in flight and as having the prompt.

        Raises:
            NoReplica: all of `replicas` are excluded.
        """
        now = self._clock()
        self._suspect_until = {key: until for key, until in self._suspect_until.items() if until > now}
        num_shared = self._shared.add(hint.block_hashes, hint.tail)
        candidates = [self._candidate(entry.key, hint, num_shared) for entry in replicas]
        chosen = policy.choose(candidates, excluded, self._rng)
        for replica in replicas:
            if replica.key == chosen:
                self._in_flight[chosen] += 1
                self._note_peaks(now)
                self._prefixes.add(chosen, hint.block_hashes)
                return replica
        raise NoReplica("No replica is ready to take the request; try again in a moment.")

    def _candidate(self, key: str, hint: RoutingHint, num_shared: int) -> policy.Candidate:
        matched = self._prefixes.match(key, hint.block_hashes)
        return policy.Candidate(
            key,
            self._in_flight[key] + self._from_others.get(key, 0),
            matched,
            max(matched - num_shared, 0),
            key in self._suspect_until or key in self._silent,
        )

    def release(self, replica: Replica) -> None:
        """One sequence less in flight."""
        self._note_peaks(self._clock())
        self._in_flight[replica.key] -= 1
        if self._in_flight[replica.key] <= 0:
            del self._in_flight[replica.key]

    def failed(self, replica: Replica) -> None:
        """Avoid the replica for `penalty_s`, and expect its cache to be lost."""
        self._suspect_until[replica.key] = self._clock() + self._penalty_s
        self._prefixes.forget(replica.key)

    def silent(self, replica: Replica, is_silent: bool) -> None:
        """Avoid the replica as long as it does not answer."""
        (self._silent.add if is_silent else self._silent.discard)(replica.key)

    def report(self, loads: Mapping[str, int]) -> None:
        """Sequences that each replica says it has, by key; the latest report counts until the next.

        It tells of a moment up to REPORT_AGE_S ago: sequences of ours that have ended since are not
        taken for somebody else's.
        """
        self._note_peaks(self._clock())
        newer, older = self._peaks
        self._from_others = {key: max(load - max(newer[key], older[key]), 0) for key, load in loads.items()}

    def _note_peaks(self, now: float) -> None:
        num_periods = int((now - self._period_began) / REPORT_AGE_S)
        if num_periods:
            # Every change is noted, so in a whole period without a note the numbers were those of
            # now.
            self._peaks = Counter(), self._peaks[0] if num_periods == 1 else Counter(self._in_flight)
            self._period_began = now
        for key, count in self._in_flight.items():
            self._peaks[0][key] = max(self._peaks[0][key], count)

    def gone(self, replica: Replica) -> None:
        """The replica takes no more requests; what it had cached is of no use. Sequences that still
        run there are released as ever."""
        self._prefixes.forget(replica.key)
        self._from_others.pop(replica.key, None)
        self._silent.discard(replica.key)

    def in_flight(self, replica: Replica) -> int:
        """Sequences open there."""
        return self._in_flight[replica.key]


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
