"""Choosing the next token of each sequence."""

from kernels.sampling.batch import AllowedBits, LogitBias, Penalties, SampleOutput, SamplingBatch, TokenIds
from kernels.sampling.reference import philox4x32, philox_words, sample, uniform

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
