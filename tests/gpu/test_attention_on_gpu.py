"""Triton's attention compiled: the cases of the interpreter, what only a GPU has (graphs, batches
that fill it), and times against memory.

Written on machines without a GPU and not run on one yet. `make gpu-check` runs it.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.attention import paged_attention, reference, rope_and_store_kv
from kernels.attention.fp8 import FP8
from kernels.backend import architecture
from kernels.formats import fp8_refusal
from tests.support.attention_cases import BLOCK_SIZE, SCALE, AttentionCase, attention_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}
"""Tolerances by dtype, as in the interpreter's tests: dots of fp32 are not TF32's."""
RAGGED = [
    (1, 1),
    (129, 129),
    (1, 1000),
    (16, 600),
    (0, 30),
    (17, 17),
    (1, 128),
    (3, 513),
    (1, 129),
    (15, 31),
    (1, 20000),
]


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def fp8_device(device: torch.device) -> torch.device:
    if (reason := fp8_refusal(architecture(device))) is not None:
        pytest.skip(reason)
    return device


def run(case: AttentionCase, max_query_len: int | None = None) -> Tensor:
    return paged_attention(
        *case.arguments,
        scale=SCALE,
        window=case.window,
        kv_scales=case.kv_scales,
        max_query_len=max_query_len,
    )


def check(case: AttentionCase, device: torch.device) -> None:
    out = run(case.to(device)).cpu()
    assert not out.isnan().any()
    tolerance = TOLERANCES[case.q.dtype]
    torch.testing.assert_close(out, case.reference(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("window", [None, 1, 20, 127, 128, 129])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_chunks_and_decodes_in_one_batch(
    device: torch.device, dtype: torch.dtype, window: int | None
) -> None:
    check(attention_case(RAGGED, window=window, dtype=dtype, heads=(16, 2), head_dim=64), device)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 127, 128, 129, 255, 256, 257, 1000])
@pytest.mark.parametrize("window", [None, 128])
def test_lengths(device: torch.device, length: int, window: int | None) -> None:
    for lengths in ([(length, length)], [(1, length)], [(37, length + 37)]):
        check(
            attention_case(lengths, window=window, heads=(64, 8), head_dim=64, dtype=torch.bfloat16), device
        )


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
        ((8, 1), 64),
    ],
)
def test_heads(device: torch.device, heads: tuple[int, int], head_dim: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check(
            attention_case([(19, 40), (1, 270), (1, 3), (2, 2)], heads=heads, head_dim=head_dim, dtype=dtype),
            device,
        )


@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize("scales", [False, True])
def test_fp8_cache(fp8_device: torch.device, scales: bool, window: int | None) -> None:
    check(
        attention_case(
            RAGGED, window=window, dtype=torch.bfloat16, heads=(16, 2), head_dim=64, fp8=True, scales=scales
        ),
        fp8_device,
    )


def test_the_batch_does_not_matter(device: torch.device) -> None:
    for window in (None, 128):
        lengths = [*RAGGED, *((1, 1 + 37 * i) for i in range(200))]
        case = attention_case(lengths, heads=(8, 1), head_dim=64, window=window, dtype=torch.bfloat16).to(
            device
        )
        together, starts = run(case), case.cu_seqlens_q.tolist()
        for seq in range(0, len(lengths), 5):
            rows = slice(starts[seq], starts[seq + 1])
            alone = paged_attention(
                case.q[rows],
                case.kv_cache,
                case.block_table[seq : seq + 1],
                case.context_lens[seq : seq + 1],
                torch.tensor([0, starts[seq + 1] - starts[seq]], dtype=torch.int32, device=device),
                case.sinks,
                scale=SCALE,
                window=window,
            )
            assert torch.equal(alone, together[rows]), (window, seq)


def test_a_graph_of_decodes_follows_its_inputs(device: torch.device) -> None:
    case = attention_case([(1, 3000), (1, 20), (1, 129)], heads=(8, 1), head_dim=64, dtype=torch.bfloat16).to(
        device
    )
    wide = torch.zeros(3, 2000, dtype=torch.int32, device=device)
    wide[:, : case.block_table.shape[1]] = case.block_table
    lengths = case.context_lens.clone()

    def decode() -> Tensor:
        return paged_attention(
            case.q, case.kv_cache, wide, lengths, case.cu_seqlens_q, case.sinks, scale=SCALE, max_query_len=1
        )

    decode()
    graph = torch.cuda.CUDAGraph()
    lengths.fill_(1)
    with torch.cuda.graph(graph):
        out = decode()
    for changed in ([3000, 20, 129], [257, 1, 128], [1, 1, 1]):
        lengths.copy_(torch.tensor(changed, dtype=torch.int32))
        graph.replay()
        assert torch.equal(out, decode())


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_rope_and_store(device: torch.device, dtype: torch.dtype) -> None:
    qkv, angles = torch.randn(37, 10 + 2 * 3, 64).to(dtype), torch.rand(37, 32) * 7
    slots = torch.randperm(40 * BLOCK_SIZE)[:37]
    expected_cache = torch.zeros(2, 40, BLOCK_SIZE, 3, 64, dtype=dtype)
    cache = expected_cache.to(device)
    expected = reference.rope_and_store_kv(qkv.clone(), 10, angles.cos(), angles.sin(), expected_cache, slots)
    out = rope_and_store_kv(
        *(qkv.to(device), 10, angles.cos().to(device), angles.sin().to(device), cache, slots.to(device))
    )
    # A fused product and sum rounds once less: a unit in the last place of the dtype at most.
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    torch.testing.assert_close(out.cpu(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(cache.cpu(), expected_cache, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("scales", [False, True])
def test_rope_and_store_in_fp8(fp8_device: torch.device, scales: bool) -> None:
    """A quotient half-way between two fp8 numbers may round to either, which differ by 1/8 at
    most."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(37, 10 + 2 * 3, 64, generator=generator).bfloat16()
    qkv[1] *= 1e4  # saturates
    angles, slots = (
        torch.rand(37, 32, generator=generator) * 7,
        torch.randperm(40 * BLOCK_SIZE, generator=generator)[:37],
    )
    kv_scales = torch.tensor([[0.5, 0.3, 2], [0.1, 7, 1]]) if scales else None
    expected_cache = torch.zeros(2, 40, BLOCK_SIZE, 3, 64).to(FP8)
    cache = expected_cache.to(fp8_device)
    reference.rope_and_store_kv(
        qkv.clone(), 10, angles.cos(), angles.sin(), expected_cache, slots, kv_scales=kv_scales
    )
    arguments = (
        qkv.to(fp8_device),
        10,
        angles.cos().to(fp8_device),
        angles.sin().to(fp8_device),
        cache,
        slots.to(fp8_device),
    )
    rope_and_store_kv(*arguments, kv_scales=None if kv_scales is None else kv_scales.to(fp8_device))
    found, wanted = cache.cpu().float(), expected_cache.float()
    torch.testing.assert_close(found, wanted, atol=2**-9, rtol=1 / 8)
    assert (found == wanted).float().mean() > 0.99


def test_bad_arguments_are_named(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block tables are checked if the environment requests it; a tensor that was left on the host
    is refused."""
    case = attention_case([(1, 40), (3, 20)], heads=(8, 1), head_dim=64, dtype=torch.bfloat16).to(device)
    with pytest.raises(ValueError, match=r"^context_lens must be contiguous and on cuda"):
        run(replace(case, context_lens=case.context_lens.cpu()))
    monkeypatch.setenv("CANTATA_CHECK_INDICES", "1")
    run(case)
    table = case.block_table.clone()
    table[0, 1] = case.kv_cache.shape[1]
    with pytest.raises(ValueError, match=r"^block_table\[0, 1\] is "):
        run(replace(case, block_table=table))


def seconds(work: Callable[[], object]) -> float:
    """Return the seconds of one call: the median of twenty, each with a cold L2 cache."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    work()
    times = []
    for _ in range(20):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()  # type: ignore[no-untyped-call]
        work()
        end.record()  # type: ignore[no-untyped-call]
        end.synchronize()  # type: ignore[no-untyped-call]
        times.append(start.elapsed_time(end) / 1e3)  # type: ignore[no-untyped-call]
    return sorted(times)[len(times) // 2]


def bandwidth() -> float:
    """Return the bytes a second that a large copy reads and writes."""
    source = torch.ones(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source))


def test_times_against_the_roofline(device: torch.device, capsys: pytest.CaptureFixture[str]) -> None:
    """Prints; decodes of gpt-oss's heads are bound by memory, prefill by the matrix units. Fails
    only where nothing was measured."""
    rows, limit = [], bandwidth()
    dtypes = [torch.bfloat16] + ([FP8] if fp8_refusal(architecture(device)) is None else [])
    for kv_dtype in dtypes:
        for window in (None, 128):
            for num_seqs, context_len, query_len in [
                (1, 1000, 1),
                (1, 16000, 1),
                (1, 130000, 1),
                (64, 2000, 1),
                (256, 1000, 1),
                (1, 8192, 8192),
            ]:
                num_blocks = -(-context_len // BLOCK_SIZE)
                cache = torch.zeros(
                    2, num_seqs * num_blocks + 1, BLOCK_SIZE, 8, 64, dtype=kv_dtype, device=device
                )
                table = torch.randperm(num_seqs * num_blocks, device=device).view(num_seqs, num_blocks).int()
                q = torch.randn(num_seqs * query_len, 64, 64, dtype=torch.bfloat16, device=device)
                lengths = torch.full((num_seqs,), context_len, dtype=torch.int32, device=device)
                starts = torch.arange(num_seqs + 1, dtype=torch.int32, device=device) * query_len
                sinks = torch.zeros(64, device=device)
                took = seconds(
                    lambda q=q, cache=cache, table=table, lengths=lengths, starts=starts, sinks=sinks, window=window, query_len=query_len: (  # type: ignore[misc]  # noqa: E501
                        paged_attention(
                            q,
                            cache,
                            table,
                            lengths,
                            starts,
                            sinks,
                            scale=0.125,
                            window=window,
                            max_query_len=query_len,
                        )
                    )
                )
                seen = context_len if window is None else min(window, context_len)
                num_bytes = num_seqs * seen * 2 * 8 * 64 * cache.dtype.itemsize
                keys = (
                    num_seqs * query_len * (seen if query_len == 1 else seen / 2 if window is None else seen)
                )
                rows.append(
                    (
                        kv_dtype,
                        window,
                        num_seqs,
                        context_len,
                        query_len,
                        took,
                        num_bytes / took / limit,
                        4 * keys * 64 * 64 / took / 1e12,
                    )
                )
    with capsys.disabled():
        print(f"\n{torch.cuda.get_device_name(device)}, copies at {limit / 1e12:.2f} TB/s")
        for kv_dtype, window, num_seqs, context_len, query_len, took, share, tflops in rows:
            print(
                f"{kv_dtype!s:22} window {window!s:4} {num_seqs:4} sequences of {context_len:6}, "
                f"{query_len:5} queries each: "
                f"{took * 1e6:9.1f} us, {share:6.1%} of the bandwidth, {tflops:6.1f} TFLOP/s"
            )
    assert len(rows) == 12 * len(dtypes)
