"""Steps that are run before there are requests: the largest, to see what it takes beyond the weights before the KV cache is sized, and
smaller ones, so that their kernels are compiled."""

from dataclasses import replace

import torch

from kernels.sampling import SamplingBatch, sample
from kernels.sampling import warm_up as warm_up_sampling
from workers.config import BLOCK_SIZE, KVDtype, SchedulerConfig
from workers.kv_cache.tensors import KV_TORCH_DTYPES
from workers.model.gpt_oss import GptOss
from workers.model.step_batch import StepBatch
from workers.scheduler.plan import NULL_BLOCK


def largest_batch(scheduler: SchedulerConfig, max_model_len: int, device: torch.device) -> StepBatch:
    """max_num_batched_tokens tokens of as many sequences as may sample, all keys in NULL_BLOCK, as even as they come."""
    num_tokens = min(scheduler.max_num_batched_tokens, scheduler.max_num_seqs * max_model_len)
    num_seqs = min(scheduler.max_num_seqs, num_tokens)
    base, longer = divmod(num_tokens, num_seqs)
    lengths = torch.full((num_seqs,), base, dtype=torch.int32)
    lengths[:longer] += 1
    ends = lengths.cumsum(0, dtype=torch.int64)
    positions = torch.cat([torch.arange(length) for length in lengths.tolist()])
    slots = positions % BLOCK_SIZE + NULL_BLOCK * BLOCK_SIZE
    # As wide as a captured graph's, since attention's scratch grows with it.
    table = torch.full((num_seqs, max_model_len // BLOCK_SIZE + 1), NULL_BLOCK, dtype=torch.int32)
    cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.int64), ends)).to(torch.int32)
    # Different tokens choose different experts, so that all of them take part.
    token_ids = torch.arange(num_tokens)
    slots, table = slots.to(device), table.to(device)
    return StepBatch(
        token_ids=token_ids.to(device),
        positions=positions.to(device),
        slot_mapping_full=slots,
        slot_mapping_sliding=slots,
        block_table_full=table,
        block_table_sliding=table,
        context_lens=lengths.to(device),
        cu_seqlens_q=cu_seqlens.to(device),
        sample_indices=(ends - 1).to(device),
        max_query_len=int(lengths[0]),
    )


@torch.inference_mode()
def run_largest_step(model: GptOss, scheduler: SchedulerConfig, max_model_len: int, kv_dtype: KVDtype) -> None:
    """Forward, logits and sampling of the largest step; keys and values go to one block that is let go of. All ranks take part."""
    batch = largest_batch(scheduler, max_model_len, model.device)
    batch.token_ids.remainder_(model.config.vocab_size)
    shape = (2, NULL_BLOCK + 1, BLOCK_SIZE, model.num_kv_heads, model.config.head_dim)
    kv_caches = [torch.zeros(shape, dtype=KV_TORCH_DTYPES[kv_dtype], device=model.device) for _ in model.layers]
    logits = model.compute_logits(model.forward(batch, kv_caches)[batch.sample_indices])
    if logits is not None:
        rows = torch.arange(len(logits), device=model.device)
        sample(logits, SamplingBatch(torch.ones_like(rows, dtype=torch.float32), rows, rows, top_p=torch.full_like(logits[:, 0], 0.9)))


def activation_bytes(model: GptOss, scheduler: SchedulerConfig, max_model_len: int, kv_dtype: KVDtype) -> int:
    """Bytes of GPU memory that the largest step takes at its peak beyond what is allocated now."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    run_largest_step(model, scheduler, max_model_len, kv_dtype)
    peak: int = torch.cuda.max_memory_allocated(model.device)
    torch.cuda.empty_cache()
    return peak - before


def warm_up(model: GptOss, scheduler: SchedulerConfig, max_model_len: int, kv_dtype: KVDtype) -> None:
    """Prompts of 1, 2, 4, … tokens up to the budget of a step, then each way to sample. All ranks take part.

    Triton compiles a kernel when it first meets a kind of step, which takes seconds and must not happen while requests wait.
    """
    num_tokens = 1
    while num_tokens < scheduler.max_num_batched_tokens:
        run_largest_step(model, replace(scheduler, max_num_seqs=1, max_num_batched_tokens=num_tokens), max_model_len, kv_dtype)
        num_tokens *= 2
    if model.collectives.rank == 0:
        warm_up_sampling(model.config.vocab_size, model.device)
