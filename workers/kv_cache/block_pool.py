"""The blocks of one KV group: their reference counts, and the order in which free ones are
reused."""

from collections import OrderedDict
from collections.abc import Callable, Iterable

NULL_BLOCK = 0
"""Id of the block of each KV group that is never handed out: it stands for freed or skipped blocks,
and padding is written to it."""


class BlockPool:
    """A fixed number of blocks with reference counts.

    A free block whose content is in the prefix cache keeps it until the block is allocated again.
    Free blocks are allocated in this order: those without cached content first, then the least
    recently used (after vLLM's `v1/core/block_pool.py`).

    Args:
        num_blocks: number of blocks, including NULL_BLOCK, which is never allocated; 0 if the group
            has no layers.
        on_evict: called with a cached block that is about to be allocated for new content.
    """

    def __init__(self, num_blocks: int, on_evict: Callable[[int], None]) -> None:
        self.num_blocks = num_blocks
        self._on_evict = on_evict
        self._ref_counts = [0] * num_blocks
        self._cached = [False] * num_blocks
        # The first entry is allocated next.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(NULL_BLOCK + 1, num_blocks))

    @property
    def capacity(self) -> int:
        """Maximum number of blocks in use at once."""
        return max(self.num_blocks - 1, 0)

    @property
    def num_free(self) -> int:
        """Number of blocks that `allocate` can return now, with cached content or without."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Number of blocks with references."""
        return self.capacity - len(self._free)

    def is_free(self, block: int) -> bool:
        """Return whether `block` has no references."""
        return block in self._free

    def allocate(self, count: int) -> list[int]:
        """Allocate `count` blocks (at most `num_free`) for new content, with one reference each.
        Evicts their cached content."""
        assert count <= len(self._free), f"{count} blocks asked for, {len(self._free)} are free"
        blocks = []
        for _ in range(count):
            block, _unused = self._free.popitem(last=False)
            self._ref_counts[block] = 1
            if self._cached[block]:
                self._cached[block] = False
                self._on_evict(block)
            blocks.append(block)
        return blocks

    def acquire(self, block: int) -> None:
        """Add a reference to a cached block, free or not."""
        assert self._cached[block], f"block {block} is not cached"
        if self._ref_counts[block] == 0:
            del self._free[block]
        self._ref_counts[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Drop one reference of each block, skipping NULL_BLOCK. Of the cached blocks freed here,
        the first are reused first."""
        for block in blocks:
            if block == NULL_BLOCK:
                continue
            assert self._ref_counts[block] > 0, f"block {block} is released, but no sequence holds it"
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                self._free[block] = None
                if not self._cached[block]:
                    self._free.move_to_end(block, last=False)

    def mark_cached(self, block: int) -> None:
        """Mark the content of `block`, which has references, as findable in the prefix cache."""
        assert self._ref_counts[block] > 0, f"block {block} is cached, but no sequence holds it"
        assert not self._cached[block], f"block {block} is cached already"
        self._cached[block] = True

    def forget(self, block: int) -> None:
        """Record that the prefix cache dropped the content of `block`; if free, it is reused
        next."""
        assert self._cached[block], f"block {block} is not cached"
        self._cached[block] = False
        if block in self._free:
            self._free.move_to_end(block, last=False)

    def check_integrity(self, expected_ref_counts: dict[int, int], cached: set[int]) -> None:
        """Assert that counts, free list and cached marks agree with each other and with the
        holders' counts.

        Args:
            expected_ref_counts: references by block; blocks without references may be omitted.
            cached: blocks that the prefix cache points to.
        """
        assert NULL_BLOCK not in self._free, "NULL_BLOCK is in the free list"
        assert NULL_BLOCK not in expected_ref_counts, "a sequence holds NULL_BLOCK"
        for block in range(NULL_BLOCK + 1, self.num_blocks):
            expected = expected_ref_counts.get(block, 0)
            assert self._ref_counts[block] == expected, (
                f"block {block} has {self._ref_counts[block]} references, {expected} are held"
            )
            assert (block in self._free) == (expected == 0), (
                f"block {block} with {expected} references: in free list {block in self._free}"
            )
            assert self._cached[block] == (block in cached), (
                f"block {block}: marked cached {self._cached[block]}, in cache {block in cached}"
            )
        assert len(self._free) <= self.capacity, "the free list holds blocks that do not exist"
        assert all(0 < block < self.num_blocks for block in expected_ref_counts), (
            "a sequence holds a block that does not exist"
        )
