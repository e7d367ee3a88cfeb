"""Sampling by Triton kernels: nothing comes back to the host and no shape depends on data, so a CUDA graph can hold it."""

from torch import Tensor

from kernels.sampling.batch import SampleOutput, SamplingBatch
from kernels.sampling.choose import choose
from kernels.sampling.logprobs import logprobs
from kernels.sampling.modify import modify


def sample(logits: Tensor, batch: SamplingBatch) -> SampleOutput:
    """As `kernels.sampling.reference.sample`, which see; shapes and dtypes have been checked there, rows and token ids have not.

    Raises:
        ValueError: logits is not contiguous in its last axis.
    """
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError(f"logits must be contiguous in its last axis, got strides {list(logits.stride())}")
    token_ids = choose(modify(logits, batch), batch)
    if batch.logprob_rows is None:
        return SampleOutput(token_ids)
    return logprobs(logits, token_ids, batch.logprob_rows, batch.num_top_logprobs)
