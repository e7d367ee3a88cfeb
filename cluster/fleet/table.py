"""The replicas a gateway knows and the load on each. One interface, with implementations here and
in `cluster/serve`."""

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
        id: a label in metrics. A restarted engine may have the id and the address of its
            predecessor.
        address: address of its gRPC server as gRPC spells it: `host:port` or `unix:PATH`.
        start_id: a random id drawn by the engine at its start.
        secret: the secret that the engine requires with each call; empty if none.
    """

    id: str
    address: str
    start_id: str = ""
    secret: str = field(default="", repr=False)

    @property
    def key(self) -> str:
        """Key of this engine process, unlike `id` never shared with a predecessor or successor."""
        return f"{self.id}@{self.start_id}" if self.start_id else self.id


@dataclass(frozen=True, slots=True)
class RoutingHint:
    """The facts about a request that the choice of a replica may depend on.

    Attributes:
        block_hashes: hashes of the prompt's full KV blocks, from its beginning; may be truncated.
        tail: hash of the tokens after these blocks; empty if they were truncated.
    """

    block_hashes: Sequence[bytes] = ()
    tail: bytes = b""


class ReplicaDirectory(Protocol):
    """The replicas that requests can be sent to. Every `choose` is followed by one `release`."""

    async def choose(self, hint: RoutingHint, excluded: frozenset[str]) -> Replica:
        """Return a replica whose key is not excluded. It counts as busier until `release`.

        Raises:
            NoReplica: none is left.
        """

    def release(self, replica: Replica) -> None:
        """Record that the sequence for which `choose` was called has ended there."""

    def failed(self, replica: Replica) -> None:
        """Avoid a replica for a short time because it could not be reached or died. `release` is
        called as well."""

    def known(self) -> Sequence[Replica]:
        """Return all replicas that may get requests, reachable or not."""

    def missing(self) -> Sequence[str]:
        """Return the ids of expected replicas without an address: they died and are restarting."""


REPORT_AGE_S = 4.0
"""Maximum age of a report in seconds on arrival: Serve polls engines every 2 s and then forwards
their reports."""


class LoadTable:
    """A gateway's knowledge of its replicas: its own sequences in flight, the prompts sent to each,
    recent failures, and reported loads, which include other gateways' sequences.

    Args:
        clock: returns monotonic seconds.
        penalty_s: seconds for which a failed replica is avoided while there are others.
        seed: seed of the draw between equally loaded replicas.
        prefixes: the prompts sent to each replica; None creates a new index.
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
        # Of the prompt that was looked up last, whose sequences come one after the other: blocks
        # that unrelated prompts have as well, blocks that replicas have, replicas it was sent to.
        self._hint: RoutingHint | None = None
        self._num_shared = 0
        self._matched: dict[str, int] = {}
        self._sent_to: set[str] = set()
        # Peaks of our own sequences in the current period of REPORT_AGE_S and in the previous one.
        self._peaks: tuple[Counter[str], Counter[str]] = Counter(), Counter()
        self._period_began = clock()
        # Reported load minus the most that may have been our own at that time: other gateways'
        # load.
        self._from_others: dict[str, int] = {}
        self._suspect_until: dict[str, float] = {}
        self._silent: set[str] = set()

    def pick(self, replicas: Sequence[Replica], excluded: frozenset[str], hint: RoutingHint) -> Replica:
        """Pick a replica by the policy, and count it as having the sequence and the prompt.

        Raises:
            NoReplica: all of `replicas` are excluded.
        """
        now = self._clock()
        self._suspect_until = {key: until for key, until in self._suspect_until.items() if until > now}
        self._look_up(hint)
        candidates = [self._candidate(entry.key, hint) for entry in replicas]
        chosen = policy.choose(candidates, excluded, self._rng)
        for replica in replicas:
            if replica.key == chosen:
                self._in_flight[chosen] += 1
                self._note_peaks(now)
                if chosen not in self._sent_to:
                    self._prefixes.add(chosen, hint.block_hashes)
                    self._sent_to.add(chosen)
                    self._matched[chosen] = len(hint.block_hashes)
                return replica
        raise NoReplica("No replica is ready to take the request; try again in a moment.")

    def _look_up(self, hint: RoutingHint) -> None:
        if hint is not self._hint:
            self._hint = hint
            self._num_shared = self._shared.add(hint.block_hashes, hint.tail)
            self._matched.clear()
            self._sent_to.clear()

    def _candidate(self, key: str, hint: RoutingHint) -> policy.Candidate:
        matched = self._matched.get(key)
        if matched is None:
            matched = self._matched[key] = self._prefixes.match(key, hint.block_hashes)
        return policy.Candidate(
            key,
            self._in_flight[key] + self._from_others.get(key, 0),
            matched,
            max(matched - self._num_shared, 0),
            key in self._suspect_until or key in self._silent,
        )

    def release(self, replica: Replica) -> None:
        """Count one sequence less in flight."""
        self._note_peaks(self._clock())
        self._in_flight[replica.key] -= 1
        if self._in_flight[replica.key] <= 0:
            del self._in_flight[replica.key]

    def failed(self, replica: Replica) -> None:
        """Avoid the replica for `penalty_s`, and assume that its cache is lost."""
        self._suspect_until[replica.key] = self._clock() + self._penalty_s
        self._forget_cache(replica)

    def silent(self, replica: Replica, is_silent: bool) -> None:
        """Avoid the replica while it does not answer."""
        (self._silent.add if is_silent else self._silent.discard)(replica.key)

    def report(self, loads: Mapping[str, int]) -> None:
        """Record the number of sequences that each replica reports, by key. The latest report holds
        until the next one.

        A report is up to REPORT_AGE_S old: sequences of ours that have ended since are not counted
        as another gateway's.
        """
        self._note_peaks(self._clock())
        newer, older = self._peaks
        self._from_others = {key: max(load - max(newer[key], older[key]), 0) for key, load in loads.items()}

    def _note_peaks(self, now: float) -> None:
        num_periods = int((now - self._period_began) / REPORT_AGE_S)
        if num_periods:
            # Every change is recorded, so in a whole period without a record the counts equalled
            # the current ones.
            self._peaks = Counter(), self._peaks[0] if num_periods == 1 else Counter(self._in_flight)
            self._period_began = now
        for key, count in self._in_flight.items():
            self._peaks[0][key] = max(self._peaks[0][key], count)

    def gone(self, replica: Replica) -> None:
        """Forget the cached prompts of a replica that gets no more requests. Its running sequences
        are released as usual."""
        self._forget_cache(replica)
        self._from_others.pop(replica.key, None)
        self._silent.discard(replica.key)

    def _forget_cache(self, replica: Replica) -> None:
        self._prefixes.forget(replica.key)
        self._matched.pop(replica.key, None)
        self._sent_to.discard(replica.key)

    def in_flight(self, replica: Replica) -> int:
        """Return the number of sequences open there."""
        return self._in_flight[replica.key]
