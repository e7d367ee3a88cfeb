"""The garbage collector of an engine process: young objects are left alone for long, cycles are
found all the same."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from workers.engine.collector import spare_collections


class Node:
    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*before)


def num_collections() -> int:
    return sum(int(generation["collections"]) for generation in gc.get_stats())


def test_what_a_step_makes_sets_off_no_collection() -> None:
    spare_collections()
    before = num_collections()
    step = [[index] for index in range(2 * 1024)]
    assert len(step) == 2048
    assert num_collections() == before


def test_the_model_is_not_looked_at_again() -> None:
    loaded = [Node() for _ in range(100)]
    spare_collections()
    assert gc.get_freeze_count() > len(loaded)
    looked_at = {id(tracked) for tracked in gc.get_objects()}
    assert not looked_at & {id(node) for node in loaded}


def test_cycles_are_still_freed() -> None:
    spare_collections()
    gone = weakref.ref(Node())
    kept = []
    for _ in range(100_000):
        kept.append([])
        if gone() is None:
            break
    assert gone() is None
