"""The policy that picks a replica for a request: a pure function of the caller's knowledge, so that
it is tested without a cluster."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

BLOCKS_PER_SEQUENCE = 10
"""Number of prompt KV blocks whose computation delays an answer as much as one more running
sequence: some 20 ms on a GPU."""
FREE_LEAD = 2
"""Number of sequences that a replica may have beyond the least loaded one before they count against
its prefix: loads change that fast."""
MAX_LEAD = 8
LEAD_FACTOR = 1.5
"""Ratio to the least loaded replica's load. A replica above it, and more than FREE_LEAD ahead, gets
nothing more for its prefix."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica as the policy sees it.

    Attributes:
        id: the replica's key (`cluster.fleet.table.Replica`).
        load: number of sequences that it has or will have, from this gateway and, as far as known,
            from others.
        prefix_blocks: number of full KV blocks at the beginning of the prompt that are probably in
            its prefix cache.
        own_blocks: those of prefix_blocks that unrelated prompts do not begin with too, unlike a
            system message.
        suspect: whether it failed recently; it is chosen only if no other is left.
    """

    id: str
    load: int
    prefix_blocks: int = 0
    own_blocks: int = 0
    suspect: bool = False


def choose(candidates: Sequence[Candidate], excluded: frozenset[str], rng: random.Random) -> str | None:
    """Return the id of the candidate whose prefix is worth most against its load, else of the least
    loaded one.

    A prefix that unrelated prompts share counts as nothing; otherwise all of them would follow the
    first prompt. It does decide between equally loaded candidates. Ties are drawn from `rng`.

    Returns:
        None if every candidate is excluded.
    """
    left = [candidate for candidate in candidates if candidate.id not in excluded]
    left = [candidate for candidate in left if not candidate.suspect] or left
    if not left:
        return None
    least = min(candidate.load for candidate in left)
    worth = {candidate.id: _worth(candidate, least) for candidate in left}
    best = max(worth.values())
    if best > 0:
        left = [candidate for candidate in left if worth[candidate.id] == best]
    first = min((candidate.load, -candidate.prefix_blocks) for candidate in left)
    tied = [candidate.id for candidate in left if (candidate.load, -candidate.prefix_blocks) == first]
    return tied[0] if len(tied) == 1 else rng.choice(tied)


def _worth(candidate: Candidate, least: int) -> int:
    """Return the number of blocks that the candidate saves, minus the cost of its load beyond
    `least`."""
    if _overloaded(candidate.load, least):
        return 0
    return candidate.own_blocks - BLOCKS_PER_SEQUENCE * max(candidate.load - least - FREE_LEAD, 0)


def _overloaded(load: int, least: int) -> bool:
    return load - least > MAX_LEAD and load > LEAD_FACTOR * least
