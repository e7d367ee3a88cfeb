"""The pure choice of a replica, against its definition."""

import random

from hypothesis import given
from hypothesis import strategies as st

from cluster.router.policy import Candidate, choose

CANDIDATES = st.lists(
    st.builds(Candidate, id=st.sampled_from("abcdef"), in_flight=st.integers(0, 4), suspect=st.booleans()),
    max_size=6,
    unique_by=lambda candidate: candidate.id,
)


@given(CANDIDATES, st.frozensets(st.sampled_from("abcdef")), st.integers(0, 3))
def test_the_least_loaded_of_the_healthy_ones_is_chosen(candidates: list[Candidate], excluded: frozenset[str], seed: int) -> None:
    chosen = choose(candidates, excluded, random.Random(seed))
    left = [candidate for candidate in candidates if candidate.id not in excluded]
    if not left:
        assert chosen is None
        return
    winner = next(candidate for candidate in left if candidate.id == chosen)
    for other in left:
        # A healthy replica beats a suspect one, then the load decides.
        assert (winner.suspect, winner.in_flight) <= (other.suspect, other.in_flight)


def test_ties_are_drawn_from_the_seed_and_reach_every_replica() -> None:
    candidates = [Candidate(name, 1) for name in "abc"]
    rng = random.Random(7)
    drawn = [choose(candidates, frozenset(), rng) for _ in range(60)]
    again = random.Random(7)
    assert drawn == [choose(candidates, frozenset(), again) for _ in range(60)]
    assert set(drawn) == {"a", "b", "c"}
