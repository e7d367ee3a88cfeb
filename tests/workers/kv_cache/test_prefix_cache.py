"""Block hashes, and which prefixes a lookup may hand out."""

import hashlib
import subprocess
import sys

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from workers.config import BLOCK_SIZE
from workers.kv_cache import prefix_cache
from workers.kv_cache.block_pool import NULL_BLOCK
from workers.kv_cache.prefix_cache import (
    PrefixCache,
    block_hashes,
    extend_hashes,
    first_visible_block,
    pack_tokens,
)


def tokens(num_blocks: int, *, first: int = 0) -> list[int]:
    return list(range(first, first + num_blocks * BLOCK_SIZE))


def insert_chain(cache: PrefixCache, token_ids: list[int], sliding: bool = True) -> list[tuple[int, int]]:
    """Commit all full blocks of a sequence and return (full, sliding) blocks, which stay held."""
    parent, blocks = cache.root(), []
    for index, key in enumerate(block_hashes(token_ids)):
        [full] = cache.full.allocate(1) if cache.full.num_blocks else [NULL_BLOCK]
        [slide] = cache.sliding.allocate(1) if cache.sliding.num_blocks and sliding else [NULL_BLOCK]
        entry = cache.insert(
            parent, key, pack_tokens(token_ids[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE]), full, slide
        )
        assert entry is not None
        parent = entry
        blocks.append((full, slide))
    return blocks


def release(cache: PrefixCache, blocks: list[tuple[int, int]]) -> None:
    cache.full.release(full for full, _ in reversed(blocks))
    cache.sliding.release(slide for _, slide in reversed(blocks))


def hit(cache: PrefixCache, token_ids: list[int]) -> int:
    return len(cache.lookup(cache.root(), block_hashes(token_ids), token_ids))


def test_hash_is_the_documented_one() -> None:
    token_ids = tokens(2, first=200_000)
    first = hashlib.blake2b(
        b"".join(token.to_bytes(8, "little") for token in token_ids[:16]), digest_size=16
    ).digest()
    second = hashlib.blake2b(
        first + b"".join(token.to_bytes(8, "little") for token in token_ids[16:]), digest_size=16
    ).digest()
    assert block_hashes([*token_ids, 1, 2, 3]) == [first, second]


def test_hashes_are_the_same_in_another_process() -> None:
    code = (
        "from workers.kv_cache.prefix_cache import block_hashes; "
        "print(b''.join(block_hashes(range(100))).hex())"
    )
    for seed in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert run.stdout.strip() == b"".join(block_hashes(range(100))).hex()


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 3), max_size=80),
    st.lists(st.integers(0, 3), max_size=80),
    st.sampled_from([1, 4, 16]),
)
def test_hashes_agree_exactly_as_far_as_the_full_blocks_do(
    left: list[int], right: list[int], block_size: int
) -> None:
    left_hashes, right_hashes = block_hashes(left, block_size), block_hashes(right, block_size)
    assert len(left_hashes) == len(left) // block_size
    for index, (left_hash, right_hash) in enumerate(zip(left_hashes, right_hashes, strict=False)):
        end = (index + 1) * block_size
        assert (left_hash == right_hash) == (left[:end] == right[:end])


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), max_size=100), st.integers(0, 100))
def test_hashes_can_be_extended_later(token_ids: list[int], cut: int) -> None:
    hashes = block_hashes(token_ids[:cut])
    extend_hashes(hashes, token_ids)
    assert hashes == block_hashes(token_ids)


def test_a_hit_leaves_a_token_to_compute() -> None:
    cache = PrefixCache(20, 0, None)
    insert_chain(cache, tokens(4))
    assert [hit(cache, tokens(4)[:length]) for length in (15, 16, 17, 63, 64)] == [0, 0, 1, 3, 3]
    assert hit(cache, [*tokens(4), 7]) == 4
    assert hit(cache, [*tokens(2), *tokens(2, first=500), 7]) == 2
    assert hit(cache, [*tokens(4, first=1), 7]) == 0


@settings(deadline=None)
@given(
    present=st.lists(st.booleans(), min_size=1, max_size=12),
    window=st.sampled_from([1, 2, 15, 16, 17, 18, 31, 32, 33, 34, 50, 128, 1000]),
    extra=st.integers(0, 15),
)
def test_a_hit_is_the_longest_whose_window_is_there(present: list[bool], window: int, extra: int) -> None:
    """Key by key: the query at position L * 16 sees the keys (L * 16 - window, L * 16], and must
    find all those before itself."""
    cache = PrefixCache(len(present) + 1, len(present) + 1, window)
    token_ids = tokens(len(present))
    parent = cache.root()
    for index, (key, there) in enumerate(zip(block_hashes(token_ids), present, strict=True)):
        [full] = cache.full.allocate(1)
        [sliding] = cache.sliding.allocate(1) if there else [NULL_BLOCK]
        entry = cache.insert(
            parent, key, pack_tokens(token_ids[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE]), full, sliding
        )
        assert entry is not None
        parent = entry
    query = token_ids + [9] * extra
    expected = 0
    for length in range(1, len(present) + 1):
        start = length * BLOCK_SIZE
        keys = range(max(start - window + 1, 0), start)
        if start < len(query) and all(present[key // BLOCK_SIZE] for key in keys):
            expected = length
    assert hit(cache, query) == expected


@pytest.mark.parametrize(
    ("position", "window", "block"),
    [(0, 128, 0), (127, 128, 0), (128, 128, 0), (143, 128, 1), (144, 128, 1), (32, 1, 2)],
)
def test_first_visible_block(position: int, window: int, block: int) -> None:
    assert first_visible_block(position, window) == block


def test_a_hash_collision_never_yields_another_prompts_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_cache, "hash_block", lambda parent, packed_tokens: b"same")
    cache = PrefixCache(20, 20, 16)
    insert_chain(cache, tokens(1))
    assert hit(cache, [*tokens(1), 7]) == 1
    assert hit(cache, [*tokens(1, first=100), 7]) == 0


def test_a_colliding_parent_does_not_lend_its_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashes that depend on the block's index alone: every prompt collides with every other, at
    every block."""
    monkeypatch.setattr(prefix_cache, "hash_block", lambda parent, packed_tokens: parent + b"x")
    cache = PrefixCache(20, 20, 16)
    mine, other = tokens(2), [*tokens(1, first=100), *tokens(1, first=16)]
    assert mine[16:] == other[16:]
    insert_chain(cache, mine)
    insert_chain(cache, other)
    assert hit(cache, [*other, 7]) == 2
    assert hit(cache, [*mine, 7]) == 0
    entry = cache.lookup(cache.root(), block_hashes([*other, 7]), [*other, 7])[0]
    # Its parent's place taken again by the first prompt, the second block must go with it.
    [full], [sliding] = cache.full.allocate(1), cache.sliding.allocate(1)
    assert cache.insert(cache.root(), entry.key, pack_tokens(mine[:16]), full, sliding) is not None
    assert hit(cache, [*mine, 7]) == 1
    assert hit(cache, [*other, 7]) == 0


def test_eviction_takes_the_end_of_the_least_recently_used_chain() -> None:
    cache = PrefixCache(9, 9, 1000)
    old, new = tokens(4), tokens(4, first=1000)
    old_blocks, new_blocks = insert_chain(cache, old), insert_chain(cache, new)
    release(cache, old_blocks)
    release(cache, new_blocks)
    for taken, (old_hit, new_hit) in enumerate([(4, 4), (3, 4), (2, 4), (1, 4), (0, 4), (0, 3)]):
        assert (hit(cache, [*old, 7]), hit(cache, [*new, 7])) == (old_hit, new_hit), (
            f"after {taken} evictions"
        )
        cache.full.allocate(1)


def test_losing_the_full_block_frees_the_sliding_block_first() -> None:
    cache = PrefixCache(3, 4, 16)
    [block] = insert_chain(cache, tokens(1))
    [other] = insert_chain(cache, tokens(1, first=100))
    release(cache, [other])
    release(cache, [block])
    cache.full.acquire(block[0])
    cache.full.allocate(1)  # evicts `other`, whose sliding block is of no use now
    assert len(cache) == 1
    assert cache.sliding.allocate(1) == [other[1]]


def test_a_lost_sliding_block_is_replaced_by_the_next_sequence_that_computes_it() -> None:
    cache = PrefixCache(9, 3, 16)
    first = insert_chain(cache, tokens(1))
    release(cache, first)
    cache.sliding.allocate(2)
    assert hit(cache, [*tokens(1), 7]) == 0
    cache.sliding.release([2])
    second = insert_chain(cache, tokens(1))
    assert hit(cache, [*tokens(1), 7]) == 1
    [entry] = cache.lookup(cache.root(), block_hashes(tokens(1)), [*tokens(1), 7])
    assert (entry.full_block, entry.sliding_block) == (first[0][0], second[0][1])


def test_where_all_layers_slide_the_sliding_block_is_the_anchor() -> None:
    cache = PrefixCache(0, 6, 20)
    blocks = insert_chain(cache, tokens(3))
    release(cache, blocks)
    assert hit(cache, [*tokens(3), 7]) == 3
    cache.sliding.allocate(3)
    assert hit(cache, [*tokens(3), 7]) == 2
    assert cache.insert(cache.root(), b"unknown", pack_tokens(tokens(1)), NULL_BLOCK, NULL_BLOCK) is None
