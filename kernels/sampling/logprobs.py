# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Log probabilities of the sampled tokens and of the most likely ones, on the device: one pass over
the chunks of each row, then one over their results. The best n are taken one by one; n is at most a
few dozen, and a packed candidate (`keys.py`) makes the order exact."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.sampling.batch import SampleOutput
from kernels.sampling.keys import LEAST, candidate_id, candidate_value, candidates, load_logits

CHUNK = 4096
"""Number of tokens per program."""
USUAL_TOP = 20
"""Number of alternatives up to which all numbers share a compiled kernel; the maximum of a
request."""


@triton.jit(
    do_not_specialize=["num_rows", "num_top"], do_not_specialize_on_alignment=["maxima_ptr", "sums_ptr"]
)
def chunk_logprobs_kernel(
    logits_ptr,
    rows_ptr,
    maxima_ptr,
    sums_ptr,
    best_ptr,
    stride,
    num_rows,
    vocab_size,
    num_top,
    CHUNK: tl.constexpr,
):
    index, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(rows_ptr + index)
    if (row < 0) | (row >= num_rows):
        return
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    x = load_logits(logits_ptr + row * stride, at, vocab_size)  # [CHUNK]
    maximum = tl.max(x, axis=0)
    at_chunk = index * tl.num_programs(1) + chunk
    tl.store(maxima_ptr + at_chunk, maximum)
    tl.store(sums_ptr + at_chunk, tl.sum(tl.where(x > float("-inf"), tl.exp(x - maximum), 0.0), axis=0))
    packed = candidates(x, at, vocab_size)
    for place in range(num_top):
        best = tl.max(packed, axis=0)
        tl.store(best_ptr + at_chunk * num_top + place, best)
        packed = tl.where(packed == best, LEAST, packed)


@triton.jit(
    do_not_specialize=["num_rows", "num_top"], do_not_specialize_on_alignment=["maxima_ptr", "sums_ptr"]
)
def logprobs_kernel(
    logits_ptr,
    rows_ptr,
    token_ids_ptr,
    maxima_ptr,
    sums_ptr,
    best_ptr,
    logprobs_ptr,
    top_ids_ptr,
    top_logprobs_ptr,
    stride,
    num_rows,
    num_chunks,
    num_top,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_BEST: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + index)
    if (row < 0) | (row >= num_rows):
        return
    chunks = tl.arange(0, BLOCK_CHUNKS)
    maxima = tl.load(maxima_ptr + index * num_chunks + chunks, mask=chunks < num_chunks, other=float("-inf"))
    sums = tl.load(sums_ptr + index * num_chunks + chunks, mask=chunks < num_chunks, other=0.0)
    maximum = tl.max(maxima, axis=0)
    normaliser = maximum + tl.log(tl.sum(tl.where(sums > 0, sums * tl.exp(maxima - maximum), 0.0), axis=0))
    chosen = tl.load(logits_ptr + row * stride + tl.load(token_ids_ptr + row)).to(tl.float32)
    tl.store(logprobs_ptr + index, chosen - normaliser)
    at = tl.arange(0, BLOCK_BEST)
    packed = tl.load(
        best_ptr + index * num_chunks * num_top + at, mask=at < num_chunks * num_top, other=LEAST
    )
    for place in range(num_top):
        best = tl.max(packed, axis=0)
        tl.store(top_ids_ptr + index * num_top + place, candidate_id(best))
        tl.store(top_logprobs_ptr + index * num_top + place, candidate_value(best) - normaliser)
        packed = tl.where(packed == best, LEAST, packed)


def logprobs(logits: Tensor, token_ids: Tensor, rows: Tensor, num_top: int) -> SampleOutput:
    """Return log probabilities of the raw logits.

    Args:
        logits: [S, V] float, contiguous in the last axis.
        token_ids: [S] int64, the sampled tokens.
        rows: [L] int64.
    """
    num_wanted, vocab_size = len(rows), logits.shape[1]
    device = logits.device
    chosen = torch.empty(num_wanted, dtype=torch.float32, device=device)
    top_ids = torch.empty(num_wanted, num_top, dtype=torch.int64, device=device)
    top_logprobs = torch.empty(num_wanted, num_top, dtype=torch.float32, device=device)
    if num_wanted:
        num_chunks = triton.cdiv(vocab_size, CHUNK)
        maxima, sums = torch.empty(2, num_wanted, num_chunks, dtype=torch.float32, device=device)
        best = torch.empty(num_wanted, num_chunks, num_top, dtype=torch.int64, device=device)
        chunk_logprobs_kernel[(num_wanted, num_chunks)](
            logits,
            rows,
            maxima,
            sums,
            best,
            logits.stride(0),
            len(logits),
            vocab_size,
            num_top,
            CHUNK=CHUNK,
            num_warps=4,
        )
        logprobs_kernel[(num_wanted,)](
            logits,
            rows,
            token_ids,
            maxima,
            sums,
            best,
            chosen,
            top_ids,
            top_logprobs,
            logits.stride(0),
            len(logits),
            num_chunks,
            num_top,
            BLOCK_CHUNKS=triton.next_power_of_2(num_chunks),
            BLOCK_BEST=triton.next_power_of_2(num_chunks * max(num_top, USUAL_TOP)),
            num_warps=4,
        )
    return SampleOutput(token_ids, chosen, top_ids, top_logprobs)
