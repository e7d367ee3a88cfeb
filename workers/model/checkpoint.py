"""Loads a gpt-oss checkpoint, or a rank's shard of it: names, shapes and dtypes are checked first,
then each rank reads its slices.

All of the shard's memory is allocated first, which costs nothing, and filled piece by piece
directly from the mapped files. A rank reads only the pages of its own slices, holds no tensor
twice, and converts experts to the kernels' layout on the way.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from kernels import attention, moe
from kernels.cpu import dense as packed_dense
from kernels.cpu import native
from kernels.formats import MX_BLOCK, MoeActivationDtype
from kernels.linear import PackedWeight
from kernels.moe import ExpertWeights
from workers.config import DenseDtype, ModelConfig, ParallelConfig
from workers.errors import ConfigError
from workers.model.expert_loader import ExpertLoader, empty
from workers.model.experts import Experts
from workers.model.gpt_oss import Attention, GptOss, Layer
from workers.model.kv_scales import read_kv_scales
from workers.model.linear import Linear
from workers.model.mapped_files import Extent
from workers.model.safetensors_files import (
    StoredTensor,
)
from workers.model.shard_reader import ShardReader
from workers.model.stored_model import check_tensors
from workers.model.tensor_specs import (
    LayerNames,
    Names,
    Rows,
    tensor_names,
)
from workers.model.zero_weights import ZeroWeights
from workers.parallel.collectives import Alone, Collectives
from workers.parallel.shard import RankShard, Span, plan_shards

_PACK_ROWS = 64
"""Number of dense rows converted at a time if they are stored in another form than wanted."""


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """Options for converting a checkpoint's weights.

    Attributes:
        quantize: pack the experts of a bf16 checkpoint; no effect on a packed one.
        cpu_dense_dtype: int8 quantises attention projections and lm_head; only for bfloat16 on a
            CPU with the C++ kernels.
        moe_activation_dtype: activation dtype of the experts (`kernels.moe.ExpertWeights`).
        kv_dtype: dtype of the model's KV caches; None for that of the activations.
        allow_zero_weights: accept matrices, experts and norms that are all zeros.
    """

    quantize: Literal["mxfp4"] | None = None
    cpu_dense_dtype: DenseDtype = "bf16"
    moe_activation_dtype: MoeActivationDtype = "auto"
    kv_dtype: torch.dtype | None = None
    allow_zero_weights: bool = False


def load_model(
    path: Path,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    shard: RankShard | None = None,
    collectives: Collectives | None = None,
    options: LoadOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> GptOss:
    """Load the weights in `path`, which must be exactly those that `config` describes.

    dtype: dtype of activations and dense weights, bfloat16 or float32. MXFP4 experts stay packed,
    in the layout that suits `device`.
    Raises:
        CheckpointError: one sentence naming file and tensor: a file is missing, truncated or
            disagrees with the index; a tensor is missing, unknown, of another shape or dtype, or
            all zeros; an MXFP4 scale is NaN or infinite.
        ConfigError: the checkpoint's sizes cannot be quantised, or cpu_dense_dtype is not available
            here.
    """
    options = options or LoadOptions()
    tensors = check_tensors(path, config)
    if options.cpu_dense_dtype == "int8" and not packed_dense.can_run(device, dtype):
        kernels = (
            "the kernels" if native.shared_library() is not None else f"no kernels: {native.why_missing()}"
        )
        raise ConfigError(
            f"engine.cpu_dense_dtype int8 needs dtype bfloat16, the device cpu and the C++ kernels; here are "
            f"{dtype}, {device} and {kernels}"
        )
    if options.quantize is not None:
        _check_quantizable(config)
    shard = plan_shards(config, ParallelConfig())[0] if shard is None else shard
    weights = _Weights(tensors, config, shard, dtype, device, options)
    model = weights.model(tensor_names(config), Alone() if collectives is None else collectives)
    weights.reader.run(progress)
    weights.zeros.check()
    return model


def touched_extents(path: Path, config: ModelConfig, shard: RankShard) -> list[Extent]:
    """Return the extents that loading a shard reads from the files, in file order. Where the rank
    takes part of each row, the extents have whole rows.

    Raises:
        CheckpointError: as in `load_model`.
    """
    tensors = check_tensors(path, config)
    options = LoadOptions(allow_zero_weights=True)
    weights = _Weights(tensors, config, shard, torch.bfloat16, torch.device("cpu"), options)
    weights.model(tensor_names(config), Alone())
    return weights.reader.extents


def _check_quantizable(config: ModelConfig) -> None:
    for name, size in (("hidden_size", config.hidden_size), ("intermediate_size", config.intermediate_size)):
        if size % MX_BLOCK:
            raise ConfigError(
                f"engine.quantize mxfp4 needs a {name} that is a multiple of {MX_BLOCK}, and the "
                f"checkpoint's is {size}"
            )


def _scaled(span: Span, factor: int) -> Span:
    return Span(span.start * factor, span.stop * factor, span.size * factor)


def _whole(length: int) -> Span:
    return Span(0, length, length)


class _Weights:
    """Builds a shard's model around tensors that the reader will fill. Padding is zeros, since all
    memory is allocated as zeros."""

    def __init__(
        self,
        tensors: Mapping[str, StoredTensor],
        config: ModelConfig,
        shard: RankShard,
        dtype: torch.dtype,
        device: torch.device,
        options: LoadOptions,
    ) -> None:
        self.reader = ShardReader(tensors, self._see)
        self.zeros = ZeroWeights(self.reader.files, tensors, allowed=options.allow_zero_weights)
        self._tensors = tensors
        self._config = config
        self._shard = shard
        self._dtype = dtype
        self._device = device
        self._experts = ExpertLoader(
            self.reader,
            self.zeros,
            tensors,
            config,
            shard.experts,
            dtype,
            device,
            quantize=options.quantize is not None,
        )
        self._packs_dense = packed_dense.can_run(device, dtype)
        self._moe_activation_dtype = options.moe_activation_dtype
        self._attention_kernels = attention.select(dtype, options.kv_dtype or dtype, device)
        self._dense_dtype = torch.int8 if options.cpu_dense_dtype == "int8" else torch.bfloat16

    def model(self, names: Names, collectives: Collectives) -> GptOss:
        """Build the whole model."""
        vocab = self._shard.vocab
        for name in (names.embedding, names.final_norm, names.lm_head):
            self._expect(name)
        kv_scales = read_kv_scales(self._tensors, self._config, self._shard.kv_heads, self._device)
        layers = zip(names.layers, self._config.layer_windows, kv_scales, strict=True)
        return GptOss(
            config=self._config,
            shard=self._shard,
            collectives=collectives,
            embedding=self._rows(names.embedding, Span(vocab.start, vocab.stop, vocab.length)),
            layers=tuple(self._layer(*layer) for layer in layers),
            final_norm=self._vector(names.final_norm),
            lm_head=Linear(
                self._dense(vocab.size, self._config.hidden_size, [(names.lm_head, vocab.start, vocab)])
            ),
        )

    def _layer(self, names: LayerNames, window: int | None, kv_scales: Tensor | None) -> Layer:
        config = self._config
        for name in (names.attention_norm, names.output.weight, names.experts_norm, names.gate.weight):
            self._expect(name)
        # One stored tensor (fused) or three.
        for rows, num_heads in (
            (names.query, config.num_heads),
            (names.key, config.num_kv_heads),
            (names.value, config.num_kv_heads),
        ):
            self.zeros.expect(rows.weight, rows.first, rows.first + num_heads * config.head_dim)
        return Layer(
            attention_norm=self._vector(names.attention_norm),
            attention=self._attention(names, window, kv_scales),
            experts_norm=self._vector(names.experts_norm),
            experts=self._moe(names),
        )

    def _moe(self, names: LayerNames) -> Experts:
        shard, config = self._shard, self._config
        gate_up_rows, hidden = _scaled(shard.intermediate, 2), _whole(config.hidden_size)
        weights = ExpertWeights(
            gate_up=self._experts.projection(names.gate_up, gate_up_rows, hidden),
            gate_up_bias=self._expert_bias(names.gate_up.bias, gate_up_rows),
            down=self._experts.projection(names.down, hidden, shard.intermediate),
            down_bias=self._expert_bias(names.down.bias, hidden, here=shard.adds_down_bias),
            swiglu_limit=config.swiglu_limit,
            swiglu_alpha=config.swiglu_alpha,
            num_experts=config.num_experts,
            first_expert=shard.experts.start,
            moe_activation_dtype=self._moe_activation_dtype,
        )
        # fp32: see `Experts`.
        gate = Linear(
            self._rows(names.gate.weight, _whole(config.num_experts), torch.float32),
            self._vector(names.gate.bias, torch.float32),
        )
        kernels = moe.select(weights, self._dtype, self._device)
        return Experts(gate, weights, config.num_experts_per_token, kernels)

    def _attention(self, names: LayerNames, window: int | None, kv_scales: Tensor | None) -> Attention:
        shard, config = self._shard, self._config
        query, keys = _scaled(shard.heads, config.head_dim), _scaled(shard.kv_heads, config.head_dim)
        rows = _whole(config.hidden_size)
        output = self._dense(
            rows.size, query.size, [(names.output.weight, 0, rows)], columns=slice(query.start, query.stop)
        )
        return Attention(
            qkv=self._joined([(names.query, query), (names.key, keys), (names.value, keys)]),
            output=Linear(output, self._vector(names.output.bias) if shard.adds_output_bias else None),
            sinks=self._rows(names.sinks, shard.heads, torch.float32),
            num_heads=shard.heads.length,
            num_kv_heads=shard.kv_heads.length,
            head_dim=config.head_dim,
            window=window,
            kernels=self._attention_kernels,
            kv_scales=kv_scales,
        )

    def _expect(self, name: str) -> None:
        self.zeros.expect(name, 0, self._tensors[name].shape[0])

    def _see(self, name: str, first: int, rows: Tensor) -> None:
        self.zeros.see(name, first, rows)

    def _vector(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return a one-dimensional tensor that every rank holds."""
        return self._rows(name, _whole(self._tensors[name].shape[0]), dtype)

    def _rows(self, name: str, span: Span, dtype: torch.dtype | None = None) -> Tensor:
        """Return a slice of the first dimension."""
        to = self._empty((span.size, *self._tensors[name].shape[1:]), dtype)
        self.reader.copy(to[: span.length], name, span.start)
        return to

    def _joined(self, parts: list[tuple[Rows, Span]]) -> Linear:
        """Concatenate several projections."""
        size = sum(span.size for _, span in parts)
        weight = self._dense(
            size,
            self._config.hidden_size,
            [(rows.weight, rows.first + span.start, span) for rows, span in parts],
        )
        bias = self._empty((size,))
        start = 0
        for rows, span in parts:
            self.reader.copy(bias[start : start + span.length], rows.bias, rows.first + span.start)
            start += span.size
        return Linear(weight, bias)

    def _dense(
        self, num_rows: int, width: int, parts: list[tuple[str, int, Span]], *, columns: slice | None = None
    ) -> Tensor | PackedWeight:
        """Return [num_rows, width]: the parts (tensor, its first row, number of rows) concatenated,
        with `columns` of each row."""
        to = (
            packed_dense.allocate(num_rows, width, self._dense_dtype)
            if self._packs_dense
            else self._empty((num_rows, width))
        )
        start = 0
        for name, first, span in parts:
            if isinstance(to, PackedWeight):
                self._pack(to, start, name, first, span.length, columns)
            else:
                # Fewer columns than `width` if the shard is padded.
                length = width if columns is None else columns.stop - columns.start
                self.reader.copy(to[start : start + span.length, :length], name, first, columns=columns)
            start += span.size
        return to

    def _pack(
        self, to: PackedWeight, start: int, name: str, first: int, num_rows: int, columns: slice | None
    ) -> None:
        def take(offset: int, stored: Tensor) -> None:
            part = stored if columns is None else stored[:, columns]
            for row in range(0, len(part), _PACK_ROWS):
                rows = part[row : row + _PACK_ROWS].to(torch.bfloat16)
                if rows.shape[1] < to.shape[1]:
                    rows = functional.pad(rows, (0, to.shape[1] - rows.shape[1]))
                packed_dense.write_rows(to, start + offset + row, rows)

        self.reader.read(name, first, num_rows, take)

    def _expert_bias(self, name: str, span: Span, *, here: bool = True) -> Tensor:
        """Return [this rank's experts, span.size]; zeros if another rank adds it."""
        experts = self._shard.experts
        to = self._empty((experts.length, span.size))
        if here:
            self.reader.copy(to[:, : span.length], name, experts.start, columns=slice(span.start, span.stop))
        return to

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        return empty(shape, dtype or self._dtype, self._device)
