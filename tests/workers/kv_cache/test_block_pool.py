"""The block pool against a plain list: who gets which block next, and what is evicted for it."""

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from workers.kv_cache.block_pool import NULL_BLOCK, BlockPool


class BlockPoolMachine(RuleBasedStateMachine):
    """`order` is the free list: the next block to be handed out first."""

    @initialize(num_blocks=st.integers(1, 12))
    def build(self, num_blocks):
        self.evicted = []
        self.pool = BlockPool(num_blocks, self.evicted.append)
        self.order = list(range(1, num_blocks))
        self.held: list[int] = []  # a block for each reference
        self.cached: set[int] = set()

    @rule(count=st.integers(0, 4))
    def allocate(self, count):
        count = min(count, self.pool.num_free)
        self.evicted.clear()
        blocks = self.pool.allocate(count)
        assert blocks == self.order[:count]
        assert self.evicted == [block for block in blocks if block in self.cached]
        self.order = self.order[count:]
        self.held += blocks
        self.cached -= set(blocks)

    @rule(positions=st.lists(st.integers(0, 11), max_size=4, unique=True))
    def release(self, positions):
        blocks = [self.held[position] for position in positions if position < len(self.held)]
        for block in blocks:
            self.held.remove(block)
        self.pool.release([NULL_BLOCK, *blocks])
        for index, block in enumerate(blocks):
            if block not in self.held and block not in blocks[index + 1 :]:
                self.order = [*self.order, block] if block in self.cached else [block, *self.order]

    @rule(position=st.integers(0, 11))
    def cache(self, position):
        if position < len(self.held) and self.held[position] not in self.cached:
            self.pool.mark_cached(self.held[position])
            self.cached.add(self.held[position])

    @rule(position=st.integers(0, 11))
    def acquire(self, position):
        cached = sorted(self.cached)
        if position < len(cached):
            block = cached[position]
            assert self.pool.is_free(block) == (block in self.order)
            self.pool.acquire(block)
            self.held.append(block)
            self.order = [entry for entry in self.order if entry != block]

    @rule(position=st.integers(0, 11))
    def forget(self, position):
        cached = sorted(self.cached)
        if position < len(cached):
            block = cached[position]
            self.pool.forget(block)
            self.cached.remove(block)
            if block in self.order:
                self.order = [block, *(entry for entry in self.order if entry != block)]

    @invariant()
    def everything_agrees(self):
        if hasattr(self, "pool"):
            self.pool.check_integrity({block: self.held.count(block) for block in self.held}, self.cached)
            assert self.pool.num_free == len(self.order)
            assert self.pool.num_used == len(set(self.held))


BlockPoolMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestBlockPoolProperties = BlockPoolMachine.TestCase


def no_eviction(block: int) -> None:
    raise AssertionError(f"block {block} was evicted")


def test_cached_free_blocks_are_reused_last_and_oldest_first() -> None:
    evicted: list[int] = []
    pool = BlockPool(5, evicted.append)
    blocks = pool.allocate(4)
    for block in blocks[:3]:
        pool.mark_cached(block)
    pool.release([blocks[1]])
    pool.release([blocks[0], blocks[3], blocks[2]])
    pool.acquire(blocks[1])
    pool.release([blocks[1]])  # used again: now the last to go
    assert pool.allocate(4) == [blocks[3], blocks[0], blocks[2], blocks[1]]
    assert evicted == [blocks[0], blocks[2], blocks[1]]


@pytest.mark.parametrize("num_blocks", [0, 1])
def test_a_pool_without_usable_blocks_is_empty(num_blocks: int) -> None:
    pool = BlockPool(num_blocks, no_eviction)
    assert (pool.capacity, pool.num_free, pool.num_used) == (0, 0, 0)
    assert pool.allocate(0) == []
    with pytest.raises(AssertionError, match="1 blocks asked for, 0 are free"):
        pool.allocate(1)


def test_misuse_is_caught() -> None:
    pool = BlockPool(3, no_eviction)
    [block] = pool.allocate(1)
    with pytest.raises(AssertionError, match="not cached"):
        pool.acquire(block)
    pool.mark_cached(block)
    with pytest.raises(AssertionError, match="cached already"):
        pool.mark_cached(block)
    pool.release([block])
    with pytest.raises(AssertionError, match="no sequence holds it"):
        pool.release([block])


@pytest.mark.parametrize(
    ("references", "cached", "message"),
    [
        ({}, set(), "block 1 has 1 references, 0 are held"),
        ({1: 2}, set(), "block 1 has 1 references, 2 are held"),
        ({1: 1}, {2}, "block 2: marked cached False"),
        ({1: 1, 0: 1}, set(), "holds NULL_BLOCK"),
        ({1: 1, 7: 1}, set(), "does not exist"),
    ],
)
def test_integrity_check_finds_what_is_wrong(
    references: dict[int, int], cached: set[int], message: str
) -> None:
    pool = BlockPool(4, no_eviction)
    assert pool.allocate(1) == [1]
    pool.check_integrity({1: 1}, set())
    with pytest.raises(AssertionError, match=message):
        pool.check_integrity(references, cached)
