"""Which replica takes a request: a pure choice over what the caller knows, so that it is tested without a cluster."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

MIN_PREFIX_BLOCKS = 4
"""A shorter match (a system prompt's first words) is no reason to prefer a replica."""
MAX_LEAD = 8
LEAD_FACTOR = 1.5
"""A replica with this many more sequences than the least loaded one, and this many times as many, gets no more for its prefix."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica as the policy sees it.

    Attributes:
        load: sequences that are, or will be, in it: from this gateway and, as far as known, from others.
        prefix_blocks: full KV blocks at the beginning of the prompt that it probably has in its prefix cache.
        suspect: it failed a moment ago; taken only if no other is left.
    """

    id: str
    load: int
    prefix_blocks: int = 0
    suspect: bool = False


def choose(candidates: Sequence[Candidate], excluded: frozenset[str], rng: random.Random) -> str | None:
    """The id of the candidate with the longest prefix, unless it is overloaded, else of the least loaded one; ties are drawn from `rng`.

    Returns:
        None: every candidate is excluded.
    """
    left = [candidate for candidate in candidates if candidate.id not in excluded]
    left = [candidate for candidate in left if not candidate.suspect] or left
    if not left:
        return None
    least = min(candidate.load for candidate in left)
    longest = max((candidate.prefix_blocks for candidate in left if not _overloaded(candidate.load, least)), default=0)
    if longest >= MIN_PREFIX_BLOCKS:
        left = [candidate for candidate in left if candidate.prefix_blocks == longest and not _overloaded(candidate.load, least)]
        least = min(candidate.load for candidate in left)
    tied = [candidate.id for candidate in left if candidate.load == least]
    return tied[0] if len(tied) == 1 else rng.choice(tied)


def _overloaded(load: int, least: int) -> bool:
    return load - least > MAX_LEAD and load > LEAD_FACTOR * least
