"""The prefix cache: full blocks found again by a chained hash of their tokens. The tokens are
compared before a block is reused."""

import hashlib
import json
import sys
from array import array
from collections.abc import Sequence
from weakref import WeakValueDictionary

from workers.config import BLOCK_SIZE
from workers.kv_cache.block_pool import NULL_BLOCK, BlockPool

HASH_BYTES = 16


def pack_tokens(token_ids: Sequence[int]) -> bytes:
    """Return token ids as little-endian int64: equal bytes are equal tokens."""
    packed = array("q", token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def hash_root(adapter: str | None, cache_salt: str | None) -> bytes:
    """Return the value that replaces the hash before the first block: requests share blocks only if
    they agree in both arguments. It is the same in every process, and b"" without either."""
    if adapter is None and cache_salt is None:
        return b""
    # As JSON, which distinguishes None from text and one field from the next.
    content = json.dumps([adapter, cache_salt]).encode()
    return hashlib.blake2b(content, digest_size=HASH_BYTES, person=b"cantata-kv-root").digest()


def hash_block(parent: bytes, packed_tokens: bytes) -> bytes:
    """Return the hash of a block that follows `parent`, the hash of the block before it
    (`hash_root` for the first): BLAKE2b-128 over the parent and `pack_tokens` of the block. It is
    the same in every process; router and engines compare these."""
    return hashlib.blake2b(parent + packed_tokens, digest_size=HASH_BYTES).digest()


def append_hash(hashes: list[bytes], packed_tokens: bytes, root: bytes = b"") -> None:
    """Append the hash of the next block to a chain that starts from `root`."""
    hashes.append(hash_block(hashes[-1] if hashes else root, packed_tokens))


def extend_hashes(
    hashes: list[bytes], token_ids: Sequence[int], block_size: int = BLOCK_SIZE, root: bytes = b""
) -> None:
    """Append to `hashes`, the chain over the first blocks of `token_ids`, the hashes of the further
    full blocks."""
    for start in range(len(hashes) * block_size, len(token_ids) - block_size + 1, block_size):
        append_hash(hashes, pack_tokens(token_ids[start : start + block_size]), root)


def block_hashes(token_ids: Sequence[int], block_size: int = BLOCK_SIZE, root: bytes = b"") -> list[bytes]:
    """Return the chained hash of each full block: entry i stands for all tokens up to `(i + 1) *
    block_size`.

    Args:
        root: `hash_root` of the request.
    """
    hashes: list[bytes] = []
    extend_hashes(hashes, token_ids, block_size, root)
    return hashes


class CachedPrefix:
    """A full block of tokens after a given parent. Identity counts: a child belongs to exactly this
    object, not to its hash.

    Attributes:
        packed_tokens: the block's tokens.
        full_block, sliding_block: blocks that hold its KV; NULL_BLOCK if the group has no layers or
            the block was evicted.
        alive: True while it is in the cache. A root, of length 0, always is.
    """

    __slots__ = ("__weakref__", "alive", "full_block", "key", "packed_tokens", "parent", "sliding_block")

    def __init__(self, parent: "CachedPrefix | None", key: bytes, packed_tokens: bytes) -> None:
        self.parent = parent
        self.key = key
        self.packed_tokens = packed_tokens
        self.full_block = NULL_BLOCK
        self.sliding_block = NULL_BLOCK
        self.alive = True


class PrefixCache:
    """Finds blocks of both groups by the tokens up to their end. Owns no references, only the
    pools' `cached` marks.

    A prefix lives as long as its *anchor*: the full block, or the sliding block if no layer is
    full. Evicting the anchor forgets both blocks. With an anchor in the full group a chain loses
    its end first (a sequence's last blocks are released first). If all layers slide, it loses its
    start first, so a prefix is found only while none of its blocks was reused.

    Args:
        num_full_blocks, num_sliding_blocks: size of each pool, including NULL_BLOCK; 0 if the group
        has no layers.
        window: keys visible to a query of the sliding group, itself included; None if no layer
            slides.
    """

    def __init__(self, num_full_blocks: int, num_sliding_blocks: int, window: int | None) -> None:
        # A root lives as long as a prefix or a sequence refers to it.
        self._roots: WeakValueDictionary[bytes, CachedPrefix] = WeakValueDictionary()
        self.full = BlockPool(num_full_blocks, self._on_full_evicted)
        self.sliding = BlockPool(num_sliding_blocks, self._on_sliding_evicted)
        self._window = window
        self._by_key: dict[bytes, CachedPrefix] = {}
        self._by_full_block: dict[int, CachedPrefix] = {}
        self._by_sliding_block: dict[int, CachedPrefix] = {}

    def __len__(self) -> int:
        """Return the number of prefixes that can be found."""
        return len(self._by_key)

    def __contains__(self, key: bytes) -> bool:
        """Return whether a block with this chained hash can be found."""
        return key in self._by_key

    def root(self, key: bytes = b"") -> CachedPrefix:
        """Return the prefix of no tokens with which chains from `key`, a `hash_root`, begin. Blocks
        of different roots are never shared, whatever their hashes."""
        root = self._roots.get(key)
        if root is None:
            root = self._roots[key] = CachedPrefix(None, key, b"")
        return root

    def lookup(
        self,
        root: CachedPrefix,
        keys: Sequence[bytes],
        token_ids: Sequence[int],
        max_blocks: int | None = None,
    ) -> list[CachedPrefix]:
        """Return the longest chain of `token_ids` after which a sequence can start, at least one
        token shorter than all.

        A chain of L blocks needs the full blocks of all, and the sliding blocks visible to the
        query at position L * BLOCK_SIZE (later queries see fewer of them).

        Args:
            keys: `block_hashes(token_ids)` from that root.
            max_blocks: maximum length of the chain; None for no limit.
        """
        chain: list[CachedPrefix] = []
        parent = root
        usable = 0
        run = 0  # sliding blocks present without a gap at the end of the chain
        longest = (len(token_ids) - 1) // BLOCK_SIZE
        for index in range(longest if max_blocks is None else min(longest, max_blocks)):
            entry = self._by_key.get(keys[index])
            if entry is None or entry.parent is not parent:
                break
            if entry.packed_tokens != pack_tokens(token_ids[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE]):
                break
            chain.append(entry)
            parent = entry
            length = index + 1
            run = run + 1 if entry.sliding_block != NULL_BLOCK else 0
            if self._window is None or run >= length - first_visible_block(length * BLOCK_SIZE, self._window):
                usable = length
        return chain[:usable]

    def insert(
        self, parent: CachedPrefix, key: bytes, packed_tokens: bytes, full_block: int, sliding_block: int
    ) -> CachedPrefix | None:
        """Make a computed block findable after `parent`, which is alive.

        If the same prefix is cached already, its blocks stay, and only those it lacks are added.
        Another prefix under the same key (a collision, or one after a parent that is gone) is
        replaced.

        Args:
            full_block, sliding_block: blocks that the caller holds; NULL_BLOCK if none.
        Returns:
            The cached prefix; None if it is not cached and the caller has no anchor for it.
        """
        entry = self._by_key.get(key)
        if entry is not None and (entry.parent is not parent or entry.packed_tokens != packed_tokens):
            self._remove(entry)
            entry = None
        if entry is None:
            if (full_block if self.full.num_blocks else sliding_block) == NULL_BLOCK:
                return None
            entry = CachedPrefix(parent, key, packed_tokens)
            self._by_key[key] = entry
        if entry.full_block == NULL_BLOCK and full_block != NULL_BLOCK:
            entry.full_block = full_block
            self._by_full_block[full_block] = entry
            self.full.mark_cached(full_block)
        if entry.sliding_block == NULL_BLOCK and sliding_block != NULL_BLOCK:
            entry.sliding_block = sliding_block
            self._by_sliding_block[sliding_block] = entry
            self.sliding.mark_cached(sliding_block)
        return entry

    def _on_full_evicted(self, block: int) -> None:
        entry = self._by_full_block.pop(block)
        entry.full_block = NULL_BLOCK
        self._remove(entry)

    def _on_sliding_evicted(self, block: int) -> None:
        entry = self._by_sliding_block.pop(block)
        entry.sliding_block = NULL_BLOCK
        if not self.full.num_blocks:
            self._remove(entry)

    def _remove(self, entry: CachedPrefix) -> None:
        entry.alive = False
        entry.parent = None
        del self._by_key[entry.key]
        if entry.full_block != NULL_BLOCK:
            del self._by_full_block[entry.full_block]
            self.full.forget(entry.full_block)
            entry.full_block = NULL_BLOCK
        if entry.sliding_block != NULL_BLOCK:
            del self._by_sliding_block[entry.sliding_block]
            self.sliding.forget(entry.sliding_block)
            entry.sliding_block = NULL_BLOCK

    def check_integrity(self, full_ref_counts: dict[int, int], sliding_ref_counts: dict[int, int]) -> None:
        """Assert that prefixes and pools agree. References are given by block, as counted by their
        holders."""
        for key, entry in self._by_key.items():
            assert entry.alive, "a removed prefix can be found"
            assert entry.key == key, "a prefix is filed under another key"
            assert len(entry.packed_tokens) == 8 * BLOCK_SIZE, (
                "a cached prefix does not hold the tokens of a block"
            )
            anchor = entry.full_block if self.full.num_blocks else entry.sliding_block
            assert anchor != NULL_BLOCK, "a prefix has lost its anchor"
        for blocks, name in ((self._by_full_block, "full_block"), (self._by_sliding_block, "sliding_block")):
            for block, entry in blocks.items():
                assert getattr(entry, name) == block, f"{name} {block} points at a prefix that is elsewhere"
                assert self._by_key.get(entry.key) is entry, (
                    f"{name} {block} points at a prefix that cannot be found"
                )
        assert len(self._by_full_block) == sum(
            entry.full_block != NULL_BLOCK for entry in self._by_key.values()
        )
        assert len(self._by_sliding_block) == sum(
            entry.sliding_block != NULL_BLOCK for entry in self._by_key.values()
        )
        self.full.check_integrity(full_ref_counts, set(self._by_full_block))
        self.sliding.check_integrity(sliding_ref_counts, set(self._by_sliding_block))


def first_visible_block(position: int, window: int) -> int:
    """Return the index of the first block with a key visible to the query at `position` or a later
    one: keys are (position - window, position]."""
    return max(position - window + 1, 0) // BLOCK_SIZE
