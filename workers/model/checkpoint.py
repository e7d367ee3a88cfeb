"""Loads a gpt-oss checkpoint in Hugging Face layout: names, shapes and dtypes are checked first, then tensors are read one by one."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kernels.mxfp4 import PackedMXFP4, choose_layout, from_natural
from workers.config import ModelConfig
from workers.errors import CheckpointError
from workers.model.experts import Experts
from workers.model.gpt_oss import Attention, GptOss, Layer
from workers.model.linear import Linear
from workers.model.safetensors_files import INDEX_FILE, StoredTensor, read_header, read_header_bytes, stored_tensors, weight_files
from workers.model.tensor_specs import EMBEDDING, FINAL_NORM, LM_HEAD, TensorSpec, layer_prefix, tensor_specs

_STORED_DTYPES = {"dense": ("BF16", "F16", "F32"), "mxfp4_blocks": ("U8",), "mxfp4_scales": ("U8",)}
_NAN_SCALE = 255
"""NaN by the OCP Microscaling specification."""
_SAMPLE_BYTES = 4096


def load_model(
    path: Path,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> GptOss:
    """Load the weights in `path`, which must be exactly those that `config` describes.

    Args:
        dtype: of activations and dense weights, bfloat16 or float32. MXFP4 experts stay packed, in the layout that suits `device`.
        progress: called with (tensors loaded, tensors in all) after each one.
    Raises:
        CheckpointError: one sentence naming file and tensor: a file is missing, cut off or disagrees with the index; a tensor is
            missing, unknown, or of another shape or dtype; an MXFP4 scale is NaN.
    """
    tensors = stored_tensors(path)
    _check_tensors(path, config, tensors)
    loader = _Loader(tensors, dtype, device, progress)
    return GptOss(
        config=config,
        embedding=loader.dense(EMBEDDING),
        layers=tuple(_load_layer(loader, config, layer) for layer in range(config.num_layers)),
        final_norm=loader.dense(FINAL_NORM),
        lm_head=Linear(loader.dense(LM_HEAD)),
    )


def fingerprint(path: Path) -> str:
    """Hex digest that tells checkpoints apart without reading all of them: over config.json, the index, and each weight file's name,
    size, header and the first 4 KiB of each of its tensors (a fine-tune differs from its base model in nothing else).

    Raises:
        CheckpointError: a file is missing or cut off.
    """
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


def _check_tensors(path: Path, config: ModelConfig, tensors: Mapping[str, StoredTensor]) -> None:
    unknown = dict(tensors)
    for spec in tensor_specs(config):
        if spec.name not in tensors:
            raise CheckpointError(f"{path}: tensor {spec.name} of shape {list(spec.shape)} is missing")
        _check_tensor(spec, unknown.pop(spec.name))
    for name, tensor in unknown.items():
        raise CheckpointError(
            f"{tensor.file}: tensor {name} of shape {list(tensor.shape)} is not part of the model that config.json describes"
        )


def _check_tensor(spec: TensorSpec, tensor: StoredTensor) -> None:
    if tensor.shape != spec.shape:
        raise CheckpointError(f"{tensor.file}: tensor {spec.name} has shape {list(tensor.shape)}, wanted {list(spec.shape)}")
    wanted = _STORED_DTYPES[spec.kind]
    if tensor.dtype not in wanted:
        raise CheckpointError(f"{tensor.file}: tensor {spec.name} has dtype {tensor.dtype}, wanted {' or '.join(wanted)}")


def _load_layer(loader: "_Loader", config: ModelConfig, layer: int) -> Layer:
    prefix = layer_prefix(layer)
    attention = f"{prefix}self_attn."
    experts = f"{prefix}mlp.experts."
    qkv = ("q_proj", "k_proj", "v_proj")
    return Layer(
        attention_norm=loader.dense(f"{prefix}input_layernorm.weight"),
        attention=Attention(
            qkv=Linear(
                loader.joined([f"{attention}{name}.weight" for name in qkv]), loader.joined([f"{attention}{name}.bias" for name in qkv])
            ),
            output=Linear(loader.dense(f"{attention}o_proj.weight"), loader.dense(f"{attention}o_proj.bias")),
            sinks=loader.dense(f"{attention}sinks", torch.float32),
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            window=config.layer_windows[layer],
        ),
        experts_norm=loader.dense(f"{prefix}post_attention_layernorm.weight"),
        experts=Experts(
            gate=Linear(loader.dense(f"{prefix}mlp.router.weight", torch.float32), loader.dense(f"{prefix}mlp.router.bias", torch.float32)),
            gate_up=loader.experts(f"{experts}gate_up_proj", config.experts_format == "mxfp4"),
            gate_up_bias=loader.dense(f"{experts}gate_up_proj_bias"),
            down=loader.experts(f"{experts}down_proj", config.experts_format == "mxfp4"),
            down_bias=loader.dense(f"{experts}down_proj_bias"),
            num_experts_per_token=config.num_experts_per_token,
            swiglu_limit=config.swiglu_limit,
            swiglu_alpha=config.swiglu_alpha,
        ),
    )


class _Loader:
    """Reads checked tensors into memory of their own (what safetensors returns is a view of the mapped file)."""

    def __init__(
        self,
        tensors: Mapping[str, StoredTensor],
        dtype: torch.dtype,
        device: torch.device,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._tensors = tensors
        self._dtype = dtype
        self._device = device
        self._progress = progress
        self._done = 0
        self._open_file: tuple[Path, safe_open] | None = None

    def dense(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor in the model's dtype, or another."""
        return self._mapped(name).to(device=self._device, dtype=dtype or self._dtype, copy=True)

    def joined(self, names: Sequence[str]) -> Tensor:
        """Several tensors, one behind the other along the first dimension."""
        shapes = [self._tensors[name].shape for name in names]
        whole = torch.empty((sum(shape[0] for shape in shapes), *shapes[0][1:]), dtype=self._dtype, device=self._device)
        for name, part in zip(names, torch.split(whole, [shape[0] for shape in shapes]), strict=True):
            part.copy_(self._mapped(name))
        return whole

    def experts(self, name: str, packed: bool) -> PackedMXFP4 | Tensor:
        """A projection of all experts, [E, N, K]."""
        if packed:
            return self._packed_experts(name)
        stored = self._mapped(name)
        num_experts, columns, rows = stored.shape
        whole = torch.empty((num_experts, rows, columns), dtype=self._dtype, device=self._device)
        for expert in range(num_experts):
            whole[expert].copy_(stored[expert].T)
        return whole

    def _packed_experts(self, name: str) -> PackedMXFP4:
        blocks = self._mapped(f"{name}_blocks").to(device=self._device, copy=True)
        scales = self._mapped(f"{name}_scales").to(device=self._device, copy=True)
        if bool((scales == _NAN_SCALE).any()):
            where = (scales == _NAN_SCALE).nonzero()[0].tolist()
            file = self._tensors[f"{name}_scales"].file
            raise CheckpointError(f"{file}: tensor {name}_scales has scale {_NAN_SCALE}, which is NaN, at {where}")
        return from_natural(blocks, scales, choose_layout(self._device))

    def _mapped(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        try:
            # One file is open at a time, so that the pages of finished files leave this process.
            if self._open_file is None or self._open_file[0] != tensor.file:
                self._open_file = (tensor.file, safe_open(tensor.file, framework="pt", device="cpu"))
            mapped: Tensor = self._open_file[1].get_tensor(name)  # type: ignore[no-untyped-call]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{tensor.file}: tensor {name} cannot be read: {error}") from error
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, len(self._tensors))
        return mapped
