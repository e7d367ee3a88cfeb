"""Sampling of the next token of each sequence."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.backend import triton_runs_on
from kernels.cpu import sampling as cpu
from kernels.implementation import Implementation, by_device
from kernels.sampling import reference
from kernels.sampling.batch import AllowedBits, LogitBias, Penalties, SampleOutput, SamplingBatch, TokenIds
from kernels.sampling.reference import philox4x32, philox_words, uniform

__all__ = [
    "AllowedBits",
    "LogitBias",
    "Penalties",
    "SampleOutput",
    "SamplingBatch",
    "SamplingOperations",
    "TokenIds",
    "philox4x32",
    "philox_words",
    "sample",
    "select",
    "uniform",
    "warm_up",
]


@dataclass(frozen=True, slots=True)
class SamplingOperations:
    """An implementation's functions.

    Attributes:
        sample: `kernels.sampling.reference.sample`.
        logprobs: `kernels.sampling.reference.logprobs`.
    """

    sample: Callable[[Tensor, SamplingBatch], SampleOutput]
    logprobs: Callable[[Tensor, Tensor, Tensor, int], SampleOutput]

    def score(self, logits: Tensor, token_ids: Tensor, num_top: int) -> SampleOutput:
        """Return the log probabilities of given tokens, one for each row, and of the most likely
        ones.

        Args:
            logits: [S, V] float.
            token_ids: [S] int64.
            num_top: number of alternatives reported for each row, at most V.
        """
        reference.check_logits(logits)
        rows = torch.arange(len(logits), device=logits.device)
        return self.logprobs(logits.float(), token_ids, rows, num_top)


def sample(logits: Tensor, batch: SamplingBatch) -> SampleOutput:
    """Compute `kernels.sampling.reference.sample` with the implementation that `select` returns.

    On a GPU rows and token ids are not checked, since that would wait for the device; entries
    outside the logits are skipped.
    """
    return select(logits.device).run.sample(logits, batch)


def select(device: torch.device) -> Implementation[SamplingOperations]:
    """Select the implementation for logits of any dtype."""
    return by_device(
        device,
        torch.float32,
        triton=_on_triton,
        cpp=SamplingOperations(cpu.sample, cpu.logprobs),
        reference=SamplingOperations(reference.sample, reference.logprobs),
    )


def _on_triton() -> SamplingOperations:
    from kernels.sampling import device, logprobs

    return SamplingOperations(device.sample, logprobs.logprobs)


def warm_up(vocab_size: int, device: torch.device) -> None:
    """Compile each kernel of `sample` for this device."""
    if triton_runs_on(device):
        from kernels.sampling import device as on_device

        on_device.warm_up(vocab_size, device)
