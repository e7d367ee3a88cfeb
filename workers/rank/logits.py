"""Logits of one sequence, computed outside the steps, and the check of freshly loaded weights that
uses them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from workers.config import BLOCK_SIZE, EngineConfig
from workers.errors import CheckpointError
from workers.kv_cache.tensors import KV_TORCH_DTYPES
from workers.model.gpt_oss import GptOss
from workers.model.step_batch import StepBatch

_NUM_CHECK_TOKENS = 16
"""Number of tokens in the check: cheap compared with loading, and enough to reach many experts."""


def sequence_logits(
    model: GptOss,
    config: EngineConfig,
    token_ids: Sequence[int],
    observe: Callable[[str, Tensor], None] | None = None,
) -> Tensor | None:
    """Return the logits after each token of one sequence, computed in a KV cache of its own. All
    ranks take part.

    Args:
        observe: as in `GptOss.forward`.
    Returns:
        [len(token_ids), vocab_size] fp32 on rank 0, None on the others.
    """
    num_blocks = -(-len(token_ids) // BLOCK_SIZE)
    shape = (2, num_blocks, BLOCK_SIZE, model.num_kv_heads, model.config.head_dim)
    dtype = KV_TORCH_DTYPES[config.kv_dtype]
    kv_caches = [torch.zeros(shape, dtype=dtype, device=model.device) for _ in model.layers]
    chunk = config.scheduler.max_num_batched_tokens
    rows = [
        model.compute_logits(
            model.forward(
                _chunk_batch(token_ids, start, min(start + chunk, len(token_ids)), model.device),
                kv_caches,
                observe,
            )
        )
        for start in range(0, len(token_ids), chunk)
    ]
    parts = [part for part in rows if part is not None]
    return torch.cat(parts) if parts else None


def check_weights(model: GptOss, config: EngineConfig) -> None:
    """Run a few tokens from all over the vocabulary. Without this check, NaN in a matrix, or values
    that overflow, would be served as token 0. All ranks take part.

    Raises:
        CheckpointError: the model's output is not finite, or is the same for every token.
    """
    size = model.config.vocab_size
    not_finite: list[str] = []

    def observe(what: str, values: Tensor) -> None:
        if not not_finite and not torch.isfinite(values).all():
            not_finite.append(what)

    token_ids = [index * size // _NUM_CHECK_TOKENS for index in range(_NUM_CHECK_TOKENS)]
    logits = sequence_logits(model, config, token_ids, observe)
    if logits is not None:
        observe("lm_head", logits)
    broken = f"the weights in {config.model_path} are broken: what"
    if not_finite:
        raise CheckpointError(f"{broken} {not_finite[0]} computes is not finite")
    if logits is not None and bool((logits.amax(1) == logits.amin(1)).any()):
        raise CheckpointError(f"{broken} the model computes is the same for every token of the vocabulary")


def _chunk_batch(token_ids: Sequence[int], start: int, end: int, device: torch.device) -> StepBatch:
    """Return the batch of the tokens start..end of a sequence; its block i is block i of the
    cache."""
    positions = torch.arange(start, end, device=device)
    blocks = torch.arange(-(-end // BLOCK_SIZE), dtype=torch.int32, device=device)[None]
    return StepBatch(
        token_ids=torch.tensor(token_ids[start:end], dtype=torch.int64, device=device),
        positions=positions,
        slot_mapping_full=positions,
        slot_mapping_sliding=positions,
        block_table_full=blocks,
        block_table_sliding=blocks,
        context_lens=torch.tensor([end], dtype=torch.int32, device=device),
        cu_seqlens_q=torch.tensor([0, end - start], dtype=torch.int32, device=device),
        sample_indices=torch.arange(end - start, device=device),
        max_query_len=end - start,
    )
