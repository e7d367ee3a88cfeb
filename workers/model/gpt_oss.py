"""gpt-oss: pre-norm layers of sink attention (sliding and full in turn) and MoE. `checkpoint.load_model` builds it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kernels.attention import paged_attention, store_kv
from kernels.mxfp4 import PackedMXFP4
from kernels.pointwise import apply_rope, rms_norm, yarn_cos_sin
from workers.config import ModelConfig
from workers.model.experts import Experts
from workers.model.linear import Linear
from workers.model.step_batch import StepBatch


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query attention with sinks over this layer's paged KV cache.

    Attributes:
        qkv: rows are the query heads, then the key heads, then the value heads.
        sinks: [num_heads], fp32.
        window: keys a query sees, itself included; None for all. Also says which KV group the layer belongs to.
    """

    qkv: Linear
    output: Linear
    sinks: Tensor
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None

    def __call__(self, x: Tensor, batch: StepBatch, kv_cache: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[T, hidden] → [T, hidden]; stores the new keys and values in `kv_cache` first.

        Args:
            kv_cache: [2, num_blocks, block_size, num_kv_heads, head_dim].
            cos, sin: [T, head_dim / 2] fp32.
        """
        heads = self.qkv(x).view(x.shape[0], self.num_heads + 2 * self.num_kv_heads, self.head_dim)
        q, k, v = torch.split(heads, [self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        if self.window is None:
            slot_mapping, block_table = batch.slot_mapping_full, batch.block_table_full
        else:
            slot_mapping, block_table = batch.slot_mapping_sliding, batch.block_table_sliding
        store_kv(apply_rope(k, cos, sin), v, kv_cache, slot_mapping)
        attended = paged_attention(
            apply_rope(q, cos, sin),
            kv_cache,
            block_table,
            batch.context_lens,
            batch.cu_seqlens_q,
            self.sinks,
            scale=self.head_dim**-0.5,
            window=self.window,
        )
        return self.output(attended.reshape(x.shape[0], self.num_heads * self.head_dim))


@dataclass(frozen=True, slots=True)
class Layer:
    """One transformer layer; the norms are [hidden]."""

    attention_norm: Tensor
    attention: Attention
    experts_norm: Tensor
    experts: Experts


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class GptOss:
    """A loaded model. It keeps no state between steps: what a step needs is in its StepBatch and the KV caches.

    Attributes:
        embedding: [vocab_size, hidden].
        final_norm: [hidden].
        lm_head: hidden → vocab_size, not tied to the embedding.
    """

    config: ModelConfig
    embedding: Tensor
    layers: tuple[Layer, ...]
    final_norm: Tensor
    lm_head: Linear

    @property
    def dtype(self) -> torch.dtype:
        """Of activations, dense weights and KV caches."""
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def weight_bytes(self) -> int:
        """Memory held by the weights, packed experts as packed."""
        return sum(tensor.nbytes for tensor in self._weights())

    @torch.inference_mode()
    def forward(self, batch: StepBatch, kv_caches: Sequence[Tensor]) -> Tensor:
        """Run all layers over one step's tokens and store their keys and values.

        Args:
            kv_caches: one for each layer, [2, num_blocks, block_size, num_kv_heads, head_dim] of the model's dtype; written to.
        Returns:
            [T, hidden], after the final norm; `compute_logits` takes the rows of it that are wanted.
        """
        rope = self.config.rope
        eps = self.config.rms_norm_eps
        cos, sin = yarn_cos_sin(
            batch.positions,
            self.config.head_dim,
            theta=rope.theta,
            factor=rope.factor,
            beta_fast=rope.beta_fast,
            beta_slow=rope.beta_slow,
            original_max_position_embeddings=rope.original_max_position_embeddings,
            truncate=rope.truncate,
        )
        hidden = functional.embedding(batch.token_ids, self.embedding)
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            hidden = hidden + layer.attention(rms_norm(hidden, layer.attention_norm, eps), batch, kv_cache, cos, sin)
            hidden = hidden + layer.experts(rms_norm(hidden, layer.experts_norm, eps))
        return rms_norm(hidden, self.final_norm, eps)

    @torch.inference_mode()
    def compute_logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] as `forward` returned them → [rows, vocab_size] fp32."""
        return self.lm_head(hidden).float()

    def _weights(self) -> Iterator[Tensor]:
        yield from (self.embedding, self.final_norm, self.lm_head.weight)
        for layer in self.layers:
            attention, experts = layer.attention, layer.experts
            yield from (layer.attention_norm, layer.experts_norm, attention.sinks, experts.gate_up_bias, experts.down_bias)
            for linear in (attention.qkv, attention.output, experts.gate):
                yield linear.weight
                if linear.bias is not None:
                    yield linear.bias
            for projection in (experts.gate_up, experts.down):
                yield from (projection.blocks, projection.scales) if isinstance(projection, PackedMXFP4) else (projection,)
