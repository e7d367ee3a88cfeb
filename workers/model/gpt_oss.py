"""gpt-oss: pre-norm layers of sink attention (sliding and full in turn) and MoE.
`checkpoint.load_model` builds it.

A rank holds its shard (`workers/parallel/shard.py`): its heads, its rows of the vocabulary, its
part of the experts. Attention output and experts' output are partial sums, added over the ranks by
one all-reduce each; the embedding by one more. One rank is the same code with collectives that do
nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels import embedding, pointwise, sampling
from kernels.attention import AttentionOperations
from kernels.attention.fp8 import FP8
from kernels.embedding import Embed
from kernels.implementation import Implementation
from kernels.linear import PackedWeight
from kernels.mxfp4 import PackedMXFP4
from kernels.pointwise import PointwiseOperations, yarn_concentration, yarn_frequencies
from kernels.sampling import SamplingOperations
from workers.config import ModelConfig
from workers.model.experts import Experts
from workers.model.linear import Linear
from workers.model.step_batch import StepBatch
from workers.parallel.collectives import Collectives
from workers.parallel.shard import RankShard, vocab_lengths


@dataclass(frozen=True, slots=True)
class Attention:
    """One rank's heads of grouped-query attention with sinks over this layer's paged KV cache.

    Attributes:
        qkv: rows are the query heads, then the key heads, then the value heads.
        output: its bias is on one rank only.
        sinks: [num_heads], fp32.
        num_heads, num_kv_heads: numbers of this rank.
        window: keys visible to a query, itself included; None for all. Also selects the KV group of
            the layer.
        kernels: implementation for a dtype of the caches, selected when the layer was loaded.
        kv_scales: [2, num_kv_heads] fp32 of an fp8 KV cache, unused for other dtypes; None if all
            are 1.
    """

    qkv: Linear
    output: Linear
    sinks: Tensor
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None
    kernels: Implementation[AttentionOperations]
    kv_scales: Tensor | None = None

    def __call__(self, x: Tensor, batch: StepBatch, kv_cache: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Compute [T, hidden] → [T, hidden], this rank's summand, after storing the new keys and
        values in `kv_cache`.

        Args:
            kv_cache: [2, num_blocks, block_size, num_kv_heads, head_dim].
            cos, sin: [T, head_dim / 2] fp32.
        """
        qkv = self.qkv(x).view(x.shape[0], self.num_heads + 2 * self.num_kv_heads, self.head_dim)
        if self.window is None:
            slot_mapping, block_table = batch.slot_mapping_full, batch.block_table_full
        else:
            slot_mapping, block_table = batch.slot_mapping_sliding, batch.block_table_sliding
        kv_scales = self.kv_scales if kv_cache.dtype == FP8 else None
        operations = self.kernels.run
        q = operations.rope_and_store_kv(
            qkv, self.num_heads, cos, sin, kv_cache, slot_mapping, kv_scales=kv_scales
        )
        attended = operations.paged_attention(
            q,
            kv_cache,
            block_table,
            batch.context_lens,
            batch.cu_seqlens_q,
            self.sinks,
            scale=self.head_dim**-0.5,
            window=self.window,
            kv_scales=kv_scales,
            max_query_len=batch.max_query_len,
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
    """A loaded model, or one rank's shard of it. It keeps no state between steps: a step's state is
    in its StepBatch and the KV caches.

    Attributes:
        embedding: [shard.vocab.length, hidden].
        final_norm: [hidden].
        lm_head: hidden → shard.vocab.size (rows past the length are padding), not tied to the
            embedding.
        pointwise, embed, sampling: implementations of norms and rotary angles, of the embedding
            lookup, and of sampling from the logits, selected when the model is built.
    """

    config: ModelConfig
    shard: RankShard
    collectives: Collectives
    embedding: Tensor
    layers: tuple[Layer, ...]
    final_norm: Tensor
    lm_head: Linear
    pointwise: Implementation[PointwiseOperations] = field(init=False)
    embed: Implementation[Embed] = field(init=False)
    sampling: Implementation[SamplingOperations] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pointwise", pointwise.select(self.dtype, self.device))
        object.__setattr__(self, "embed", embedding.select(self.dtype, self.device))
        object.__setattr__(self, "sampling", sampling.select(self.device))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of activations and dense weights."""
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def num_kv_heads(self) -> int:
        """Number of key-value heads of this rank's KV caches."""
        return self.shard.kv_heads.length

    @property
    def weight_bytes(self) -> int:
        """Bytes of this rank's weights in memory, with packed experts as packed."""
        return sum(tensor.nbytes for tensor in self._weights())

    @torch.inference_mode()
    def forward(
        self,
        batch: StepBatch,
        kv_caches: Sequence[Tensor],
        observe: Callable[[str, Tensor], None] | None = None,
    ) -> Tensor:
        """Run all layers over one step's tokens and store their keys and values.

        Args:
            kv_caches: one for each layer, [2, num_blocks, block_size, num_kv_heads, head_dim] of
                the model's dtype or float8_e4m3fn; written to.
            observe: called with the name of the part just computed and the residual stream after
                it, which is the same on all ranks.
        Returns:
            [T, hidden], after the final norm; `compute_logits` takes the rows that are needed.
        """
        eps = self.config.rms_norm_eps
        rms_norm, add_rms_norm = self.pointwise.run.rms_norm, self.pointwise.run.add_rms_norm
        cos, sin = self._angles(batch.positions)
        add_up = self.collectives.all_reduce
        observe = observe or (lambda what, values: None)
        residual = self._embed(batch.token_ids)
        observe("the embedding", residual)
        normed = rms_norm(residual, self.layers[0].attention_norm, eps)
        next_norms = [layer.attention_norm for layer in self.layers[1:]] + [self.final_norm]
        for index, (layer, next_norm, kv_cache) in enumerate(
            zip(self.layers, next_norms, kv_caches, strict=True)
        ):
            attended = add_up(layer.attention(normed, batch, kv_cache, cos, sin))
            residual, normed = add_rms_norm(residual, attended, layer.experts_norm, eps)
            observe(f"the attention of layer {index}", residual)
            if self.collectives.size == 1:
                residual, normed = layer.experts.add_rms_norm(normed, residual, next_norm, eps)
            else:
                residual, normed = add_rms_norm(residual, add_up(layer.experts(normed)), next_norm, eps)
            observe(f"the experts of layer {index}", residual)
        observe("the final norm", normed)
        return normed

    @torch.inference_mode()
    def compute_logits(self, hidden: Tensor) -> Tensor | None:
        """Compute [rows, hidden] as `forward` returned them → [rows, vocab_size] fp32 on rank 0,
        None on the others."""
        parts = self.collectives.gather(self.lm_head(hidden))
        if parts is None or len(parts) == 1:
            return None if parts is None else parts[0].float()
        lengths = vocab_lengths(self.config, len(parts))
        return torch.cat(
            [part[:, :length] for part, length in zip(parts, lengths, strict=True)], dim=1
        ).float()

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return (cos, sin) of the rotary angles, each [T, head_dim / 2] fp32."""
        rope = self.config.rope
        frequencies = yarn_frequencies(
            positions.device,
            self.config.head_dim,
            rope.theta,
            rope.factor,
            rope.beta_fast,
            rope.beta_slow,
            rope.original_max_position_embeddings,
            rope.truncate,
        )
        return self.pointwise.run.cos_sin(positions, frequencies, yarn_concentration(rope.factor))

    def _embed(self, token_ids: Tensor) -> Tensor:
        """Compute [T] → [T, hidden]. Each token's row is on one rank; the other ranks add zeros."""
        rows = self.embed.run(token_ids, self.embedding, self.shard.vocab.start)
        return rows if self.collectives.size == 1 else self.collectives.all_reduce(rows)

    def _weights(self) -> Iterator[Tensor | PackedWeight]:
        yield from (self.embedding, self.final_norm, self.lm_head.weight)
        for layer in self.layers:
            attention, experts = layer.attention, layer.experts
            yield from (
                layer.attention_norm,
                layer.experts_norm,
                attention.sinks,
                experts.weights.gate_up_bias,
                experts.weights.down_bias,
            )
            for linear in (attention.qkv, attention.output, experts.gate):
                yield linear.weight
                if linear.bias is not None:
                    yield linear.bias
            for projection in (experts.weights.gate_up, experts.weights.down):
                yield from (
                    (projection.blocks, projection.scales)
                    if isinstance(projection, PackedMXFP4)
                    else (projection,)
                )
