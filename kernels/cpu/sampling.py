"""Sampling and log probabilities. The reference applies penalties, biases and masks but those of
automata, which touch few logits."""

import ctypes

import torch
from torch import Tensor

from kernels.cpu import automaton, native, structures
from kernels.sampling import reference
from kernels.sampling.batch import SampleOutput, SamplingBatch

TOKEN_BLOCK = 512
"""Block size in tokens, as in src/sampling.h `kTokenBlock`."""
MAX_TOP_LOGPROBS = 512
"""Maximum number of alternatives, which are sorted by insertion; the reference is faster for
more."""


def sample(logits: Tensor, batch: SamplingBatch) -> SampleOutput:
    """Compute `kernels.sampling.reference.sample`. Weights differ from the reference's in the last
    bits of fp32, so a token differs if the row's random number is that close to a boundary. A row's
    token does not depend on the other rows or the number of threads."""
    reference.check(logits, batch)
    raw = _with_rows(logits.float())
    token_ids = _choose(reference.modify(raw, batch, automaton.mask), batch)
    if batch.automaton is not None:
        automaton.advance(batch.automaton, token_ids)
    if batch.logprob_rows is None:
        return SampleOutput(token_ids)
    return logprobs(raw, token_ids, batch.logprob_rows, batch.num_top_logprobs)


def logprobs(logits: Tensor, token_ids: Tensor, rows: Tensor, num_top: int) -> SampleOutput:
    """Compute `kernels.sampling.reference.logprobs` for fp32 logits."""
    if num_top > MAX_TOP_LOGPROBS:
        return reference.logprobs(logits, token_ids, rows, num_top)
    return _logprobs(_with_rows(logits), token_ids, rows, num_top)


def _with_rows(logits: Tensor) -> Tensor:
    """Return the logits with each row contiguous in memory."""
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _choose(logits: Tensor, batch: SamplingBatch) -> Tensor:
    num_rows, vocab = logits.shape
    parameters = (
        batch.temperature,
        batch.seeds,
        batch.output_positions,
        batch.top_k,
        batch.top_p,
        batch.min_p,
    )
    vectors = [None if vector is None else vector.contiguous() for vector in parameters]
    token_ids = torch.empty(num_rows, dtype=torch.int64)
    maxima, sums = _scratch(num_rows, vocab)
    arguments = structures.SampleArgs(
        logits.data_ptr(),
        *map(native.pointer, vectors),
        native.pointer(token_ids),
        native.pointer(maxima),
        native.pointer(sums),
        num_rows,
        vocab,
        logits.stride(0),
    )
    native.ready().cantata_sample(ctypes.byref(arguments))
    return token_ids


def _logprobs(logits: Tensor, token_ids: Tensor, rows: Tensor, num_top: int) -> SampleOutput:
    vocab, rows = logits.shape[1], rows.contiguous()
    chosen = torch.empty(len(rows))
    top_ids, top_logprobs = (
        torch.empty(len(rows), num_top, dtype=torch.int64),
        torch.empty(len(rows), num_top),
    )
    maxima, sums = _scratch(len(rows), vocab)
    arguments = structures.LogprobArgs(
        logits.data_ptr(),
        native.pointer(rows),
        native.pointer(token_ids),
        native.pointer(chosen),
        native.pointer(top_ids),
        native.pointer(top_logprobs),
        native.pointer(maxima),
        native.pointer(sums),
        len(rows),
        vocab,
        logits.stride(0),
        num_top,
    )
    native.ready().cantata_logprobs(ctypes.byref(arguments))
    return SampleOutput(token_ids, chosen, top_ids, top_logprobs)


def _scratch(num_rows: int, vocab: int) -> tuple[Tensor, Tensor]:
    blocks = num_rows * -(-vocab // TOKEN_BLOCK)
    return torch.empty(blocks), torch.empty(blocks, dtype=torch.float64)
