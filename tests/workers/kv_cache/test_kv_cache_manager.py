"""Blocks of both groups as sequences are admitted, grow and end."""

import gc

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from workers.config import BLOCK_SIZE
from workers.errors import ConfigError
from workers.kv_cache.block_pool import NULL_BLOCK
from workers.kv_cache.manager import KVCacheManager, SequenceBlocks, sliding_blocks_per_sequence
from workers.kv_cache.prefix_cache import block_hashes, hash_root


def compute(kv: KVCacheManager, token_ids: list[int], chunk: int = 1000) -> SequenceBlocks:
    """Admit a sequence and advance it over all its tokens, as the scheduler would."""
    blocks = SequenceBlocks()
    num_computed = kv.admit(blocks, token_ids)
    assert num_computed is not None
    while num_computed < len(token_ids):
        granted = kv.grow(blocks, num_computed, min(chunk, len(token_ids) - num_computed))
        assert granted > 0
        num_computed += granted
        kv.commit(blocks, token_ids, num_computed)
        kv.check_integrity()
    return blocks


def cached_tokens(kv: KVCacheManager, token_ids: list[int]) -> int | None:
    """Return the number of cached tokens that a sequence admitted now would find."""
    blocks = SequenceBlocks()
    found = kv.admit(blocks, token_ids)
    if found is not None:
        kv.release(blocks)
    return found


def test_both_groups_grow_alike_and_blocks_behind_the_window_are_freed() -> None:
    kv = KVCacheManager(num_full_blocks=40, num_sliding_blocks=40, window=33, prefix_caching=False)
    blocks = SequenceBlocks()
    assert kv.admit(blocks, [5]) == 0
    for position in range(300):
        if position + 1 > blocks.capacity:
            assert kv.grow(blocks, position, 1) == 1
        kv.check_integrity()
        assert len(blocks.full) == len(blocks.sliding) == position // BLOCK_SIZE + 1
        needed = {key // BLOCK_SIZE for key in range(max(position - 33 + 1, 0), position + 1)}
        held = {index for index, block in enumerate(blocks.sliding) if block != NULL_BLOCK}
        assert needed <= held
        assert len(held) <= sliding_blocks_per_sequence(33, 300) == 3
    kv.release(blocks)
    assert kv.num_free_blocks == (39, 39)
    kv.check_integrity()


def test_of_an_ended_sequence_the_last_blocks_are_given_away_first() -> None:
    kv = KVCacheManager(num_full_blocks=6, num_sliding_blocks=0, window=None)
    prompt = list(range(80))
    kv.release(compute(kv, prompt))
    other = compute(kv, list(range(500, 520)))
    kv.release(other)
    assert cached_tokens(kv, prompt) == 48


@pytest.mark.parametrize(("num_full", "num_sliding", "window"), [(40, 0, None), (0, 40, 20)])
def test_a_group_without_layers_has_no_blocks(num_full: int, num_sliding: int, window: int | None) -> None:
    kv = KVCacheManager(num_full_blocks=num_full, num_sliding_blocks=num_sliding, window=window)
    token_ids = list(range(100))
    blocks = compute(kv, token_ids, chunk=30)
    assert (len(blocks.full), len(blocks.sliding)) == (7 if num_full else 0, 7 if num_sliding else 0)
    assert 0 < kv.usage < 1
    kv.release(blocks)
    assert kv.usage == 0
    assert cached_tokens(kv, token_ids) == 96


@pytest.mark.parametrize(
    ("num_full", "num_sliding", "window"), [(0, 0, None), (9, 9, None), (9, 0, 16), (0, 0, 16)]
)
def test_groups_must_match_the_window(num_full: int, num_sliding: int, window: int | None) -> None:
    with pytest.raises(ConfigError):
        KVCacheManager(num_full_blocks=num_full, num_sliding_blocks=num_sliding, window=window)


def test_nothing_is_taken_when_there_is_no_room() -> None:
    kv = KVCacheManager(num_full_blocks=11, num_sliding_blocks=11, window=16)
    first = compute(kv, list(range(100)))
    free = kv.num_free_blocks
    second = SequenceBlocks()
    assert kv.admit(second, list(range(500, 565))) is None  # 5 blocks, 3 are free
    assert kv.num_free_blocks == free
    kv.check_integrity()
    kv.release(first)
    assert kv.admit(second, list(range(500, 565))) == 0
    assert kv.grow(second, 0, 65) == 65


def test_found_blocks_that_nobody_holds_need_room_too() -> None:
    """Seven free blocks, of which four are the prefix of a sequence that needs eight: taking the
    four leaves three for the rest."""
    kv = KVCacheManager(num_full_blocks=12, num_sliding_blocks=0, window=None)
    prompt = list(range(64))
    kv.release(compute(kv, prompt))
    other = compute(kv, list(range(900, 964)))
    longer = [*prompt, *range(500, 564)]
    assert kv.num_free_blocks[0] == 7
    assert kv.admit(SequenceBlocks(), longer) is None
    assert kv.num_free_blocks[0] == 7
    assert kv.admit(SequenceBlocks(), longer[:-16]) == 64
    kv.check_integrity()
    kv.release(other)


def test_room_is_looked_for_again_when_somebody_has_computed_the_prefix() -> None:
    kv = KVCacheManager(num_full_blocks=11, num_sliding_blocks=0, window=None)
    prompt = list(range(100))
    first, second = SequenceBlocks(), SequenceBlocks()
    assert kv.admit(first, prompt) == 0
    assert kv.grow(first, 0, 100) == 100
    assert kv.admit(second, prompt) is None  # 7 of 10 blocks are taken, and nothing is found yet
    kv.commit(first, prompt, 40)
    assert kv.admit(second, prompt) is None  # 5 are missing, 3 are free
    kv.commit(first, prompt, 100)
    assert kv.admit(second, prompt) == 96
    kv.check_integrity()


def test_grow_gives_as_much_as_there_is_in_both_groups() -> None:
    kv = KVCacheManager(num_full_blocks=20, num_sliding_blocks=5, window=16, prefix_caching=False)
    blocks = SequenceBlocks()
    assert kv.admit(blocks, list(range(200))) == 0
    assert kv.grow(blocks, 0, 200) == 64  # four sliding blocks
    assert (len(blocks.full), len(blocks.sliding)) == (4, 4)
    assert kv.grow(blocks, 64, 136) == 48  # the query at 64 sees 15 keys before it: one block stays
    assert kv.grow(blocks, 112, 1) == 1
    kv.check_integrity()


def test_a_released_sequence_is_found_again_in_both_groups() -> None:
    kv = KVCacheManager(num_full_blocks=30, num_sliding_blocks=30, window=40)
    token_ids = list(range(100))
    first = compute(kv, token_ids)
    full, sliding = list(first.full), list(first.sliding)
    kv.release(first)
    second = SequenceBlocks()
    assert kv.admit(second, [*token_ids, 1, 2]) == 96
    assert second.full == full[:6]
    # The query at 96 sees keys from 57 on, in block 3.
    assert second.sliding == [NULL_BLOCK, NULL_BLOCK, NULL_BLOCK, *sliding[3:6]]
    kv.check_integrity()


def test_blocks_are_shared_while_their_owner_runs() -> None:
    kv = KVCacheManager(num_full_blocks=30, num_sliding_blocks=30, window=40)
    first = compute(kv, list(range(100)))
    free = kv.num_free_blocks
    second = SequenceBlocks()
    assert kv.admit(second, list(range(100))) == 96
    assert kv.num_free_blocks == free
    kv.release(first)
    kv.check_integrity()
    assert second.full == compute(kv, list(range(97))).full[:6]


def test_without_prefix_caching_nothing_is_found() -> None:
    kv = KVCacheManager(num_full_blocks=30, num_sliding_blocks=30, window=40, prefix_caching=False)
    kv.release(compute(kv, list(range(100))))
    assert cached_tokens(kv, list(range(100))) == 0


def test_a_prefix_whose_stand_in_was_evicted_is_put_back() -> None:
    """Two sequences compute the same prompt at once; the one whose blocks are in the cache ends,
    and loses them to a third."""
    kv = KVCacheManager(num_full_blocks=12, num_sliding_blocks=12, window=16)
    prompt = list(range(33))
    first, second = SequenceBlocks(), SequenceBlocks()
    for blocks in (first, second):
        assert kv.admit(blocks, prompt) == 0
        assert kv.grow(blocks, 0, 33) == 33
    for blocks in (first, second):
        kv.commit(blocks, prompt, 33)
    kv.release(first)
    third = compute(kv, list(range(900, 1020)))
    assert kv.num_free_blocks[0] == 0
    longer = [*prompt, *range(15)]
    kv.commit(second, longer, 48)
    kv.check_integrity()
    kv.release(third)
    assert cached_tokens(kv, [*longer, 1]) == 48


@settings(deadline=None)
@given(
    sequences=st.lists(st.lists(st.sampled_from([0, 1]), min_size=1, max_size=4), min_size=1, max_size=8),
    window=st.sampled_from([None, 1, 17, 60]),
    chunk=st.integers(1, 70),
)
def test_with_room_for_all_every_common_prefix_is_found(
    sequences: list[list[int]], window: int | None, chunk: int
) -> None:
    """Sequences of whole blocks of equal tokens and one token more: a hit is as long as the longest
    prefix shared with an earlier one."""
    kv = KVCacheManager(num_full_blocks=100, num_sliding_blocks=0 if window is None else 100, window=window)
    earlier: list[list[int]] = []
    for kinds in sequences:
        token_ids = [kind for kind in kinds for _ in range(BLOCK_SIZE)] + [9]
        shared = [
            next(
                (i for i, (a, b) in enumerate(zip(kinds, other, strict=False)) if a != b),
                min(len(kinds), len(other)),
            )
            for other in earlier
        ]
        assert cached_tokens(kv, token_ids) == BLOCK_SIZE * max(shared, default=0)
        kv.release(compute(kv, token_ids, chunk))
        kv.check_integrity()
        earlier.append(kinds)


@pytest.mark.parametrize("window", [1, 2, 16, 17, 18, 100, 128])
def test_the_least_that_fits_a_sequence_is_enough_to_compute_it(window: int) -> None:
    for num_tokens in (1, 16, 17, 129, 300):
        for offset in (1, 5, 16, 1000):
            num_sliding = 1 + sliding_blocks_per_sequence(window, num_tokens)
            kv = KVCacheManager(num_full_blocks=0, num_sliding_blocks=num_sliding, window=window)
            assert kv.fits(num_tokens)
            kv.release(compute(kv, list(range(num_tokens)), chunk=offset))
            kv.release(compute(kv, list(range(num_tokens)), chunk=offset))
    kv = KVCacheManager(num_full_blocks=5, num_sliding_blocks=50, window=window)
    assert [kv.fits(length) for length in (64, 65)] == [True, False]


def test_blocks_are_shared_only_behind_the_same_root() -> None:
    kv = KVCacheManager(num_full_blocks=40, num_sliding_blocks=40, window=24)
    tokens = list(range(50))
    roots = [hash_root(adapter, salt) for adapter in (None, "a") for salt in (None, "s", "a")]
    assert len(set(roots)) == 6
    assert roots[0] == b""
    for root in roots:
        for expected in (0, 48):
            blocks = SequenceBlocks(root)
            assert kv.admit(blocks, tokens) == expected
            kv.grow(blocks, expected, 50 - expected)
            kv.commit(blocks, tokens, 50)
            assert blocks.keys == block_hashes(tokens, root=root)
            kv.release(blocks)
        kv.check_integrity()


def test_equal_hashes_behind_different_roots_share_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.kv_cache.prefix_cache.hash_block", lambda parent, tokens: b"same")
    kv = KVCacheManager(num_full_blocks=40, num_sliding_blocks=40, window=24)
    for root in (b"", b"other"):
        blocks = SequenceBlocks(root)
        assert kv.admit(blocks, list(range(17))) == 0
        kv.grow(blocks, 0, 17)
        kv.commit(blocks, list(range(17)), 17)
        kv.release(blocks)
    kv.check_integrity()


def test_roots_are_forgotten_with_what_they_lead_to() -> None:
    kv = KVCacheManager(num_full_blocks=10, num_sliding_blocks=10, window=24)
    for number in range(50):
        blocks = SequenceBlocks(hash_root(None, str(number)))
        assert kv.admit(blocks, list(range(40))) == 0
        kv.grow(blocks, 0, 40)
        kv.commit(blocks, list(range(40)), 40)
        kv.release(blocks)
    gc.collect()
    assert 0 < len(kv._cache._roots) <= 6
    kv.check_integrity()


def test_a_limit_on_what_is_taken_from_the_cache() -> None:
    kv = KVCacheManager(num_full_blocks=20, num_sliding_blocks=20, window=24)
    tokens = list(range(70))
    for max_cached, expected in ((None, 0), (None, 64), (0, 0), (15, 0), (16, 16), (40, 32), (1000, 64)):
        blocks = SequenceBlocks()
        assert kv.admit(blocks, tokens, max_cached) == expected
        kv.grow(blocks, expected, 70 - expected)
        kv.commit(blocks, tokens, 70)
        kv.release(blocks)
        kv.check_integrity()
