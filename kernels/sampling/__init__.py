"""Choosing the next token of each sequence."""

from torch import Tensor

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
    "uniform",
]


def sample(logits: Tensor, batch: SamplingBatch) -> SampleOutput:
    """`kernels.sampling.reference.sample`, which defines it, by the kernel for this device."""
    run = cpu.sample if cpu.can_run(logits) else reference.sample
    return run(logits, batch)
