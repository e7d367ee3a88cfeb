"""Loads the projections of a rank's experts into the kernels' layout: packed in MXFP4 as stored,
quantised to it while loading, or dense."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from kernels.cpu.memory import zeros
from kernels.formats import MX_BLOCK
from kernels.mxfp4 import NATURAL, PackedMXFP4, allocate, choose_layout, pack, write_expert
from workers.config import ModelConfig
from workers.errors import CheckpointError
from workers.model.mapped_files import Extent
from workers.model.safetensors_files import StoredTensor
from workers.model.shard_reader import ShardReader, copy_values
from workers.model.tensor_specs import ExpertNames
from workers.model.zero_weights import ZeroWeights
from workers.parallel.shard import Span

_NAN_SCALE = 255
"""Scale code of NaN in the OCP Microscaling specification."""
_MAX_SCALE = 252
"""Largest usable scale code of MXFP4: with a larger one 6, the largest value, becomes infinite."""
_QUANTIZE_ROWS = 256
"""Number of rows of an expert quantised at a time, which bounds the memory."""


class ExpertLoader:
    """Allocates projections, and plans the reads that fill them.

    Args:
        zeros: receives each expected expert, and all values read of it.
        experts: the rank's experts.
        dtype: dtype of dense experts.
        quantize: pack dense experts to MXFP4.
    """

    def __init__(
        self,
        reader: ShardReader,
        zeros: ZeroWeights,
        tensors: Mapping[str, StoredTensor],
        config: ModelConfig,
        experts: Span,
        dtype: torch.dtype,
        device: torch.device,
        *,
        quantize: bool,
    ) -> None:
        self._reader = reader
        self._zeros = zeros
        self._tensors = tensors
        self._config = config
        self._span = experts
        self._dtype = dtype
        self._device = device
        self._quantize = quantize
        self._layout = choose_layout(device)

    def projection(self, names: ExpertNames, rows: Span, columns: Span) -> PackedMXFP4 | Tensor:
        """Allocate a projection of this rank's experts, [E, N, K], sliced along N or K, and plan
        its reads."""
        for name in (
            (names.blocks, names.scales) if self._config.experts_format == "mxfp4" else (names.dense,)
        ):
            for expert in range(self._span.start, self._span.start + self._span.length):
                self._zeros.expect(name, expert, expert + 1, f" in expert {expert}")
        shape = (self._span.length, rows.size, columns.size)
        if self._config.experts_format == "mxfp4":
            packed = allocate(shape, self._layout, self._device)
            for index in range(shape[0]):
                self._add_packed(packed, index, names, rows, columns)
            return packed
        if self._quantize:
            packed = allocate(shape, self._layout, self._device)
            for index in range(shape[0]):
                self._add_quantized(packed, index, names.dense, rows, columns)
            return packed
        dense = empty(shape, self._dtype, self._device)
        for index in range(shape[0]):
            self._add_dense(dense[index, : rows.length, : columns.length], index, names.dense, rows, columns)
        return dense

    def _add_packed(
        self, packed: PackedMXFP4, index: int, names: ExpertNames, rows: Span, columns: Span
    ) -> None:
        files, expert = self._reader.files, self._span.start + index
        first = expert * self._tensors[names.scales].shape[1]
        groups = slice(columns.start // MX_BLOCK, columns.stop // MX_BLOCK)

        def move() -> None:
            blocks, scales = (
                files.view(name, expert, expert + 1)[0, rows.start : rows.stop, groups]
                for name in (names.blocks, names.scales)
            )
            self._refuse_large_scale(names.scales, expert, scales)
            for name, values in ((names.blocks, blocks), (names.scales, scales)):
                self._zeros.see(name, expert, values[None])
            try:
                write_expert(packed, index, blocks, scales)
            except ValueError as error:
                raise CheckpointError(
                    f"{self._tensors[names.blocks].file}: tensor {names.blocks} cannot be used: {error}"
                ) from error

        self._reader.add(
            [
                files.extent(name, first + rows.start, first + rows.stop, dims=2)
                for name in (names.blocks, names.scales)
            ],
            move,
        )

    def _refuse_large_scale(self, name: str, expert: int, here: Tensor) -> None:
        """Refuse a too large or NaN scale in this rank's slice. The error names its position in the
        whole expert."""
        if here.numel() and int(here.max()) > _MAX_SCALE:
            scales = self._reader.files.view(name, expert, expert + 1)[0]
            at = (scales > _MAX_SCALE).nonzero()[0].tolist()
            scale = int(scales[tuple(at)])
            reason = "NaN" if scale == _NAN_SCALE else "too large for its values to be finite"
            raise CheckpointError(
                f"{self._tensors[name].file}: tensor {name} has scale {scale}, which is {reason}, at "
                f"{[expert, *at]}"
            )

    def _add_dense(self, to: Tensor, index: int, name: str, rows: Span, columns: Span) -> None:
        extent, view = self._dense_expert(index, name, rows, columns)
        self._reader.add([extent], lambda: copy_values(to, view()))

    def _add_quantized(self, packed: PackedMXFP4, index: int, name: str, rows: Span, columns: Span) -> None:
        extent, view = self._dense_expert(index, name, rows, columns)

        def move() -> None:
            pieces = []
            for piece in torch.split(view(), _QUANTIZE_ROWS):
                try:
                    pieces.append(pack(piece[None].contiguous(), NATURAL))
                except ValueError as error:
                    raise CheckpointError(
                        f"{self._tensors[name].file}: tensor {name} cannot be quantised: {error}"
                    ) from error
            write_expert(
                packed,
                index,
                torch.cat([piece.blocks[0] for piece in pieces]),
                torch.cat([piece.scales[0] for piece in pieces]),
            )

        self._reader.add([extent], move)

    def _dense_expert(
        self, index: int, name: str, rows: Span, columns: Span
    ) -> tuple[Extent, Callable[[], Tensor]]:
        """Return the extent of an expert that is stored input-first, and a function that returns
        its view, output-first."""
        files, expert = self._reader.files, self._span.start + index
        first = expert * self._tensors[name].shape[1]

        def view() -> Tensor:
            stored = files.view(name, expert, expert + 1)[
                0, columns.start : columns.stop, rows.start : rows.stop
            ]
            self._zeros.see(name, expert, stored[None])
            return stored.T

        return files.extent(name, first + columns.start, first + columns.stop, dims=2), view


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros. On a CPU their memory costs nothing before it is written."""
    return zeros(shape, dtype) if device.type == "cpu" else torch.zeros(shape, dtype=dtype, device=device)
