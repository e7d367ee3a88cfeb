"""Names, shapes and dtypes of a gpt-oss checkpoint's tensors, as Hugging Face stores them: the one table that reading and writing share."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

from kernels.mxfp4 import MX_BLOCK
from workers.config import ModelConfig

Kind = Literal["dense", "mxfp4_blocks", "mxfp4_scales"]
PACKED_BYTES = MX_BLOCK // 2
"""Bytes of one MXFP4 group's values, two to a byte."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a checkpoint.

    Attributes:
        kind: `dense` is floating point (bf16 in the published checkpoints), the MXFP4 kinds are uint8.
        fan_in: inputs that are summed into one output; 0 for what is no matrix product (biases, norms, sinks, embedding).
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
        """Parameters of the model that the tensor holds; a group's scale is not one."""
        return {"dense": 1, "mxfp4_blocks": 2, "mxfp4_scales": 0}[self.kind] * self.num_elements


EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"


def layer_prefix(layer: int) -> str:
    """What the names of a layer's tensors start with."""
    return f"model.layers.{layer}."


def tensor_specs(config: ModelConfig) -> Iterator[TensorSpec]:
    """All tensors of a checkpoint, in the order of the forward pass."""
    yield TensorSpec(EMBEDDING, (config.vocab_size, config.hidden_size))
    for layer in range(config.num_layers):
        yield from _layer_specs(config, layer_prefix(layer))
    yield TensorSpec(FINAL_NORM, (config.hidden_size,))
    yield TensorSpec(LM_HEAD, (config.vocab_size, config.hidden_size), fan_in=config.hidden_size)


def _layer_specs(config: ModelConfig, prefix: str) -> Iterator[TensorSpec]:
    hidden, experts = config.hidden_size, config.num_experts
    query_size = config.num_heads * config.head_dim
    kv_size = config.num_kv_heads * config.head_dim
    yield TensorSpec(f"{prefix}input_layernorm.weight", (hidden,))
    for name, rows, columns in (
        ("self_attn.q_proj", query_size, hidden),
        ("self_attn.k_proj", kv_size, hidden),
        ("self_attn.v_proj", kv_size, hidden),
        ("self_attn.o_proj", hidden, query_size),
    ):
        yield TensorSpec(f"{prefix}{name}.weight", (rows, columns), fan_in=columns)
        yield TensorSpec(f"{prefix}{name}.bias", (rows,))
    yield TensorSpec(f"{prefix}self_attn.sinks", (config.num_heads,))
    yield TensorSpec(f"{prefix}post_attention_layernorm.weight", (hidden,))
    yield TensorSpec(f"{prefix}mlp.router.weight", (experts, hidden), fan_in=hidden)
    yield TensorSpec(f"{prefix}mlp.router.bias", (experts,))
    for name, rows, columns in (
        ("mlp.experts.gate_up_proj", 2 * config.intermediate_size, hidden),
        ("mlp.experts.down_proj", hidden, config.intermediate_size),
    ):
        if config.experts_format == "mxfp4":
            groups = columns // MX_BLOCK
            yield TensorSpec(f"{prefix}{name}_blocks", (experts, rows, groups, PACKED_BYTES), "mxfp4_blocks", columns)
            yield TensorSpec(f"{prefix}{name}_scales", (experts, rows, groups), "mxfp4_scales", columns)
        else:
            # Unpacked experts are stored input-first.
            yield TensorSpec(f"{prefix}{name}", (experts, columns, rows), fan_in=columns)
        yield TensorSpec(f"{prefix}{name}_bias", (experts, rows))
