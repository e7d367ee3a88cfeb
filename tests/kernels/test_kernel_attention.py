"""Paged attention, the reference's and the C++ one, against a float64 formulation over plain,
unpaged keys and values."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kernels.attention import paged_attention, rope_and_store_kv, store_kv
from kernels.attention import reference as attention_reference

pytestmark = pytest.mark.usefixtures("implementation")

BLOCK_SIZE = 16
HEADS, KV_HEADS, HEAD_DIM = 6, 3, 10
SCALE = 0.37


@dataclass
class Case:
    """Sequences with their plain keys and values, and the paged form of the same."""

    queries: list[Tensor]  # per sequence [query_len, HEADS, D]
    keys: list[Tensor]  # per sequence [context_len, KV_HEADS, D]
    values: list[Tensor]
    sinks: Tensor
    kv_cache: Tensor
    block_table: Tensor

    def run(self, window: int | None) -> Tensor:
        lengths = torch.tensor([0, *(len(query) for query in self.queries)])
        return paged_attention(
            torch.cat(self.queries),
            self.kv_cache,
            self.block_table,
            torch.tensor([len(keys) for keys in self.keys], dtype=torch.int32),
            lengths.cumsum(0).to(torch.int32),
            self.sinks,
            scale=SCALE,
            window=window,
        )

    def expected(self, window: int | None) -> Tensor:
        return torch.cat(
            [
                oracle(q, k, v, self.sinks, window)
                for q, k, v in zip(self.queries, self.keys, self.values, strict=True)
            ]
        )


def oracle(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, window: int | None) -> Tensor:
    """Return attention of all queries at once over plain keys, masked, with the sink as one more
    column; float64."""
    group = q.shape[1] // k.shape[1]
    keys, values = (tensor.double().repeat_interleave(group, dim=1).transpose(0, 1) for tensor in (k, v))
    logits = q.double().transpose(0, 1) @ keys.transpose(1, 2) * SCALE  # [heads, queries, keys]
    position, key = torch.arange(len(k) - len(q), len(k))[:, None], torch.arange(len(k))
    visible = (key <= position) & (key > position - (len(k) if window is None else window))
    logits = logits.masked_fill(~visible, -torch.inf)
    weights = torch.cat((logits, sinks.double()[:, None, None].expand(-1, len(q), 1)), dim=2).softmax(-1)[
        :, :, :-1
    ]
    return (weights @ values).transpose(0, 1)


def make_case(
    lengths: list[tuple[int, int]],
    *,
    window: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    heads: int = HEADS,
    head_dim: int = HEAD_DIM,
) -> Case:
    """`lengths` are (query_len, context_len). All that may not be read is NaN or out of range:
    unwritten slots, other blocks, the null block, table entries past the last block; blocks wholly
    before the window are the null block."""
    generator = torch.Generator().manual_seed(seed)
    max_blocks = max(-(-context // BLOCK_SIZE) for _, context in lengths) + 2
    num_blocks = 1 + sum(-(-context // BLOCK_SIZE) for _, context in lengths) + 5
    free = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()
    kv_cache = torch.full((2, num_blocks, BLOCK_SIZE, KV_HEADS, head_dim), torch.nan, dtype=dtype)
    block_table = torch.full((len(lengths), max_blocks), 2**31 - 1, dtype=torch.int32)
    queries, keys, values = [], [], []
    for seq, (query_len, context_len) in enumerate(lengths):
        queries.append(torch.randn(query_len, heads, head_dim, generator=generator).to(dtype))
        keys.append(torch.randn(context_len, KV_HEADS, head_dim, generator=generator).to(dtype))
        values.append(torch.randn(context_len, KV_HEADS, head_dim, generator=generator).to(dtype))
        oldest = 0 if window is None else context_len - query_len - window + 1
        for logical in range(-(-context_len // BLOCK_SIZE)):
            first, end = logical * BLOCK_SIZE, min((logical + 1) * BLOCK_SIZE, context_len)
            if end <= oldest:
                block_table[seq, logical] = 0
                continue
            block = free.pop()
            block_table[seq, logical] = block
            slots = torch.arange(block * BLOCK_SIZE, block * BLOCK_SIZE + end - first)
            store_kv(keys[-1][first:end], values[-1][first:end], kv_cache, slots)
    return Case(queries, keys, values, torch.randn(heads, generator=generator), kv_cache, block_table)


def assert_near(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert not found.isnan().any()
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


# 256 keys are a tile of the C++ kernel.
@pytest.mark.parametrize("window", [None, 1, 20, 128])
@pytest.mark.parametrize("length", [1, 127, 128, 129, 256, 257, 600])
def test_whole_prefill(length: int, window: int | None) -> None:
    case = make_case([(length, length)], window=window)
    assert_near(case.run(window), case.expected(window))


@pytest.mark.parametrize("window", [None, 20, 128])
@pytest.mark.parametrize("length", [1, 127, 128, 129, 1000])
def test_decode(length: int, window: int | None) -> None:
    case = make_case([(1, length)], window=window)
    assert_near(case.run(window), case.expected(window))


@pytest.mark.parametrize("window", [None, 20, 128, 700])
@pytest.mark.parametrize("offset", [1, 128, 515, 1000])
def test_a_chunk_at_a_query_offset(offset: int, window: int | None) -> None:
    case = make_case([(37, offset + 37), (150, offset + 150)], window=window)
    assert_near(case.run(window), case.expected(window))


@pytest.mark.parametrize("window", [None, 20, 128])
def test_chunks_and_decodes_of_all_lengths_in_one_batch(window: int | None) -> None:
    lengths = [(1, 1), (129, 129), (1, 1000), (16, 600), (17, 17), (1, 128), (3, 513), (1, 129), (130, 1000)]
    case = make_case(lengths, window=window)
    assert_near(case.run(window), case.expected(window))


def test_a_sequence_without_queries_is_skipped() -> None:
    case = make_case([(2, 40), (0, 30), (1, 5)])
    assert_near(case.run(None), case.expected(None))


@pytest.mark.parametrize("heads", [3, 6, 15])
def test_group_sizes(heads: int) -> None:
    case = make_case([(20, 60), (1, 33)], heads=heads)
    assert_near(case.run(None), case.expected(None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [2, 16, 32, 48, 64, 80, 128])
def test_head_sizes(head_dim: int, dtype: torch.dtype) -> None:
    case = make_case([(20, 300), (1, 33)], head_dim=head_dim, dtype=dtype)
    assert_near(case.run(None), case.expected(None), 1e-5 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("window", [None, 20])
def test_bf16_is_rounded_once(window: int | None) -> None:
    case = make_case([(40, 140), (1, 33)], window=window, dtype=torch.bfloat16)
    found = case.run(window)
    assert found.dtype == torch.bfloat16
    assert_near(found, case.expected(window), 2**-8)


def test_extreme_logits_and_sinks_stay_finite() -> None:
    case = make_case([(5, 30)])
    case.queries[0] *= 1e4
    case.sinks[:] = torch.tensor([-1e4, 1e4, 0, 100.0, -100.0, 3e38])
    assert_near(case.run(None), case.expected(None), 1e-4)


def test_a_large_sink_takes_all_weight_and_a_small_one_none() -> None:
    case = make_case([(3, 30)])
    case.sinks[:] = 1e4
    assert torch.equal(case.run(None), torch.zeros(3, HEADS, HEAD_DIM))
    case.sinks[:] = -1e4
    # Then weights sum to one: constant values come out unchanged.
    case.kv_cache[1] = torch.where(case.kv_cache[1].isnan(), torch.nan, 2.5)
    torch.testing.assert_close(case.run(None), torch.full((3, HEADS, HEAD_DIM), 2.5))


def test_not_a_number_is_not_hidden() -> None:
    case = make_case([(2, 40), (1, 300)])
    case.queries[0][1, 2] = torch.nan
    found = case.run(None)
    assert found[1, 2].isnan().all()
    found[1, 2] = 0
    assert not found.isnan().any()


def test_queries_may_be_a_part_of_a_wider_tensor() -> None:
    case = make_case([(5, 300), (1, 40)])
    whole = case.run(None)
    case.queries = [
        torch.cat((query, torch.full_like(query, torch.nan)), dim=1)[:, :HEADS] for query in case.queries
    ]
    assert not case.queries[0].is_contiguous()
    assert torch.equal(case.run(None), whole)


@pytest.mark.usefixtures("_restore_threads")
@pytest.mark.parametrize("window", [None, 300])
def test_threads_make_no_difference(window: int | None) -> None:
    # From one task for many threads, whose key tiles are then reduced apart, to many tasks for
    # each.
    lengths = [(1, 900), (2, 515), (1, 256), (1, 257), (40, 600), (1, 1)]
    for chosen in (lengths[:1], lengths[:4], lengths):
        case = make_case(chosen, window=window)
        torch.set_num_threads(1)
        alone = case.run(window)
        assert_near(alone, case.expected(window))
        for threads in (2, 3, 13):
            torch.set_num_threads(threads)
            assert torch.equal(case.run(window), alone), (len(chosen), threads)


def test_blocks_outside_the_cache_are_refused() -> None:
    for block in (-1, 9, 2**31 - 1):
        case = make_case([(1, 40)])
        assert case.kv_cache.shape[1] == 9
        case.block_table[0, 1] = block
        with pytest.raises((IndexError, RuntimeError)):
            case.run(None)


# only this one gathers keys
@pytest.mark.parametrize("implementation", ["reference"], indirect=True)
def test_large_batches_are_cut_by_memory_without_a_difference(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case([(1, 100 + i) for i in range(20)] + [(300, 700)])
    whole = case.run(None)
    monkeypatch.setattr(attention_reference, "MAX_ELEMENTS", 1)
    assert torch.equal(case.run(None), whole)
    assert_near(whole, case.expected(None))


@pytest.mark.parametrize("heads_and_dim", [(6, 10), (8, 64)])
@pytest.mark.parametrize("window", [None, 20, 128])
def test_a_query_is_the_same_however_its_sequence_is_cut(
    window: int | None, heads_and_dim: tuple[int, int]
) -> None:
    heads, head_dim = heads_and_dim
    kv_heads, length = heads // 2, 700
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(length, heads, head_dim, generator=generator)
    kv_cache = torch.randn(2, 60, BLOCK_SIZE, kv_heads, head_dim, generator=generator)
    table = (torch.randperm(59, generator=generator) + 1)[:44].to(torch.int32)
    sinks = torch.randn(heads, generator=generator)

    def run(spans: list[tuple[int, int]]) -> list[Tensor]:
        """Run queries [first, end) of the sequence for each span, all in one batch."""
        sizes = [end - first for first, end in spans]
        out = paged_attention(
            torch.cat([q[first:end] for first, end in spans]),
            kv_cache,
            table.repeat(len(spans), 1),
            torch.tensor([end for _, end in spans], dtype=torch.int32),
            torch.tensor([0, *sizes]).cumsum(0).to(torch.int32),
            sinks,
            scale=SCALE,
            window=window,
        )
        return list(out.split(sizes))

    whole = run([(0, length)])[0]
    spans = [
        (699, 700),
        (0, 1),
        (5, 6),
        (127, 130),
        (600, 700),
        (13, 300),
        (255, 258),
        (511, 514),
        (128, 129),
        (0, 129),
    ]
    for (first, end), together in zip(spans, run(spans), strict=True):
        assert torch.equal(run([(first, end)])[0], together), (first, end)
        assert torch.equal(together, whole[first:end]), (first, end)


def test_store_kv_writes_its_slots_and_nothing_else() -> None:
    kv_cache = torch.full((2, 4, BLOCK_SIZE, KV_HEADS, HEAD_DIM), -7.0)
    k, v = torch.randn(3, KV_HEADS, HEAD_DIM), torch.randn(3, KV_HEADS, HEAD_DIM)
    store_kv(k, v, kv_cache, torch.tensor([63, 0, 17]))
    for row, (block, offset) in enumerate([(3, 15), (0, 0), (1, 1)]):
        assert torch.equal(kv_cache[0, block, offset], k[row])
        assert torch.equal(kv_cache[1, block, offset], v[row])
        kv_cache[:, block, offset] = -7.0
    assert bool((kv_cache == -7.0).all())


def test_rope_and_store_kv_is_both() -> None:
    num_heads = 2 * KV_HEADS
    qkv = torch.randn(3, num_heads + 2 * KV_HEADS, HEAD_DIM)
    angles = torch.rand(3, HEAD_DIM // 2) * 7
    slots = torch.tensor([63, 0, 17])
    kv_cache = torch.full((2, 4, BLOCK_SIZE, KV_HEADS, HEAD_DIM), -7.0)
    cos, sin = angles.cos(), angles.sin()
    first, second = qkv.chunk(2, dim=-1)
    rotated = torch.cat(
        (first * cos[:, None] - second * sin[:, None], second * cos[:, None] + first * sin[:, None]), dim=-1
    )
    queries = rope_and_store_kv(qkv.clone(), num_heads, cos, sin, kv_cache, slots)
    torch.testing.assert_close(queries, rotated[:, :num_heads])
    stored = kv_cache.view(2, 4 * BLOCK_SIZE, KV_HEADS, HEAD_DIM)
    torch.testing.assert_close(stored[0, slots], rotated[:, num_heads : num_heads + KV_HEADS])
    assert torch.equal(stored[1, slots], qkv[:, num_heads + KV_HEADS :])
    stored[:, slots] = -7.0
    assert bool((kv_cache == -7.0).all())
    good = {"qkv": qkv, "cos": cos, "sin": sin, "kv_cache": kv_cache, "slot_mapping": slots}
    bad: dict[str, list[Tensor]] = {
        "qkv": [qkv[:, 1:], qkv[..., :4], qkv.bfloat16()],
        "cos": [cos[:2]],
        "sin": [sin[:, :2]],
        "slot_mapping": [slots[:2], slots.int()],
    }
    for name, values in bad.items():
        for value in values:
            with pytest.raises(ValueError, match=rf"^{name} "):
                rope_and_store_kv(**{**good, name: value}, num_heads=num_heads)
    for slot in (-1, 4 * BLOCK_SIZE):
        with pytest.raises((IndexError, RuntimeError)):
            rope_and_store_kv(**{**good, "slot_mapping": torch.tensor([0, 1, slot])}, num_heads=num_heads)


@pytest.mark.usefixtures("_restore_threads")
@pytest.mark.parametrize("head_dim", [2, 10, 32, 64])
def test_rope_and_store_in_bf16_rounds_once(head_dim: int) -> None:
    num_tokens, num_heads = 40, 6
    generator = torch.Generator().manual_seed(head_dim)
    qkv = torch.randn(num_tokens, num_heads + 2 * KV_HEADS, head_dim, generator=generator).bfloat16()
    angles = torch.rand(num_tokens, head_dim // 2, generator=generator) * 7
    slots = torch.randperm(4 * BLOCK_SIZE, generator=generator)[:num_tokens]
    turned = (
        torch.complex(*qkv.double().chunk(2, dim=-1))
        * torch.complex(angles.cos().double(), angles.sin().double())[:, None]
    )
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        kv_cache = torch.zeros(2, 4, BLOCK_SIZE, KV_HEADS, head_dim, dtype=torch.bfloat16)
        queries = rope_and_store_kv(qkv.clone(), num_heads, angles.cos(), angles.sin(), kv_cache, slots)
        stored = kv_cache.view(2, -1, KV_HEADS, head_dim)[:, slots]
        tolerance = {"atol": 1e-6, "rtol": 2**-8}
        torch.testing.assert_close(queries.double(), expected[:, :num_heads], **tolerance)
        torch.testing.assert_close(
            stored[0].double(), expected[:, num_heads : num_heads + KV_HEADS], **tolerance
        )
        assert torch.equal(stored[1], qkv[:, num_heads + KV_HEADS :])


def test_store_kv_refuses_bad_arguments() -> None:
    cache, row, slots = (
        torch.zeros(2, 4, BLOCK_SIZE, KV_HEADS, HEAD_DIM),
        torch.zeros(2, KV_HEADS, HEAD_DIM),
        torch.tensor([1, 2]),
    )
    bad = [
        ("kv_cache", (row, row, cache[0], slots)),
        ("k ", (row[:, :2], row, cache, slots)),
        ("k ", (row.bfloat16(), row, cache, slots)),
        ("v ", (row, row[:, :, :5], cache, slots)),
        ("v ", (row, row[:1], cache, slots)),
        ("slot_mapping", (row, row, cache, slots[:1])),
        ("slot_mapping", (row, row, cache, slots.int())),
    ]
    for named, arguments in bad:
        with pytest.raises(ValueError, match=rf"^{named}"):
            store_kv(*arguments)
    for slot in (-1, 4 * BLOCK_SIZE):
        with pytest.raises((IndexError, RuntimeError)):
            store_kv(row, row, cache, torch.tensor([0, slot]))


def test_paged_attention_refuses_bad_arguments() -> None:
    def int32(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    good = {
        "q": torch.zeros(3, HEADS, HEAD_DIM),
        "kv_cache": torch.zeros(2, 5, BLOCK_SIZE, KV_HEADS, HEAD_DIM),
        "block_table": torch.ones(2, 3, dtype=torch.int32),
        "context_lens": int32(20, 40),
        "cu_seqlens_q": int32(0, 1, 3),
        "sinks": torch.zeros(HEADS),
    }
    paged_attention(**good, scale=SCALE)
    bad = {
        "q": [
            torch.zeros(3, HEADS, 8),
            torch.zeros(3, 7, HEAD_DIM),
            torch.zeros(3, HEADS, HEAD_DIM).bfloat16(),
        ],
        "kv_cache": [torch.zeros(2, 5, BLOCK_SIZE, HEAD_DIM)],
        "block_table": [
            torch.ones(2, 3),
            torch.ones(6, dtype=torch.int32),
            torch.ones(2, 2, dtype=torch.int32),
        ],
        "context_lens": [int32(20), torch.tensor([20, 40])],
        "cu_seqlens_q": [
            int32(0, 3),
            int32(0, 1, 2),
            int32(1, 1, 3),
            int32(0, 4, 3),
            torch.tensor([0, 1, 3]),
        ],
        "sinks": [torch.zeros(KV_HEADS)],
    }
    for name, values in bad.items():
        for value in values:
            with pytest.raises(ValueError, match=rf"^{name} "):
                paged_attention(**{**good, name: value}, scale=SCALE)
    with pytest.raises(ValueError, match=r"^cu_seqlens_q"):
        paged_attention(**{**good, "context_lens": int32(20, 1)}, scale=SCALE)
    with pytest.raises(ValueError, match=r"^window"):
        paged_attention(**good, scale=SCALE, window=0)


# The C++ kernels allocate alike on every instruction set; portable stands for them.
@pytest.mark.parametrize("implementation", ["reference", "portable"], indirect=True)
def test_memory_does_not_grow_with_the_square_of_the_length(implementation: str) -> None:
    """The largest tensor that a prefill makes, as seen by the operations themselves."""

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                Largest.elements = max(Largest.elements, result.numel())
            return result

    length = 3000
    case = make_case([(length, length)], window=None)
    with Largest():
        case.run(None)
    assert (
        Largest.elements
        <= max(attention_reference.MAX_ELEMENTS, case.kv_cache.numel())
        < HEADS * length * length / 10
    )
    assert math.isfinite(float(case.run(None).sum()))
