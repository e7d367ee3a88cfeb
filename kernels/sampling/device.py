"""Sampling by Triton kernels. No data comes back to the host and no shape depends on data, so a
CUDA graph can hold it."""

from dataclasses import replace

import torch
from torch import Tensor

from kernels.automaton.device import advance
from kernels.automaton.layout import rows_that_allow_all
from kernels.sampling import reference
from kernels.sampling.batch import AllowedBits, LogitBias, Penalties, SampleOutput, SamplingBatch, TokenIds
from kernels.sampling.choose import choose
from kernels.sampling.logprobs import logprobs
from kernels.sampling.modify import modify


def sample(logits: Tensor, batch: SamplingBatch) -> SampleOutput:
    """Compute `kernels.sampling.reference.sample`. Rows and token ids are not checked, as that
    would wait for the device: entries outside the logits are skipped.

    Raises:
        ValueError: names the argument of a wrong shape, or logits that are not contiguous in their
            last axis.
    """
    reference.check_logits(logits)
    batch.check_shapes(*logits.shape)
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError(f"logits must be contiguous in its last axis, got strides {list(logits.stride())}")
    token_ids = choose(modify(logits, batch), batch)
    if batch.automaton is not None:
        advance(batch.automaton, token_ids)
    if batch.logprob_rows is None:
        return SampleOutput(token_ids)
    return logprobs(logits, token_ids, batch.logprob_rows, batch.num_top_logprobs)


def warm_up(vocab_size: int, device: torch.device) -> None:
    """Sample once in each way that has a kernel, or a kernel variant, of its own."""
    logits = torch.zeros(1, vocab_size, device=device)
    zero, one = torch.zeros(1, dtype=torch.int64, device=device), torch.ones(1, device=device)
    count = zero.to(torch.int32)
    plain = SamplingBatch(one, zero, zero)
    tokens = TokenIds(zero, zero)
    everything_else = replace(
        plain,
        automaton=rows_that_allow_all(1, device),
        logit_bias=LogitBias(zero, zero, one),
        penalties=Penalties(zero, zero, count, one, one, one),
        allowed_bits=AllowedBits(zero, torch.ones(1, 1, dtype=torch.uint8, device=device)),
        logprob_rows=zero,
        num_top_logprobs=1,
    )
    for batch in (
        SamplingBatch(),
        everything_else,
        replace(plain, top_k=zero + 1),
        replace(plain, top_p=one / 2),
        replace(plain, top_k=zero + 1, top_p=one / 2),
        SamplingBatch(allowed_ids=tokens),
        SamplingBatch(forbidden_ids=tokens),
        SamplingBatch(allowed_ids=tokens, forbidden_ids=tokens),
    ):
        sample(logits, batch)
