"""KV blocks of every sequence in both groups: allocated as it grows, freed once outside the window,
and found again by prefix.

Both tables of a sequence are indexed by position // BLOCK_SIZE. In the sliding group an entry is
NULL_BLOCK where the block left the window or was skipped by a prefix hit. A group without layers
has no blocks and its tables stay empty.
"""

from collections import Counter
from collections.abc import Sequence

from workers.config import BLOCK_SIZE
from workers.errors import ConfigError
from workers.kv_cache.block_pool import NULL_BLOCK
from workers.kv_cache.prefix_cache import (
    CachedPrefix,
    PrefixCache,
    append_hash,
    extend_hashes,
    first_visible_block,
    pack_tokens,
)


def num_blocks_for(num_tokens: int) -> int:
    """Return the number of blocks that hold `num_tokens` positions from 0 on."""
    return -(-num_tokens // BLOCK_SIZE)


def sliding_blocks_per_sequence(window: int, num_tokens: int) -> int:
    """Return the sliding blocks that one sequence of `num_tokens` needs at once to advance by at
    least a block: those visible to the query at the start of a block, and that block."""
    return min(num_blocks_for(window - 1) + 1, num_blocks_for(num_tokens))


class SequenceBlocks:
    """One sequence's part of the KV cache; changed only by the manager.

    Args:
        root: `hash_root` of the request.
    Attributes:
        full, sliding: block tables.
        capacity: number of positions from 0 that have blocks.
        keys: hashes of the sequence's full blocks so far; kept over preemption.
    """

    __slots__ = (
        "capacity",
        "committable",
        "first_sliding",
        "full",
        "keys",
        "num_committed",
        "parent",
        "root",
        "sliding",
        "wanted_free",
        "wanted_key",
    )

    def __init__(self, root: bytes = b"") -> None:
        self.root = root
        self.full: list[int] = []
        self.sliding: list[int] = []
        self.capacity = 0
        self.keys: list[bytes] = []
        # First index of `sliding` that may hold a block.
        self.first_sliding = 0
        # The first num_committed blocks are in the prefix cache; `parent` is the last of these
        # prefixes.
        self.num_committed = 0
        self.parent: CachedPrefix | None = None
        self.committable = True
        # Free blocks (full, sliding) without which the last `admit` failed. It is not retried with
        # fewer unless the first missing block has been computed since: a sequence with the same
        # prefix is then running, and less remains to compute.
        self.wanted_free = (0, 0)
        self.wanted_key: bytes | None = None


class KVCacheManager:
    """The blocks of both groups and the prefix cache over them.

    Args:
        num_full_blocks, num_sliding_blocks: including NULL_BLOCK; 0 if the group has no layers.
        window: keys visible to a query of the sliding group, itself included; None if no layer
            slides.
        prefix_caching: whether full blocks are found again by hash.
    Raises:
        ConfigError: the numbers of blocks and the window are inconsistent.
    """

    def __init__(
        self,
        *,
        num_full_blocks: int,
        num_sliding_blocks: int,
        window: int | None,
        prefix_caching: bool = True,
    ) -> None:
        if (window is None) != (num_sliding_blocks == 0):
            raise ConfigError(
                f"window {window} does not go with num_sliding_blocks {num_sliding_blocks}: a sliding group "
                f"has both"
            )
        if num_full_blocks == 0 and num_sliding_blocks == 0:
            raise ConfigError("num_full_blocks and num_sliding_blocks are both 0: there is no KV cache")
        self.window = window
        self.prefix_caching = prefix_caching
        self._cache = PrefixCache(num_full_blocks, num_sliding_blocks, window)
        self._full = self._cache.full
        self._sliding = self._cache.sliding
        self._has_full = num_full_blocks > 0
        self._has_sliding = num_sliding_blocks > 0
        self._live: dict[SequenceBlocks, None] = {}

    @property
    def usage(self) -> float:
        """Fraction of blocks that sequences hold, in the fuller group; 0 to 1. Cached blocks
        without references count as free."""
        return max(pool.num_used / pool.capacity for pool in (self._full, self._sliding) if pool.capacity)

    @property
    def num_free_blocks(self) -> tuple[int, int]:
        """Number of free blocks of the full and the sliding group."""
        return self._full.num_free, self._sliding.num_free

    def fits(self, num_tokens: int) -> bool:
        """Return whether a sequence can grow to `num_tokens` when it is alone."""
        return (not self._has_full or num_blocks_for(num_tokens) <= self._full.capacity) and (
            self.window is None
            or sliding_blocks_per_sequence(self.window, num_tokens) <= self._sliding.capacity
        )

    def admit(
        self, blocks: SequenceBlocks, token_ids: Sequence[int], max_cached: int | None = None
    ) -> int | None:
        """Give a sequence without blocks those of its longest cached prefix, if there is room to
        continue after it.

        There is room if the full group could hold all of `token_ids` now, and the sliding group
        what the sequence needs to advance. Only the prefix is allocated here; `grow` allocates the
        rest.

        Args:
            max_cached: maximum tokens to take from the cache; None for no limit.
        Returns:
            Number of tokens found, always less than all; None if there is no room, with nothing
            allocated.
        """
        assert blocks not in self._live, "admitted twice"
        if self._lacks(blocks.wanted_free) and (
            blocks.wanted_key is None or blocks.wanted_key not in self._cache
        ):
            return None
        chain: list[CachedPrefix] = []
        root = self._cache.root(blocks.root)
        if self.prefix_caching:
            extend_hashes(blocks.keys, token_ids, root=blocks.root)
            max_blocks = None if max_cached is None else max_cached // BLOCK_SIZE
            chain = self._cache.lookup(root, blocks.keys, token_ids, max_blocks)
        length = len(chain)
        first_sliding = (
            first_visible_block(length * BLOCK_SIZE, self.window) if self.window is not None else 0
        )
        blocks.wanted_free = self._wanted_free(chain, first_sliding, num_blocks_for(len(token_ids)))
        if self._lacks(blocks.wanted_free):
            next_key = blocks.keys[length] if length < len(blocks.keys) else None
            blocks.wanted_key = None if next_key is None or next_key in self._cache else next_key
            return None
        blocks.wanted_free, blocks.wanted_key = (0, 0), None
        for index, prefix in enumerate(chain):
            if self._has_full:
                self._full.acquire(prefix.full_block)
                blocks.full.append(prefix.full_block)
            if self._has_sliding:
                visible = index >= first_sliding
                if visible:
                    self._sliding.acquire(prefix.sliding_block)
                blocks.sliding.append(prefix.sliding_block if visible else NULL_BLOCK)
        blocks.first_sliding = first_sliding
        blocks.capacity = length * BLOCK_SIZE
        blocks.num_committed = length
        blocks.parent = chain[-1] if chain else root
        blocks.committable = self.prefix_caching
        self._live[blocks] = None
        return length * BLOCK_SIZE

    def _lacks(self, wanted_free: tuple[int, int]) -> bool:
        return self._full.num_free < wanted_free[0] or self._sliding.num_free < wanted_free[1]

    def _wanted_free(self, chain: list[CachedPrefix], first_sliding: int, num_blocks: int) -> tuple[int, int]:
        """Return the free blocks of each group that admission needs: new ones, and those of the
        chain without references."""
        full = sliding = 0
        if self._has_full:
            full = num_blocks - len(chain) + sum(self._full.is_free(prefix.full_block) for prefix in chain)
        if self.window is not None:
            visible = chain[first_sliding:]
            enough = sliding_blocks_per_sequence(self.window, num_blocks * BLOCK_SIZE)
            new = min(enough - len(visible), num_blocks - len(chain))
            sliding = new + sum(self._sliding.is_free(prefix.sliding_block) for prefix in visible)
        return full, sliding

    def grow(self, blocks: SequenceBlocks, num_computed_tokens: int, num_wanted: int) -> int:
        """Allocate blocks for up to `num_wanted` tokens after `num_computed_tokens`, as far as
        there are blocks, in both groups alike. Sliding blocks that no further query sees are freed
        first.

        Returns:
            Number of these tokens that have blocks now, 0 to `num_wanted`.
        """
        if self._has_sliding:
            self._free_behind_window(blocks, num_computed_tokens)
        missing = num_blocks_for(num_computed_tokens + num_wanted) - blocks.capacity // BLOCK_SIZE
        if self._has_full:
            missing = min(missing, self._full.num_free)
        if self._has_sliding:
            missing = min(missing, self._sliding.num_free)
        if missing > 0:
            if self._has_full:
                blocks.full += self._full.allocate(missing)
            if self._has_sliding:
                blocks.sliding += self._sliding.allocate(missing)
            blocks.capacity += missing * BLOCK_SIZE
        return min(num_wanted, blocks.capacity - num_computed_tokens)

    def _free_behind_window(self, blocks: SequenceBlocks, num_computed_tokens: int) -> None:
        assert self.window is not None
        first = min(first_visible_block(num_computed_tokens, self.window), len(blocks.sliding))
        if first > blocks.first_sliding:
            self._sliding.release(blocks.sliding[blocks.first_sliding : first])
            blocks.sliding[blocks.first_sliding : first] = [NULL_BLOCK] * (first - blocks.first_sliding)
            blocks.first_sliding = first

    def commit(self, blocks: SequenceBlocks, token_ids: Sequence[int], num_computed_tokens: int) -> None:
        """Make the full blocks among the first `num_computed_tokens` findable. Call it before
        `grow` frees blocks outside the window."""
        if not blocks.committable:
            return
        assert blocks.parent is not None, "committed without being admitted"
        target = num_computed_tokens // BLOCK_SIZE
        if not blocks.parent.alive:
            # Another sequence's block served our prefix and was evicted: put our own block in its
            # place.
            blocks.parent, blocks.num_committed = self._cache.root(blocks.root), 0
        keys = blocks.keys
        for index in range(blocks.num_committed, target):
            packed_tokens = pack_tokens(token_ids[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE])
            if index == len(keys):
                append_hash(keys, packed_tokens, blocks.root)
            prefix = self._cache.insert(
                blocks.parent,
                keys[index],
                packed_tokens,
                blocks.full[index] if self._has_full else NULL_BLOCK,
                blocks.sliding[index] if self._has_sliding else NULL_BLOCK,
            )
            if prefix is None:
                blocks.committable = False
                return
            blocks.parent = prefix
            blocks.num_committed = index + 1

    def release(self, blocks: SequenceBlocks) -> None:
        """Release all blocks. Committed ones stay findable until reused; the end of the sequence is
        reused first."""
        del self._live[blocks]
        self._full.release(reversed(blocks.full))
        self._sliding.release(reversed(blocks.sliding))
        blocks.full, blocks.sliding = [], []
        blocks.capacity = blocks.first_sliding = blocks.num_committed = 0
        blocks.parent = None

    def check_integrity(self) -> None:
        """Assert that tables, reference counts, free lists and prefix cache agree."""
        full: Counter[int] = Counter()
        sliding: Counter[int] = Counter()
        for blocks in self._live:
            assert not self._has_full or len(blocks.full) * BLOCK_SIZE == blocks.capacity, (
                "full table and capacity differ"
            )
            assert not self._has_sliding or len(blocks.sliding) * BLOCK_SIZE == blocks.capacity, (
                "sliding table and capacity differ"
            )
            assert NULL_BLOCK not in blocks.full, "NULL_BLOCK in a full table"
            assert all(block == NULL_BLOCK for block in blocks.sliding[: blocks.first_sliding]), (
                "a block is held behind the window"
            )
            assert NULL_BLOCK not in blocks.sliding[blocks.first_sliding :], (
                "a block is missing in the window"
            )
            full.update(blocks.full)
            sliding.update(blocks.sliding[blocks.first_sliding :])
        self._cache.check_integrity(dict(full), dict(sliding))
