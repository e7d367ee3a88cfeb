"""Names, shapes and dtypes of a gpt-oss checkpoint's tensors, as Hugging Face and OpenAI
(`original/`) store them: the one table that reading and writing share.

OpenAI's layout (openai/gpt-oss `torch/weights.py` and `torch/model.py`) has other names and one
fused qkv projection, the rows of q, k and v concatenated; numbers and their order are the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

from kernels.formats import MX_BLOCK
from workers.config import ModelConfig

Kind = Literal["dense", "mxfp4_blocks", "mxfp4_scales"]
PACKED_BYTES = MX_BLOCK // 2
"""Bytes of one MXFP4 group's values, two to a byte."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a checkpoint.

    Attributes:
        kind: `dense` is floating point (bf16 in the published checkpoints), the MXFP4 kinds are
            uint8.
        fan_in: number of inputs summed into one output; 0 for tensors outside matrix products
            (biases, norms, sinks, embedding).
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind = "dense"
    fan_in: int = 0

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def num_parameters(self) -> int:
        """Number of model parameters in the tensor; a group's scale is not a parameter."""
        return {"dense": 1, "mxfp4_blocks": 2, "mxfp4_scales": 0}[self.kind] * self.num_elements


EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
"""Name in Hugging Face's layout, the one that is written."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a stored projection.

    Attributes:
        first: first row, of weight and bias alike.
    """

    weight: str
    bias: str
    first: int = 0


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """The tensors of one projection of all experts; `dense` if they are not packed."""

    blocks: str
    scales: str
    dense: str
    bias: str


@dataclass(frozen=True, slots=True)
class LayerNames:
    """The names of one layer's tensors."""

    attention_norm: str
    query: Rows
    key: Rows
    value: Rows
    output: Rows
    sinks: str
    experts_norm: str
    gate: Rows
    gate_up: ExpertNames
    down: ExpertNames


@dataclass(frozen=True, slots=True)
class Names:
    """The names of a checkpoint's tensors."""

    embedding: str
    final_norm: str
    lm_head: str
    layers: tuple[LayerNames, ...]


def tensor_names(config: ModelConfig) -> Names:
    """Return the tensor names in this checkpoint's layout."""
    if config.layout == "original":
        layers = tuple(_original_layer(config, f"block.{layer}.") for layer in range(config.num_layers))
        return Names("embedding.weight", "norm.scale", "unembedding.weight", layers)
    layers = tuple(_hf_layer(f"model.layers.{layer}.") for layer in range(config.num_layers))
    return Names(EMBEDDING, "model.norm.weight", LM_HEAD, layers)


def _hf_layer(prefix: str) -> LayerNames:
    def rows(name: str) -> Rows:
        return Rows(f"{prefix}{name}.weight", f"{prefix}{name}.bias")

    def experts(name: str) -> ExpertNames:
        stem = f"{prefix}mlp.experts.{name}"
        return ExpertNames(f"{stem}_blocks", f"{stem}_scales", stem, f"{stem}_bias")

    return LayerNames(
        attention_norm=f"{prefix}input_layernorm.weight",
        query=rows("self_attn.q_proj"),
        key=rows("self_attn.k_proj"),
        value=rows("self_attn.v_proj"),
        output=rows("self_attn.o_proj"),
        sinks=f"{prefix}self_attn.sinks",
        experts_norm=f"{prefix}post_attention_layernorm.weight",
        gate=rows("mlp.router"),
        gate_up=experts("gate_up_proj"),
        down=experts("down_proj"),
    )


def _original_layer(config: ModelConfig, prefix: str) -> LayerNames:
    def qkv(first_head: int) -> Rows:
        return Rows(f"{prefix}attn.qkv.weight", f"{prefix}attn.qkv.bias", first_head * config.head_dim)

    def experts(name: str) -> ExpertNames:
        stem = f"{prefix}mlp.{name}"
        return ExpertNames(f"{stem}_weight.blocks", f"{stem}_weight.scales", f"{stem}_weight", f"{stem}_bias")

    return LayerNames(
        attention_norm=f"{prefix}attn.norm.scale",
        query=qkv(0),
        key=qkv(config.num_heads),
        value=qkv(config.num_heads + config.num_kv_heads),
        output=Rows(f"{prefix}attn.out.weight", f"{prefix}attn.out.bias"),
        sinks=f"{prefix}attn.sinks",
        experts_norm=f"{prefix}mlp.norm.scale",
        gate=Rows(f"{prefix}mlp.gate.weight", f"{prefix}mlp.gate.bias"),
        gate_up=experts("mlp1"),
        down=experts("mlp2"),
    )


_KV_SCALES = (
    ("k_scale", "v_scale"),
    ("k_proj.k_scale", "v_proj.v_scale"),
    ("k_proj.output_scale", "v_proj.output_scale"),
    ("attn.k_scale", "attn.v_scale"),
)
"""Suffixes of a layer's KV scales in compressed-tensors, ModelOpt, Quark and vLLM."""


def kv_scale_names(config: ModelConfig) -> list[list[tuple[str, str]]]:
    """Return, for each layer, the names of K's and V's scales in each spelling: optional tensors
    besides those of `tensor_specs`, only in Hugging Face's layout."""
    if config.layout == "original":
        return []
    stems = [f"model.layers.{layer}.self_attn" for layer in range(config.num_layers)]
    return [[(f"{stem}.{k}", f"{stem}.{v}") for k, v in _KV_SCALES] for stem in stems]


def tensor_specs(config: ModelConfig) -> Iterator[TensorSpec]:
    """Yield all tensors of a checkpoint, in the order of the forward pass."""
    names = tensor_names(config)
    yield TensorSpec(names.embedding, (config.vocab_size, config.hidden_size))
    for layer in names.layers:
        yield from _layer_specs(config, layer)
    yield TensorSpec(names.final_norm, (config.hidden_size,))
    yield TensorSpec(names.lm_head, (config.vocab_size, config.hidden_size), fan_in=config.hidden_size)


def _layer_specs(config: ModelConfig, names: LayerNames) -> Iterator[TensorSpec]:
    hidden, num_experts = config.hidden_size, config.num_experts
    query_size = config.num_heads * config.head_dim
    kv_size = config.num_kv_heads * config.head_dim
    yield TensorSpec(names.attention_norm, (hidden,))
    if names.query.weight == names.value.weight:
        yield from _projection(names.query, query_size + 2 * kv_size, hidden)
    else:
        for rows, size in ((names.query, query_size), (names.key, kv_size), (names.value, kv_size)):
            yield from _projection(rows, size, hidden)
    yield from _projection(names.output, hidden, query_size)
    yield TensorSpec(names.sinks, (config.num_heads,))
    yield TensorSpec(names.experts_norm, (hidden,))
    yield from _projection(names.gate, num_experts, hidden)
    for experts, size, columns in (
        (names.gate_up, 2 * config.intermediate_size, hidden),
        (names.down, hidden, config.intermediate_size),
    ):
        if config.experts_format == "mxfp4":
            groups = columns // MX_BLOCK
            yield TensorSpec(
                experts.blocks, (num_experts, size, groups, PACKED_BYTES), "mxfp4_blocks", columns
            )
            yield TensorSpec(experts.scales, (num_experts, size, groups), "mxfp4_scales", columns)
        else:
            # Unpacked experts are stored input-first.
            yield TensorSpec(experts.dense, (num_experts, columns, size), fan_in=columns)
        yield TensorSpec(experts.bias, (num_experts, size))


def _projection(rows: Rows, size: int, columns: int) -> Iterator[TensorSpec]:
    yield TensorSpec(rows.weight, (size, columns), fan_in=columns)
    yield TensorSpec(rows.bias, (size,))
