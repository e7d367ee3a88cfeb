"""The size of a model, and of each rank's part of it, from its shape alone: arithmetic over
`tensor_specs` and shards, without loading tensors."""

from dataclasses import dataclass

from kernels.formats import MX_BLOCK
from workers.config import BLOCK_SIZE, DenseDtype, Dtype, KVDtype, ModelConfig
from workers.kv_cache.memory import DTYPE_BYTES
from workers.model.tensor_specs import PACKED_BYTES, tensor_names, tensor_specs
from workers.parallel.shard import RankShard, Span

_GATE_BYTES = _SINK_BYTES = 4
"""Bytes per element of the gate and the sinks, which are fp32 whatever the model's dtype."""
_ROW_SCALE_BYTES = 4
"""Bytes per row of int8 weights for the row's scale."""


@dataclass(frozen=True, slots=True)
class RankBytes:
    """Bytes of one rank's weights by kind.

    Attributes:
        padding: the part of these bytes that is zeros, which give all ranks equal shapes.
    """

    attention: int
    experts: int
    gate_and_norms: int
    embedding: int
    lm_head: int
    padding: int

    @property
    def total(self) -> int:
        return self.attention + self.experts + self.gate_and_norms + self.embedding + self.lm_head


@dataclass(frozen=True, slots=True)
class KVBytes:
    """Bytes of one rank's KV cache.

    Attributes:
        per_token: bytes of the full layers, for each token of a sequence.
        per_sequence: bytes of the sliding layers, which keep a window, for a sequence longer than
            it.
    """

    per_token: int
    per_sequence: int


def count_parameters(model: ModelConfig) -> tuple[int, int]:
    """Return (all parameters, those used for one token) as the gpt-oss model card counts them
    (arXiv 2508.10925, table 1): an MXFP4 value is one parameter, its scale none; the embedding and
    the experts not chosen are not used."""
    names = tensor_names(model)
    of_experts = {
        name
        for layer in names.layers
        for experts in (layer.gate_up, layer.down)
        for name in (experts.blocks, experts.dense, experts.bias)
    }
    total = active = 0
    for spec in tensor_specs(model):
        total += spec.num_parameters
        if spec.name in of_experts:
            active += spec.num_parameters // model.num_experts * model.num_experts_per_token
        elif spec.name != names.embedding:
            active += spec.num_parameters
    return total, active


def rank_bytes(
    model: ModelConfig,
    shard: RankShard,
    dtype: Dtype,
    *,
    packed_experts: bool | None = None,
    cpu_dense_dtype: DenseDtype = "bf16",
) -> RankBytes:
    """Return the bytes of a rank's loaded weights. Padding that an expert layout adds is not
    included: for gpt-oss it is zero while the ranks do not split experts, and under 2 % otherwise
    (`wgmma.v1` pads the intermediate columns of down to 64).

    Args:
        packed_experts: whether the experts are MXFP4 in memory; None for as stored.
        cpu_dense_dtype: dtype of attention projections and lm_head.
    """

    def dense(rows: int, width: int) -> int:
        return rows * (width + _ROW_SCALE_BYTES) if cpu_dense_dtype == "int8" else rows * width * item

    item = DTYPE_BYTES[dtype]
    packed = model.experts_format == "mxfp4" if packed_experts is None else packed_experts
    hidden, layers = model.hidden_size, model.num_layers
    query = shard.heads.length * model.head_dim
    keys = shard.kv_heads.length * model.head_dim
    attention = (
        dense(query + 2 * keys, hidden)
        + (query + 2 * keys) * item
        + dense(hidden, query)
        + shard.heads.length * _SINK_BYTES
    )
    attention += hidden * item if shard.adds_output_bias else 0
    width = shard.intermediate.size
    gate = model.num_experts * (hidden + 1) * _GATE_BYTES
    return RankBytes(
        attention=attention * layers,
        experts=shard.experts.length * _expert_bytes(hidden, width, item, packed) * layers,
        gate_and_norms=(gate + 2 * hidden * item) * layers + hidden * item,
        embedding=shard.vocab.length * hidden * item,
        lm_head=dense(shard.vocab.size, hidden),
        padding=shard.experts.length * _expert_padding(hidden, shard.intermediate, item, packed) * layers
        + dense(shard.vocab.size - shard.vocab.length, hidden),
    )


def kv_bytes(model: ModelConfig, shard: RankShard, dtype: KVDtype) -> KVBytes:
    """Return the KV-cache bytes that a rank needs, in whole blocks where the cache consists of
    blocks."""
    layer = 2 * shard.kv_heads.length * model.head_dim * DTYPE_BYTES[dtype]
    num_full = sum(window is None for window in model.layer_windows)
    window = model.sliding_window or 0
    sliding_tokens = -(-window // BLOCK_SIZE) * BLOCK_SIZE
    return KVBytes(
        per_token=layer * num_full, per_sequence=layer * (model.num_layers - num_full) * sliding_tokens
    )


def sequence_kv_bytes(model: ModelConfig, shard: RankShard, dtype: KVDtype, num_tokens: int) -> int:
    """Return the bytes on a rank of the keys and values visible to the last of a sequence's
    num_tokens: all in full layers, the window in sliding ones."""
    layer = 2 * shard.kv_heads.length * model.head_dim * DTYPE_BYTES[dtype]
    return layer * sum(
        num_tokens if window is None else min(num_tokens, window) for window in model.layer_windows
    )


def expected_experts_hit(model: ModelConfig, num_tokens: int) -> float:
    """Return the expected number of experts of a layer that at least one of num_tokens tokens
    chooses, if choices are independent and uniform."""
    missed: float = (1 - model.num_experts_per_token / model.num_experts) ** num_tokens
    return model.num_experts * (1 - missed)


def _expert_bytes(hidden: int, width: int, item: int, packed: bool) -> int:
    """Return the bytes of one expert: gate_up [2 * width, hidden], down [hidden, width], and their
    biases."""
    if packed:
        groups = 2 * width * (hidden // MX_BLOCK) + hidden * (width // MX_BLOCK)
        weights = groups * (PACKED_BYTES + 1)
    else:
        weights = 3 * width * hidden * item
    return weights + (2 * width + hidden) * item


def _expert_padding(hidden: int, width: Span, item: int, packed: bool) -> int:
    return _expert_bytes(hidden, width.size, item, packed) - _expert_bytes(hidden, width.length, item, packed)


_GRAMMAR_BYTES_PER_TOKEN = 2500
"""Bytes of llguidance's tokenizer for each token: 476 MiB for gpt-oss's 201,088."""


def grammar_tokenizer_bytes(vocab_size: int) -> int:
    """Return the approximate size of the tokenizer of grammars, which an engine's process loads as
    `GrammarConfig.load` says."""
    return vocab_size * _GRAMMAR_BYTES_PER_TOKEN
