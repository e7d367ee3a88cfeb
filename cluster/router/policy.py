"""Which replica takes a request: a pure choice over what the caller knows, so that it is tested without a cluster."""

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica as the policy sees it.

    Attributes:
        in_flight: sequences that this gateway has open there.
        suspect: it failed a moment ago; taken only if no other is left.
    """

    id: str
    in_flight: int
    suspect: bool = False


def choose(candidates: Sequence[Candidate], excluded: frozenset[str], rng: random.Random) -> str | None:
    """The id of the candidate with the fewest sequences in flight; ties are drawn from `rng`. None: every candidate is excluded."""
    left = [candidate for candidate in candidates if candidate.id not in excluded]
    left = [candidate for candidate in left if not candidate.suspect] or left
    if not left:
        return None
    fewest = min(candidate.in_flight for candidate in left)
    tied = [candidate.id for candidate in left if candidate.in_flight == fewest]
    return tied[0] if len(tied) == 1 else rng.choice(tied)
