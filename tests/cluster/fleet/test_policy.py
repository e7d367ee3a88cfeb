"""The pure choice of a replica, against its definition."""

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from cluster.fleet.policy import BLOCKS_PER_SEQUENCE, FREE_LEAD, LEAD_FACTOR, MAX_LEAD, Candidate, choose

CANDIDATES = st.lists(
    st.builds(
        Candidate,
        id=st.sampled_from("abcdef"),
        load=st.integers(0, 30),
        prefix_blocks=st.sampled_from([0, 1, 3, 40]),
        own_blocks=st.sampled_from([0, 1, 5, 31, 100]),
        suspect=st.booleans(),
    ),
    max_size=6,
    unique_by=lambda candidate: candidate.id,
)


@given(CANDIDATES, st.frozensets(st.sampled_from("abcdef")), st.integers(0, 3))
def test_the_choice_is_the_one_defined(
    candidates: list[Candidate], excluded: frozenset[str], seed: int
) -> None:
    chosen = choose(candidates, excluded, random.Random(seed))
    left = [candidate for candidate in candidates if candidate.id not in excluded]
    if not left:
        assert chosen is None
        return
    healthy = [candidate for candidate in left if not candidate.suspect] or left
    winner = next(candidate for candidate in healthy if candidate.id == chosen)
    least = min(candidate.load for candidate in healthy)
    worth = {}
    for candidate in healthy:
        lead = max(candidate.load - least - FREE_LEAD, 0)
        free = candidate.load <= max(least + MAX_LEAD, LEAD_FACTOR * least)
        worth[candidate.id] = candidate.own_blocks - BLOCKS_PER_SEQUENCE * lead if free else 0
    best = [candidate for candidate in healthy if worth[candidate.id] == max(worth.values())]
    if worth[winner.id] <= 0:
        assert max(worth.values()) <= 0
        best = healthy
    assert winner in best
    assert (winner.load, -winner.prefix_blocks) == min(
        (candidate.load, -candidate.prefix_blocks) for candidate in best
    )


def test_what_a_prefix_is_worth() -> None:
    """Two sequences more are free, each after them costs ten blocks; nine more and half as many
    again cost everything."""

    def stays(own_blocks: int, load: int, load_of_other: int = 0) -> bool:
        candidates = [Candidate("home", load, own_blocks=own_blocks), Candidate("other", load_of_other)]
        return choose(candidates, frozenset(), random.Random(0)) == "home"

    assert stays(1, 2)
    assert not stays(0, 2)
    assert (stays(11, 3), stays(10, 3)) == (True, False)
    assert (stays(61, 8), stays(60, 8)) == (True, False)
    assert (stays(1000, 8), stays(1000, 9)) == (True, False)
    assert (stays(1000, 30, 20), stays(1000, 31, 20)) == (True, False)


def test_a_prefix_that_unrelated_prompts_share_decides_between_equal_loads_only() -> None:
    def chosen(load_of_holder: int) -> set[str | None]:
        candidates = [Candidate("a", 3), Candidate("b", load_of_holder, prefix_blocks=1), Candidate("c", 3)]
        return {choose(candidates, frozenset(), random.Random(seed)) for seed in range(20)}

    assert chosen(3) == {"b"}
    assert chosen(4) == {"a", "c"}


def test_ties_are_drawn_from_the_seed_and_reach_every_replica() -> None:
    candidates = [Candidate(name, 1) for name in "abc"]
    rng = random.Random(7)
    drawn = [choose(candidates, frozenset(), rng) for _ in range(60)]
    again = random.Random(7)
    assert drawn == [choose(candidates, frozenset(), again) for _ in range(60)]
    assert set(drawn) == {"a", "b", "c"}


def test_a_prefix_that_everybody_shares_does_not_pile_up_on_one_replica() -> None:
    rng = random.Random(1)
    loads = Counter(dict.fromkeys("abcd", 0))
    for _ in range(400):
        candidates = [
            Candidate(name, load, own_blocks=500 if name == "a" else 0) for name, load in loads.items()
        ]
        chosen = choose(candidates, frozenset(), rng)
        assert chosen is not None
        loads[chosen] += 1
    assert loads["a"] <= LEAD_FACTOR * min(loads.values()) + MAX_LEAD
