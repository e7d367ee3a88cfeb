"""A checkpoint small enough for hundreds of forward passes a second on one core. All dimensions
differ; one layer slides, one does not."""

from pathlib import Path

from workers.config import ModelConfig
from workers.model.make_checkpoint import write_checkpoint

TINY = ModelConfig(
    vocab_size=211,
    hidden_size=96,
    intermediate_size=64,
    num_layers=2,
    num_heads=6,
    num_kv_heads=3,
    head_dim=8,
    num_experts=5,
    num_experts_per_token=2,
    layer_windows=(24, None),
    max_context_len=512,
    stop_token_ids=(210,),
)


TINY_BLOCK_BYTES = 2 * 16 * TINY.num_kv_heads * TINY.head_dim * 4
"""Bytes of one KV block of either group, in float32."""


def write_tiny_checkpoint(folder: Path, seed: int = 0) -> Path:
    """Write the checkpoint into a new folder of `folder`; return its path."""
    path = folder / f"tiny-{seed}"
    write_checkpoint(path, TINY, seed=seed)
    return path
