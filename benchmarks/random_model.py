"""A gpt-oss model of random weights made on its device, without a checkpoint: 120b takes seconds on
a GPU, and no disk.

Weights have the size that keeps activations near 1, as `workers/model/random_weights.py` draws them
for checkpoints.
"""

import math

import torch
from torch import Tensor

from kernels import attention, moe
from kernels.formats import MX_BLOCK
from kernels.moe import ExpertWeights
from kernels.mxfp4 import PackedMXFP4, allocate, from_natural
from workers.config import ModelConfig, ParallelConfig
from workers.model.experts import Experts
from workers.model.gpt_oss import Attention, GptOss, Layer
from workers.model.linear import Linear
from workers.parallel.collectives import Alone
from workers.parallel.shard import plan_shards

_EXPERTS_AT_ONCE = 8
"""Number of experts converted to the layout together, which bounds the memory that this takes
besides the weights."""
_E2M1_TIMES_SCALES = 3.87
"""Root of the mean square of a random code, times that of one scale of three neighbouring
exponents."""
_BIAS = 0.1


def random_model(
    config: ModelConfig,
    device: torch.device,
    layout: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    branch_exponent: int = 0,
) -> GptOss:
    """Return the whole model, all its experts in MXFP4 in `layout`; on the device "meta" in its
    shapes alone.

    Args:
        branch_exponent: attention and experts add 2^this times as much to what passes by them. At 0
            a layer of random weights amplifies what rounding changed in the one before, as none of
            a trained model does.
    """
    return _Maker(config, device, layout, dtype, seed, branch_exponent).model()


class _Maker:
    def __init__(
        self,
        config: ModelConfig,
        device: torch.device,
        layout: str,
        dtype: torch.dtype,
        seed: int,
        branch_exponent: int,
    ) -> None:
        self._branch_exponent = branch_exponent
        self._config = config
        self._device = device
        self._layout = layout
        self._dtype = dtype
        self._generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)

    def model(self) -> GptOss:
        config = self._config
        (shard,) = plan_shards(config, ParallelConfig())
        layers = tuple(self._layer(window) for window in config.layer_windows)
        embedding, lm_head = (
            self._normal(config.vocab_size, config.hidden_size),
            self._matrix(config.vocab_size, config.hidden_size),
        )
        return GptOss(config, shard, Alone(), embedding, layers, self._norm(), Linear(lm_head))

    def _layer(self, window: int | None) -> Layer:
        config = self._config
        hidden, heads = config.hidden_size, config.num_heads * config.head_dim
        qkv = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        fp32, gain = torch.float32, 2.0**self._branch_exponent
        return Layer(
            attention_norm=self._norm(),
            attention=Attention(
                qkv=Linear(self._matrix(qkv, hidden), self._normal(qkv, std=_BIAS)),
                output=Linear(self._matrix(hidden, heads, gain=gain), self._normal(hidden, std=_BIAS * gain)),
                sinks=self._normal(config.num_heads, dtype=fp32),
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                window=window,
                kernels=attention.select(self._dtype, self._dtype, self._device),
            ),
            experts_norm=self._norm(),
            experts=self._experts(),
        )

    def _experts(self) -> Experts:
        config = self._config
        hidden, inner, gain = config.hidden_size, config.intermediate_size, 2.0**self._branch_exponent
        gate = Linear(
            self._matrix(config.num_experts, hidden, torch.float32),
            self._normal(config.num_experts, std=_BIAS, dtype=torch.float32),
        )
        weights = ExpertWeights(
            gate_up=self._packed(2 * inner, hidden),
            gate_up_bias=self._normal(config.num_experts, 2 * inner, std=_BIAS),
            down=self._packed(hidden, inner, self._branch_exponent),
            down_bias=self._normal(config.num_experts, hidden, std=_BIAS * gain),
            swiglu_limit=config.swiglu_limit,
            swiglu_alpha=config.swiglu_alpha,
            num_experts=config.num_experts,
        )
        kernels = moe.select(weights, self._dtype, self._device)
        return Experts(gate, weights, config.num_experts_per_token, kernels)

    def _norm(self) -> Tensor:
        return torch.ones(self._config.hidden_size, dtype=self._dtype, device=self._device)

    def _matrix(
        self, num_rows: int, width: int, dtype: torch.dtype | None = None, gain: float = 1.0
    ) -> Tensor:
        return self._normal(num_rows, width, std=gain * width**-0.5, dtype=dtype)

    def _normal(self, *shape: int, std: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self._dtype, device=self._device).normal_(
            0, std, generator=self._generator
        )

    def _packed(self, num_rows: int, width: int, exponent: int = 0) -> PackedMXFP4:
        num_experts, groups = self._config.num_experts, width // MX_BLOCK
        packed = allocate((num_experts, num_rows, width), self._layout, self._device)
        if self._device.type == "meta":
            return packed
        exponent += 127 + round(math.log2(width**-0.5 / _E2M1_TIMES_SCALES))
        for first in range(0, num_experts, _EXPERTS_AT_ONCE):
            shape = (min(_EXPERTS_AT_ONCE, num_experts - first), num_rows, groups)
            blocks = self._bytes(0, 256, *shape, MX_BLOCK // 2)
            part = from_natural(blocks, self._bytes(exponent - 1, exponent + 2, *shape), self._layout)
            packed.blocks[first : first + shape[0]].copy_(part.blocks)
            packed.scales[first : first + shape[0]].copy_(part.scales)
        return packed

    def _bytes(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(
            low, high, shape, dtype=torch.uint8, device=self._device, generator=self._generator
        )
