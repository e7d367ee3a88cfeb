"""Which replica takes a request: a pure choice over what the caller knows, so that it is tested
without a cluster."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

BLOCKS_PER_SEQUENCE = 10
"""KV blocks of a prompt whose computation delays an answer as much as one more running sequence
does: some 20 ms on a GPU."""
FREE_LEAD = 2
"""Sequences that a replica may have more than the least loaded one before they count against its
prefix: loads change that fast."""
MAX_LEAD = 8
LEAD_FACTOR = 1.5
"""A replica with this many more sequences than the least loaded one, and this many times as many,
gets no more for its prefix."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica as the policy sees it.

    Attributes:
        id: the replica's key (`cluster.fleet.table.Replica`).
        load: sequences that are, or will be, in it: from this gateway and, as far as known, from
            others.
        prefix_blocks: full KV blocks at the beginning of the prompt that it probably has in its
            prefix cache.
        own_blocks: those of them beyond what unrelated prompts begin with as well, such as a system
            message.
        suspect: it failed a moment ago; taken only if no other is left.
    """

    id: str
    load: int
    prefix_blocks: int = 0
    own_blocks: int = 0
    suspect: bool = False


def choose(candidates: Sequence[Candidate], excluded: frozenset[str], rng: random.Random) -> str | None:
    """Return the id of the candidate whose prefix is worth most against its load, else of the least
    loaded one.

    What unrelated prompts share is worth nothing, or all of them would go where the first one went;
    among equally loaded candidates it decides nevertheless. Ties are drawn from `rng`.

    Returns:
        None: every candidate is excluded.
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
    """Return the blocks that the candidate saves, less what its load beyond `least` costs."""
    if _overloaded(candidate.load, least):
        return 0
    return candidate.own_blocks - BLOCKS_PER_SEQUENCE * max(candidate.load - least - FREE_LEAD, 0)


def _overloaded(load: int, least: int) -> bool:
    return load - least > MAX_LEAD and load > LEAD_FACTOR * least
