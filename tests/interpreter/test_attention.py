"""Triton's attention in the interpreter, against float64 over plain keys and values."""

import pytest
import torch
from torch import Tensor

from kernels.attention import paged, paged_attention, reference, rope_and_store_kv
from kernels.attention.fp8 import FP8
from tests.interpreter.guards import guarded
from tests.interpreter.interpreter import recorded_launches
from tests.support.attention_cases import BLOCK_SIZE, SCALE, AttentionCase, attention_case

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}
"""Absolute and relative. fp32: sums of up to 1000 weights in another order. Otherwise the output's
rounding (2^-9, 2^-12) and that of the weights before they meet the values."""

RAGGED = [(1, 1), (129, 129), (1, 1000), (16, 600), (0, 30), (17, 17), (1, 128), (3, 513), (1, 129), (15, 31)]


def run(case: AttentionCase, max_query_len: int | None = None) -> Tensor:
    arguments = (guarded(tensor) for tensor in case.arguments)
    return paged_attention(
        *arguments, scale=SCALE, window=case.window, kv_scales=case.kv_scales, max_query_len=max_query_len
    )


def check(case: AttentionCase, max_query_len: int | None = None) -> None:
    out = run(case, max_query_len)
    assert out.shape == case.q.shape
    assert out.dtype == case.q.dtype
    assert not out.isnan().any()
    tolerance = TOLERANCES[case.q.dtype]
    torch.testing.assert_close(out.double(), case.expected(), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(out, case.reference(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("window", "lengths"), [(None, [127, 128]), (1, [17, 2]), (20, [15, 128, 16]), (128, [129, 127])]
)
def test_whole_prefill(window: int | None, lengths: list[int]) -> None:
    check(attention_case([(length, length) for length in lengths], window=window))


@pytest.mark.parametrize("window", [None, 20, 127, 128, 129])
def test_decodes(window: int | None) -> None:
    """Contexts have one split and several; with a window, the oldest keys are at all places of a
    tile."""
    lengths = [1, 15, 16, 17, 127, 128, 129, 255, 256, 257, 1000]
    check(attention_case([(1, length) for length in lengths], window=window), max_query_len=1)


@pytest.mark.parametrize(("offset", "window"), [(1, None), (515, None), (127, 20), (515, 128), (515, 500)])
def test_chunks_at_a_query_offset(offset: int, window: int | None) -> None:
    check(attention_case([(37, offset + 37), (2, offset + 2)], window=window))


@pytest.mark.parametrize(
    ("dtype", "window"),
    [
        (torch.float32, None),
        (torch.float32, 128),
        (torch.bfloat16, None),
        (torch.bfloat16, 128),
        (torch.float16, 20),
    ],
)
def test_chunks_and_decodes_in_one_batch(dtype: torch.dtype, window: int | None) -> None:
    check(attention_case(RAGGED, window=window, dtype=dtype))


@pytest.mark.parametrize(
    ("heads", "head_dim"),
    [
        ((3, 3), 2),
        ((5, 1), 18),
        ((8, 2), 64),
        ((16, 2), 32),
        ((34, 2), 16),
        ((64, 1), 16),
        ((2, 2), 130),
        ((70, 1), 66),
    ],
)
def test_heads(heads: tuple[int, int], head_dim: int) -> None:
    check(attention_case([(19, 40), (1, 270), (1, 3), (2, 2)], heads=heads, head_dim=head_dim))


def test_too_many_heads_for_a_tile() -> None:
    with pytest.raises(ValueError, match=r"^q has 129 heads to a KV head of kv_cache, the kernel takes 128"):
        run(attention_case([(1, 3)], heads=(129, 1)))


@pytest.mark.parametrize(
    ("target", "window"),
    [("sm_80", None), ("sm_90", None), ("sm_90", 20), ("sm_100", 20), ("gfx950", None), ("gfx1234", None)],
)
def test_tiles_of_other_targets(target: str, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "architecture", lambda device: target)
    tiles = paged.choose_tiles(target, torch.bfloat16, 64, window)
    assert (tiles == paged.choose_tiles("cpu", torch.bfloat16, 64, window)) == (target == "gfx1234")
    check(
        attention_case(
            [(40, 300), (1, 700), (1, 64)], heads=(8, 1), head_dim=64, window=window, dtype=torch.bfloat16
        )
    )


def test_a_long_context_takes_longer_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "MIN_SPLIT", 32)
    length = paged._split_limit(1) * paged.MIN_SPLIT + 1
    check(attention_case([(1, length), (1, length - 1)], heads=(2, 1), head_dim=4), max_query_len=1)


def test_the_number_of_sequences_does_not_matter() -> None:
    """The other sequences do not matter either: a sequence has the same bits alone as among others,
    which changes the programs of a decode and the tiles of a chunk."""
    # A program finds its sequence among 128 at a time.
    for window, num_others in ((None, 126), (128, 16)):
        lengths = [(1, 1 + i % 20) for i in range(num_others)] + [(1, 700), (40, 40), (5, 300), (1, 130)]
        batch = attention_case(lengths, heads=(2, 1), head_dim=8, window=window, dtype=torch.bfloat16)
        together = run(batch)
        starts = batch.cu_seqlens_q.tolist()
        for seq in (0, *range(num_others - 1, num_others + 4)):
            rows = slice(starts[seq], starts[seq + 1])
            alone = paged_attention(
                batch.q[rows],
                batch.kv_cache,
                batch.block_table[seq : seq + 1],
                batch.context_lens[seq : seq + 1],
                torch.tensor([0, starts[seq + 1] - starts[seq]], dtype=torch.int32),
                batch.sinks,
                scale=SCALE,
                window=window,
            )
            assert torch.equal(alone, together[rows]), (window, seq)


def test_a_decode_is_the_same_in_a_batch_of_decodes_and_beside_chunks() -> None:
    mixed = attention_case([(1, 700), (5, 30), (1, 20)])
    decodes = (mixed.q[[0, 6]], mixed.kv_cache, mixed.block_table[[0, 2]], mixed.context_lens[[0, 2]])
    rows = torch.tensor([0, 1, 2], dtype=torch.int32)
    alone = paged_attention(*decodes, rows, mixed.sinks, scale=SCALE, max_query_len=1)
    assert torch.equal(alone, run(mixed)[[0, 6]])


def test_the_width_of_the_block_table_does_not_matter() -> None:
    """A captured graph's tables are wider: they hold max_model_len."""
    case = attention_case([(1, 300), (1, 20), (4, 20)])
    wide = torch.full((3, 400), 2**31 - 1, dtype=torch.int32)
    wide[:, : case.block_table.shape[1]] = case.block_table
    out = paged_attention(
        case.q, case.kv_cache, wide, case.context_lens, case.cu_seqlens_q, case.sinks, scale=SCALE
    )
    assert torch.equal(out, run(case))


def test_padding_rows_of_a_graph() -> None:
    """Sequences of one token in the null block: they disturb nothing, and there may be many."""
    case = attention_case([(1, 300), (1, 17)])
    padding = 6
    case.kv_cache[:, 0] = 1.0
    table = torch.zeros(2 + padding, case.block_table.shape[1], dtype=torch.int32)
    table[:2] = case.block_table
    out = paged_attention(
        torch.cat((case.q, torch.full((padding, *case.q.shape[1:]), torch.nan))),
        case.kv_cache,
        table,
        torch.cat((case.context_lens, torch.ones(padding, dtype=torch.int32))),
        torch.arange(3 + padding, dtype=torch.int32),
        case.sinks,
        scale=SCALE,
        max_query_len=1,
    )
    assert torch.equal(out[:2], run(case, max_query_len=1))


def test_launches() -> None:
    """One for chunks and decodes together, and a second where a context may be split."""
    cases = {"split": (None, 1000), "one split": (None, 200), "window": (128, 1000)}
    for name, (window, length) in cases.items():
        case = attention_case([(1, length), (5, length - 100)], window=window)
        with recorded_launches() as names:
            run(case)
        assert names == (["_attend", "_merge_splits"] if name == "split" else ["_attend"]), name


def test_extreme_logits_and_sinks_stay_finite() -> None:
    case = attention_case([(5, 30), (1, 300)])
    case.q.mul_(1e4)
    case.sinks[:] = torch.tensor([-1e4, 1e4, 0, 100.0, -3e38, 3e38])
    out = run(case)
    torch.testing.assert_close(out.double(), case.expected(), atol=1e-4, rtol=1e-4)


def test_queries_in_rows_that_lie_apart() -> None:
    case = attention_case([(5, 30), (1, 300)])
    wide = torch.full((6, 10, 10), torch.nan)
    wide[:, :6] = case.q
    out = paged_attention(wide[:, :6], *case.arguments[1:], scale=SCALE)
    assert torch.equal(out, run(case))


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_cache(dtype: torch.dtype, scales: bool, window: int | None) -> None:
    """Against float64 over the values that the cache holds."""
    case = attention_case(
        [(1, 700), (20, 300), (1, 17), (33, 33)], window=window, dtype=dtype, fp8=True, scales=scales
    )
    check(case)


def test_fp8_is_refused_where_the_gpu_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "architecture", lambda device: "sm_80")
    with pytest.raises(ValueError, match=r"^kv_cache: sm_80 has no instructions for float8_e4m3fn"):
        run(attention_case([(1, 17)], fp8=True))


def test_bad_arguments() -> None:
    case = attention_case([(1, 17), (5, 40)], window=20)
    names = ("q", "kv_cache", "block_table", "context_lens", "cu_seqlens_q", "sinks")
    good = dict(zip(names, case.arguments, strict=True))
    paged_attention(**good, scale=SCALE, window=20)
    table = case.block_table.clone()
    table[1, 1] = case.kv_cache.shape[1]
    bad = {
        "q": [case.q.transpose(1, 2).contiguous().transpose(1, 2), case.q.bfloat16(), case.q[:, :4]],
        "kv_cache": [case.kv_cache.transpose(1, 3)],
        "block_table": [
            table,
            case.block_table[:, :1].contiguous(),
            case.block_table.long(),
            case.block_table.T.contiguous().T,
        ],
        "context_lens": [case.context_lens.long()],
        "cu_seqlens_q": [
            torch.tensor([0, 1, 5], dtype=torch.int32),
            torch.tensor([0, 4, 3], dtype=torch.int32),
        ],
        "sinks": [case.sinks[:3], case.sinks.repeat_interleave(2)[::2]],
    }
    for name, values in bad.items():
        for value in values:
            with pytest.raises(ValueError, match=rf"^{name}\b"):
                paged_attention(**(good | {name: value}), scale=SCALE, window=20)
    options = {
        "scale": {"scale": 0.0},
        "window": {"scale": 1.0, "window": 0},
        "max_query_len": {"scale": 1.0, "max_query_len": 4},
    }
    for name, values in options.items():
        with pytest.raises(ValueError, match=rf"^{name} "):
            paged_attention(**good, **values)
    with pytest.raises(ValueError, match=r"^kv_scales "):
        paged_attention(**good, scale=SCALE, kv_scales=torch.ones(2, 3))


def rope_arguments(
    heads: tuple[int, int], head_dim: int, dtype: torch.dtype, slots: list[int]
) -> tuple[Tensor, ...]:
    """Return qkv in rows that lie apart, cos, sin, slots."""
    num_heads, num_kv_heads = heads
    rows = num_heads + 2 * num_kv_heads
    generator = torch.Generator().manual_seed(len(slots))
    qkv = torch.randn(len(slots), rows + 1, head_dim, generator=generator).to(dtype)[:, :rows]
    angles = torch.rand(len(slots), head_dim // 2, generator=generator) * 7
    return qkv, angles.cos(), angles.sin(), torch.tensor(slots, dtype=torch.int64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "head_dim", "slots"),
    [
        *(
            ((6, 3), 10, [63, 0, 17]),
            ((64, 8), 64, [5]),
            ((7, 7), 2, list(range(40, 3, -1))),
            ((16, 16), 34, [1, 2]),
            ((3, 1), 64, []),
        ),
        *(
            ((1, 1), 2, [0]),
            ((14, 1), 4, [63]),
            ((13, 1), 6, [15, 16]),
            ((15, 1), 6, [16, 15]),
            ((12, 2), 30, [1]),
            ((11, 2), 32, [2, 3, 4]),
        ),
        *(
            ((13, 2), 34, [9]),
            ((28, 2), 62, [8, 7]),
            ((29, 2), 64, [6]),
            ((27, 2), 66, [5, 4]),
            ((40, 5), 126, [3]),
            ((5, 5), 128, [2, 1]),
        ),
        *(((4, 2), 130, [0, 62]), ((30, 1), 16, list(range(0, 64, 2))), ((8, 4), 14, list(range(64)))),
    ],
)
def test_rope_and_store(heads: tuple[int, int], head_dim: int, slots: list[int], dtype: torch.dtype) -> None:
    """Bit for bit: products and sums are rounded one by one in the interpreter, as the reference
    does it."""
    qkv, cos, sin, slot_mapping = rope_arguments(heads, head_dim, dtype, slots)
    caches = [torch.full((2, 4, BLOCK_SIZE, heads[1], head_dim), torch.nan, dtype=dtype) for _ in range(2)]
    expected = reference.rope_and_store_kv(qkv.clone(), heads[0], cos, sin, caches[0], slot_mapping)
    with recorded_launches() as names:
        found = rope_and_store_kv(guarded(qkv), heads[0], guarded(cos), guarded(sin), caches[1], slot_mapping)
    assert names == ["_rope_and_store"] * bool(slots)
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    assert torch.equal(caches[1].view(torch.uint8), caches[0].view(torch.uint8)), (
        "other slots stay as they were"
    )


@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope_and_store_in_fp8(dtype: torch.dtype, scales: bool) -> None:
    qkv, cos, sin, slot_mapping = rope_arguments((6, 3), 10, dtype, [63, 0, 17])
    qkv[1] *= 1e4  # saturates
    kv_scales = torch.tensor([[0.5, 0.3, 2], [0.1, 7, 1]]) if scales else None
    caches = [torch.full((2, 4, BLOCK_SIZE, 3, 10), torch.nan).to(FP8) for _ in range(2)]
    expected = reference.rope_and_store_kv(
        qkv.clone(), 6, cos, sin, caches[0], slot_mapping, kv_scales=kv_scales
    )
    assert torch.equal(
        rope_and_store_kv(qkv, 6, cos, sin, caches[1], slot_mapping, kv_scales=kv_scales), expected
    )
    assert torch.equal(caches[1].view(torch.uint8), caches[0].view(torch.uint8))
    assert caches[1].view(2, -1, 3, 10)[:, slot_mapping].float().isfinite().all()


def test_rope_and_store_refuses_bad_arguments() -> None:
    qkv, cos, sin, slots = rope_arguments((6, 3), 10, torch.float32, [1, 2])
    cache = torch.zeros(2, 4, BLOCK_SIZE, 3, 10)
    bad = {
        "qkv": (qkv.transpose(1, 2).contiguous().transpose(1, 2), 6, cos, sin, cache, slots),
        "cos": (qkv, 6, cos.double(), sin, cache, slots),
        "sin": (qkv, 6, cos, sin[:, :3], cache, slots),
        "slot_mapping": (qkv, 6, cos, sin, cache, slots.int()),
    }
    for name, arguments in bad.items():
        with pytest.raises(ValueError, match=rf"^{name}\b"):
            rope_and_store_kv(*arguments)
    for slot in (-1, 4 * BLOCK_SIZE):
        with pytest.raises(IndexError, match=r"^slot_mapping "):
            rope_and_store_kv(qkv, 6, cos, sin, cache, torch.tensor([0, slot]))
