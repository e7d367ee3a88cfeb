"""Loads a gpt-oss checkpoint, whole or a rank's shard of it: names, shapes and dtypes are checked first, then each rank reads its slices.

Files are mapped and several threads copy out of the maps, so a rank reads the pages of its own slices and nothing else, and holds no tensor
twice; experts go to the kernels' layout one at a time on the way.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor

from kernels.mxfp4 import MX_BLOCK, NATURAL, PackedMXFP4, choose_layout, from_natural, pack
from workers.config import ModelConfig, ParallelConfig, checkpoint_folder
from workers.errors import CheckpointError, ConfigError
from workers.model.experts import Experts
from workers.model.gpt_oss import Attention, GptOss, Layer
from workers.model.kv_scales import check_kv_scales, read_kv_scales
from workers.model.linear import Linear
from workers.model.mapped_files import MappedTensors
from workers.model.safetensors_files import INDEX_FILE, StoredTensor, read_header, read_header_bytes, stored_tensors, weight_files
from workers.model.tensor_specs import ExpertNames, LayerNames, Rows, TensorSpec, tensor_names, tensor_specs
from workers.parallel.collectives import Alone, Collectives
from workers.parallel.shard import RankShard, Span, plan_shards

_STORED_DTYPES = {"dense": ("BF16", "F16", "F32"), "mxfp4_blocks": ("U8",), "mxfp4_scales": ("U8",)}
_NAN_SCALE = 255
"""NaN by the OCP Microscaling specification."""
_SAMPLE_BYTES = 4096
_MAX_THREADS = 4
"""More do not read faster, and each may hold one expert."""
_QUANTIZE_ROWS = 256
"""Rows of an expert that are quantised at a time, which bounds the memory for it."""

T = TypeVar("T")


def load_model(
    path: Path,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    shard: RankShard | None = None,
    collectives: Collectives | None = None,
    quantize: Literal["mxfp4"] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> GptOss:
    """Load the weights in `path`, which must be exactly those that `config` describes.

    Args:
        dtype: of activations and dense weights, bfloat16 or float32. MXFP4 experts stay packed, in the layout that suits `device`.
        shard: the rank's part; None: all of it.
        collectives: how the rank meets the others while it computes; None: alone.
        quantize: pack the experts of a bf16 checkpoint; no effect on one that is packed.
        progress: called with (tensors loaded, tensors in all) after each one.
    Raises:
        CheckpointError: one sentence naming file and tensor: a file is missing, cut off or disagrees with the index; a tensor is
            missing, unknown, or of another shape or dtype; an MXFP4 scale is NaN.
        ConfigError: the checkpoint's sizes cannot be quantised.
    """
    tensors = check_tensors(path, config)
    if quantize is not None:
        _check_quantizable(config)
    shard = plan_shards(config, ParallelConfig())[0] if shard is None else shard
    names = tensor_names(config)
    with _workers() as pool:
        loader = _Loader(pool, tensors, config, shard, dtype, device, quantize is not None)
        embedding = loader.rows(names.embedding, _whole(shard.vocab))
        layers = [_PendingLayer(loader, layer) for layer in names.layers]
        final_norm = loader.whole(names.final_norm)
        lm_head = loader.rows(names.lm_head, shard.vocab)
        loader.report(progress)
        kv_scales = read_kv_scales(tensors, config, shard.kv_heads, device)
        return GptOss(
            config=config,
            shard=shard,
            collectives=Alone() if collectives is None else collectives,
            embedding=embedding.result(),
            layers=tuple(layer.result(config, shard, index, kv_scales[index]) for index, layer in enumerate(layers)),
            final_norm=final_norm.result(),
            lm_head=Linear(lm_head.result()),
        )


def fingerprint(path: Path) -> str:
    """Hex digest that tells checkpoints apart without reading all of them: over config.json, the index, and each weight file's name,
    size, header and the first 4 KiB of each of its tensors (a fine-tune differs from its base model in nothing else).

    Raises:
        CheckpointError: a file is missing or cut off.
    """
    path = checkpoint_folder(path)
    digest = hashlib.sha256()
    for name in ("config.json", INDEX_FILE):
        if (path / name).is_file():
            _add(digest, name.encode(), (path / name).read_bytes())
    for file in weight_files(path):
        _add(digest, file.name.encode(), str(file.stat().st_size).encode(), read_header_bytes(file))
        with file.open("rb") as stream:
            for tensor in read_header(file):
                stream.seek(tensor.offset)
                _add(digest, stream.read(min(tensor.num_bytes, _SAMPLE_BYTES)))
    return digest.hexdigest()


def _add(digest: "hashlib._Hash", *parts: bytes) -> None:
    # Lengths in front keep ("ab", "c") apart from ("a", "bc").
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)


def check_tensors(path: Path, config: ModelConfig) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint by name, which are exactly those that `config` describes, and scales of an fp8 KV cache if it brings
    them; only headers are read.

    Raises:
        CheckpointError: as `load_model`.
    """
    path = checkpoint_folder(path)
    tensors = stored_tensors(path)
    unknown = dict(tensors)
    for spec in tensor_specs(config):
        if spec.name not in tensors:
            raise CheckpointError(f"{path}: tensor {spec.name} of shape {list(spec.shape)} is missing")
        _check_tensor(spec, unknown.pop(spec.name))
    for name in check_kv_scales(tensors, config, path):
        del unknown[name]
    for name, tensor in unknown.items():
        raise CheckpointError(
            f"{tensor.file}: tensor {name} of shape {list(tensor.shape)} is not part of the model that config.json describes"
        )
    return tensors


def _check_tensor(spec: TensorSpec, tensor: StoredTensor) -> None:
    if tensor.shape != spec.shape:
        raise CheckpointError(f"{tensor.file}: tensor {spec.name} has shape {list(tensor.shape)}, wanted {list(spec.shape)}")
    wanted = _STORED_DTYPES[spec.kind]
    if tensor.dtype not in wanted:
        raise CheckpointError(f"{tensor.file}: tensor {spec.name} has dtype {tensor.dtype}, wanted {' or '.join(wanted)}")


def _check_quantizable(config: ModelConfig) -> None:
    for name, size in (("hidden_size", config.hidden_size), ("intermediate_size", config.intermediate_size)):
        if size % MX_BLOCK:
            raise ConfigError(f"quantize mxfp4 needs a {name} that is a multiple of {MX_BLOCK}, and the checkpoint's is {size}")


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """Threads that stop at the first error, whatever is still queued."""
    pool = ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="cantata-load")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _whole(span: Span) -> Span:
    """Without padding."""
    return Span(span.start, span.stop, span.length)


class _PendingLayer:
    """A layer whose tensors are being read."""

    def __init__(self, loader: "_Loader", names: LayerNames) -> None:
        shard, config = loader.shard, loader.config
        head_dim = config.head_dim
        query, keys = _scaled(shard.heads, head_dim), _scaled(shard.kv_heads, head_dim)
        columns = shard.intermediate
        self._qkv = loader.joined([(names.query, query), (names.key, keys), (names.value, keys)])
        self._output = loader.columns(names.output.weight, query)
        self._output_bias = loader.whole(names.output.bias) if shard.adds_output_bias else None
        self._sinks = loader.rows(names.sinks, shard.heads, torch.float32)
        self._attention_norm, self._experts_norm = loader.whole(names.attention_norm), loader.whole(names.experts_norm)
        self._gate = loader.whole(names.gate.weight, torch.float32), loader.whole(names.gate.bias, torch.float32)
        self._gate_up = loader.experts(names.gate_up, rows=_scaled(columns, 2), columns=None)
        self._gate_up_bias = loader.expert_bias(names.gate_up.bias, _scaled(columns, 2))
        self._down = loader.experts(names.down, rows=None, columns=columns)
        self._down_bias = loader.expert_bias(names.down.bias, Span(0, config.hidden_size, config.hidden_size), here=shard.adds_down_bias)

    def result(self, config: ModelConfig, shard: RankShard, index: int, kv_scales: Tensor | None) -> Layer:
        """The layer, once all of it is there."""
        return Layer(
            attention_norm=self._attention_norm.result(),
            attention=Attention(
                qkv=Linear(*(future.result() for future in self._qkv)),
                output=Linear(self._output.result(), None if self._output_bias is None else self._output_bias.result()),
                sinks=self._sinks.result(),
                num_heads=shard.heads.length,
                num_kv_heads=shard.kv_heads.length,
                head_dim=config.head_dim,
                window=config.layer_windows[index],
                kv_scales=kv_scales,
            ),
            experts_norm=self._experts_norm.result(),
            experts=Experts(
                gate=Linear(*(future.result() for future in self._gate)),
                gate_up=self._gate_up.result(),
                gate_up_bias=self._gate_up_bias.result(),
                down=self._down.result(),
                down_bias=self._down_bias.result(),
                first_expert=shard.experts.start,
                num_experts_per_token=config.num_experts_per_token,
                swiglu_limit=config.swiglu_limit,
                swiglu_alpha=config.swiglu_alpha,
            ),
        )


def _scaled(span: Span, factor: int) -> Span:
    return Span(span.start * factor, span.stop * factor, span.size * factor)


class _Loader:
    """Reads slices of checked tensors into memory of their own, on the pool's threads. Padding is zeros."""

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        tensors: Mapping[str, StoredTensor],
        config: ModelConfig,
        shard: RankShard,
        dtype: torch.dtype,
        device: torch.device,
        quantize: bool,
    ) -> None:
        self.config = config
        self.shard = shard
        self._pool = pool
        self._tensors = tensors
        self._files = MappedTensors(tensors)
        self._dtype = dtype
        self._device = device
        self._packs = config.experts_format == "mxfp4" or quantize
        self._layout = choose_layout(device)
        self._jobs: list[Future[object]] = []

    def report(self, progress: Callable[[int, int], None] | None) -> None:
        """Wait for all that was asked for, telling how far it is.

        Raises:
            CheckpointError: the first thing that was wrong.
        """
        for done, job in enumerate(self._jobs, start=1):
            job.result()
            if progress is not None:
                progress(done, len(self._jobs))

    def whole(self, name: str, dtype: torch.dtype | None = None) -> "Future[Tensor]":
        """A tensor that every rank holds."""
        return self.rows(name, Span(0, self._tensors[name].shape[0], self._tensors[name].shape[0]), dtype)

    def rows(self, name: str, span: Span, dtype: torch.dtype | None = None) -> "Future[Tensor]":
        """A slice of the first dimension."""

        def read() -> Tensor:
            to = self._empty((span.size, *self._tensors[name].shape[1:]), padded=span.size > span.length, dtype=dtype)
            to[: span.length].copy_(self._files.view(name)[span.start : span.stop])
            self._files.release(name)
            return to

        return self._submit(read)

    def columns(self, name: str, span: Span) -> "Future[Tensor]":
        """A slice of the second dimension."""

        def read() -> Tensor:
            to = self._empty((self._tensors[name].shape[0], span.size), padded=span.size > span.length)
            to[:, : span.length].copy_(self._files.view(name)[:, span.start : span.stop])
            self._files.release(name)
            return to

        return self._submit(read)

    def joined(self, parts: list[tuple[Rows, Span]]) -> "tuple[Future[Tensor], Future[Tensor]]":
        """(weight, bias) of several projections, one behind the other."""

        def read(names: list[tuple[str, int]]) -> Tensor:
            to = self._empty((sum(span.size for _, span in parts), *self._tensors[names[0][0]].shape[1:]), padded=False)
            pieces = torch.split(to, [span.size for _, span in parts])
            for piece, (name, first), (_, span) in zip(pieces, names, parts, strict=True):
                piece.copy_(self._files.view(name)[first + span.start : first + span.stop])
            for name in dict.fromkeys(name for name, _ in names):
                self._files.release(name)
            return to

        weights, biases = [(rows.weight, rows.first) for rows, _ in parts], [(rows.bias, rows.first) for rows, _ in parts]
        return self._submit(lambda: read(weights)), self._submit(lambda: read(biases))

    def expert_bias(self, name: str, span: Span, *, here: bool = True) -> "Future[Tensor]":
        """[this rank's experts, span.size]; zeros if another rank adds it."""
        experts = self.shard.experts

        def read() -> Tensor:
            to = self._empty((experts.length, span.size), padded=not here or span.size > span.length)
            if here:
                to[:, : span.length].copy_(self._files.view(name)[experts.start : experts.stop, span.start : span.stop])
                self._files.release(name)
            return to

        return self._submit(read)

    def experts(self, names: ExpertNames, *, rows: Span | None, columns: Span | None) -> "Future[PackedMXFP4 | Tensor]":
        """A projection of this rank's experts, [E, N, K], sliced along N or K."""
        if self.config.experts_format == "mxfp4":
            return self._submit(lambda: self._packed(names, rows, columns))
        num_experts, width, num_rows = self._tensors[names.dense].shape
        rows = Span(0, num_rows, num_rows) if rows is None else rows
        columns = Span(0, width, width) if columns is None else columns
        shape = (self.shard.experts.length, rows.size, columns.size)

        def dense(expert: int) -> Tensor:
            return self._files.view(names.dense)[expert, columns.start : columns.stop, rows.start : rows.stop].T

        def read() -> PackedMXFP4 | Tensor:
            if self._packs:
                return self._quantized(names.dense, shape, dense)
            to = self._empty(shape, padded=shape[1:] != (rows.length, columns.length))
            for index, expert in enumerate(range(self.shard.experts.start, self.shard.experts.stop)):
                to[index, : rows.length, : columns.length].copy_(dense(expert))
                self._files.release(names.dense, expert, num_experts)
            return to

        return self._submit(read)

    def _packed(self, names: ExpertNames, rows: Span | None, columns: Span | None) -> PackedMXFP4:
        blocks, scales = self._files.view(names.blocks), self._files.view(names.scales)
        num_experts, num_rows, num_groups = scales.shape
        rows = Span(0, num_rows, num_rows) if rows is None else rows
        groups = Span(0, num_groups, num_groups) if columns is None else _groups(columns)

        if self._device.type == "cpu" and (rows.size, groups.size) == (num_rows, num_groups):
            return self._packed_at_once(names)

        def natural(expert: int) -> tuple[Tensor, Tensor]:
            part = (slice(expert, expert + 1), slice(rows.start, rows.stop), slice(groups.start, groups.stop))
            if bool((scales[part] == _NAN_SCALE).any()):
                where = [expert, *(scales[expert] == _NAN_SCALE).nonzero()[0].tolist()]
                file = self._tensors[names.scales].file
                raise CheckpointError(f"{file}: tensor {names.scales} has scale {_NAN_SCALE}, which is NaN, at {where}")
            return _padded(blocks[part], rows.size, groups.size), _padded(scales[part], rows.size, groups.size)

        def release(expert: int) -> None:
            for name in (names.blocks, names.scales):
                self._files.release(name, expert, num_experts)

        return self._collect((rows.size, groups.size * MX_BLOCK), natural, release)

    def _packed_at_once(self, names: ExpertNames) -> PackedMXFP4:
        """Whole experts: straight from the mapped file into the kernels' layout, and the pages given back behind it."""
        first, last = self.shard.experts.start, self.shard.experts.stop
        blocks, scales = self._files.view(names.blocks)[first:last], self._files.view(names.scales)[first:last]
        if bool((scales == _NAN_SCALE).any()):
            where = (scales == _NAN_SCALE).nonzero()[0].tolist()
            file = self._tensors[names.scales].file
            raise CheckpointError(
                f"{file}: tensor {names.scales} has scale {_NAN_SCALE}, which is NaN, at {[where[0] + first, *where[1:]]}"
            )
        packed = from_natural(blocks, scales, self._layout)
        if self._layout == NATURAL:  # which shares the file's memory
            packed = PackedMXFP4(NATURAL, packed.blocks.clone(), packed.scales.clone(), packed.shape)
        for name in (names.blocks, names.scales):
            self._files.release(name)
        return packed

    def _quantized(self, name: str, shape: tuple[int, int, int], dense: Callable[[int], Tensor]) -> PackedMXFP4:
        num_rows, width = shape[1:]

        def natural(expert: int) -> tuple[Tensor, Tensor]:
            pieces = []
            for piece in torch.split(dense(expert), _QUANTIZE_ROWS):
                try:
                    packed = pack(piece[None].contiguous(), NATURAL)
                except ValueError as error:
                    raise CheckpointError(f"{self._tensors[name].file}: tensor {name} cannot be quantised: {error}") from error
                pieces.append((packed.blocks, packed.scales))
            blocks, scales = (torch.cat(parts, dim=1) for parts in zip(*pieces, strict=True))
            return _padded(blocks, num_rows, width // MX_BLOCK), _padded(scales, num_rows, width // MX_BLOCK)

        return self._collect((num_rows, width), natural, lambda expert: self._files.release(name, expert, self.config.num_experts))

    def _collect(
        self, shape: tuple[int, int], natural: Callable[[int], tuple[Tensor, Tensor]], release: Callable[[int], None]
    ) -> PackedMXFP4:
        """This rank's experts in the kernels' layout, converted one by one."""
        first, last = self.shard.experts.start, self.shard.experts.stop
        blocks = scales = torch.empty(0)
        for expert in range(first, last):
            one = from_natural(*natural(expert), self._layout)
            if expert == first:
                blocks, scales = (
                    torch.empty((last - first, *part.shape[1:]), dtype=torch.uint8, device=self._device)
                    for part in (one.blocks, one.scales)
                )
            blocks[expert - first].copy_(one.blocks[0])
            scales[expert - first].copy_(one.scales[0])
            release(expert)
        return PackedMXFP4(self._layout, blocks, scales, (last - first, *shape))

    def _empty(self, shape: tuple[int, ...], *, padded: bool, dtype: torch.dtype | None = None) -> Tensor:
        make = torch.zeros if padded else torch.empty
        return make(shape, dtype=dtype or self._dtype, device=self._device)

    def _bytes(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=torch.uint8, device=self._device)

    def _submit(self, read: Callable[[], T]) -> "Future[T]":
        job = self._pool.submit(read)
        self._jobs.append(job)  # type: ignore[arg-type]  # Future is invariant; only result() is called
        return job


def _groups(columns: Span) -> Span:
    """Columns as MXFP4 groups."""
    return Span(columns.start // MX_BLOCK, columns.stop // MX_BLOCK, columns.size // MX_BLOCK)


def _padded(part: Tensor, num_rows: int, num_groups: int) -> Tensor:
    """[1, rows, groups, …] with zeros up to these sizes; code 0 is the value 0 whatever the scale."""
    if part.shape[1:3] == (num_rows, num_groups):
        return part
    whole = torch.zeros(1, num_rows, num_groups, *part.shape[3:], dtype=part.dtype)
    whole[:, : part.shape[1], : part.shape[2]] = part
    return whole
