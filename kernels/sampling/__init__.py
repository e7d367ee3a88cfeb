"""Choosing the next token of each sequence."""

import torch
from torch import Tensor

from kernels.backend import runs_triton, triton_runs_on
from kernels.cpu import sampling as cpu
from kernels.sampling import reference
from kernels.sampling.batch import AllowedBits, LogitBias, Penalties, SampleOutput, SamplingBatch, TokenIds
from kernels.sampling.reference import philox4x32, philox_words, uniform

__all__ = [
    "AllowedBits",
    "LogitBias",
    "Penalties",
    "SampleOutput",
    "SamplingBatch",
    "TokenIds",
    "philox4x32",
    "philox_words",
    "sample",
    "score",
    "uniform",
    "warm_up",
]


def sample(logits: Tensor, batch: SamplingBatch) -> SampleOutput:
    """`kernels.sampling.reference.sample`, which defines it, by the kernels for this device.

    On a GPU rows and token ids are not checked, as that would wait for it; entries outside the
    logits are passed over.
    """
    if runs_triton(logits):
        from kernels.sampling import device

        reference.check_logits(logits)
        batch.check_shapes(*logits.shape)
        return device.sample(logits, batch)
    run = cpu.sample if cpu.can_run(logits) else reference.sample
    return run(logits, batch)


def score(logits: Tensor, token_ids: Tensor, num_top: int) -> SampleOutput:
    """Return the log probabilities of given tokens, one for each row, and of the most likely ones.

    Args:
        logits: [S, V] float.
        token_ids: [S] int64.
        num_top: alternatives reported for each row, at most V.
    """
    reference.check_logits(logits)
    rows = torch.arange(len(logits), device=logits.device)
    if runs_triton(logits):
        from kernels.sampling.logprobs import logprobs

        return logprobs(logits, token_ids, rows, num_top)
    run = cpu.logprobs if cpu.can_run(logits) else reference.logprobs
    return run(logits.float(), token_ids, rows, num_top)


def warm_up(vocab_size: int, device: torch.device) -> None:
    """Have each kernel of `sample` for this device compiled."""
    if triton_runs_on(device):
        from kernels.sampling import device as on_device

        on_device.warm_up(vocab_size, device)
