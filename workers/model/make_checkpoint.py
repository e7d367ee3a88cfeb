"""Random-weight gpt-oss checkpoints in Hugging Face layout, of exactly the published shapes,
written as a stream, in little memory."""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from workers.config import ModelConfig
from workers.errors import ConfigError
from workers.model.random_weights import random_pieces
from workers.model.safetensors_files import INDEX_FILE, SINGLE_FILE
from workers.model.safetensors_writer import safetensors_header, stored_bytes, write_safetensors
from workers.model.tensor_specs import EMBEDDING, TensorSpec, tensor_specs

MAX_SHARD_BYTES = 5_000_000_000
_WINDOW = 128
_SWIGLU_ALPHA = 1.702
"""Alpha of the SwiGLU, which published configs omit."""
_HARMONY_VOCAB = 201_088
_HARMONY_STOP_IDS = (200_002, 199_999, 200_012)
"""Ids of <|return|>, <|endoftext|>, <|call|> in the published vocabulary, in the order of its
generation_config.json."""
_DISK_MARGIN_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class _Shape:
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_experts: int
    num_heads: int
    num_kv_heads: int


_SHAPES: Mapping[str, _Shape] = MappingProxyType(
    {
        "tiny": _Shape(4, 256, 192, 8, 8, 2),
        "small": _Shape(12, 1024, 1024, 32, 16, 2),
        "20b": _Shape(24, 2880, 2880, 32, 64, 8),
        "120b": _Shape(36, 2880, 2880, 128, 64, 8),
    }
)
PRESETS = tuple(_SHAPES)
DEFAULT_VOCAB: Mapping[str, int] = MappingProxyType(
    {name: 2048 if name == "tiny" else _HARMONY_VOCAB for name in PRESETS}
)


@dataclass(frozen=True, slots=True)
class CheckpointFile:
    """One file of a checkpoint and its exact size."""

    name: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Summary:
    """The checkpoint written, or that would be written with `dry_run`.

    Attributes:
        files: those that make_checkpoint writes itself, in order; not those of `add_files`.
        parameters_total: as the gpt-oss model card counts (arXiv 2508.10925, table 1): an MXFP4
            value is one parameter, its scales none.
        parameters_active: used for one token: all but the embedding and the experts not chosen.
    """

    files: tuple[CheckpointFile, ...]
    parameters_total: int
    parameters_active: int

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)


def preset_config(
    preset: str,
    *,
    vocab_size: int | None = None,
    num_layers: int | None = None,
    experts_format: Literal["mxfp4", "bf16"] = "mxfp4",
    stop_token_ids: Sequence[int] | None = None,
) -> ModelConfig:
    """Return the config of a preset.

    Args:
        preset: one of PRESETS.
        vocab_size, num_layers: overrides of the preset's values.
        stop_token_ids: ids that end a turn, for config.json and generation_config.json; None for
            the published ones if the vocabulary has the published size, else none (a tokenizer
            names them).
    Raises:
        ConfigError: an unknown preset or an invalid size.
    """
    if preset not in _SHAPES:
        raise ConfigError(f"preset {preset!r} is unknown; choose one of {', '.join(PRESETS)}")
    shape = _SHAPES[preset]
    layers = shape.num_layers if num_layers is None else num_layers
    vocab = DEFAULT_VOCAB[preset] if vocab_size is None else vocab_size
    for name, value in (("layers", layers), ("vocab", vocab)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    if stop_token_ids is None:
        stop_token_ids = _HARMONY_STOP_IDS if vocab == _HARMONY_VOCAB else ()
    unknown = [token_id for token_id in stop_token_ids if not 0 <= token_id < vocab]
    if unknown:
        raise ConfigError(f"stop token id {unknown[0]} is outside the vocabulary of {vocab} ids")
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_layers=layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=64,
        num_experts=shape.num_experts,
        num_experts_per_token=4,
        layer_windows=tuple(_WINDOW if layer % 2 == 0 else None for layer in range(layers)),
        max_context_len=131_072,
        stop_token_ids=tuple(stop_token_ids),
        experts_format=experts_format,
    )


@dataclass(frozen=True, slots=True)
class CheckpointPlan:
    """All files of a checkpoint before they are written.

    Attributes:
        texts: (name, content).
        shards: (name, its tensors).
        metadata: metadata of each shard's header.
    """

    texts: tuple[tuple[str, str], ...]
    shards: tuple[tuple[str, tuple[TensorSpec, ...]], ...]
    metadata: Mapping[str, str]
    summary: Summary


def plan_checkpoint(
    config: ModelConfig, *, seed: int, max_shard_bytes: int = MAX_SHARD_BYTES
) -> CheckpointPlan:
    """Plan the files, the order of their contents and their sizes. A tensor larger than
    `max_shard_bytes` gets its own file.

    Raises:
        ConfigError: the seed is negative.
    """
    if seed < 0:
        raise ConfigError(f"seed must not be negative, got {seed}")
    specs = list(tensor_specs(config))
    shards = _name_shards(_split_into_shards(specs, max_shard_bytes))
    # The seed makes two random checkpoints of one shape differ in their headers, not only deep in
    # their data.
    metadata = {"format": "pt", "seed": str(seed)}
    texts = [
        ("config.json", to_json(config_json(config))),
        ("generation_config.json", to_json(generation_config_json(config))),
    ]
    if len(shards) > 1:
        weight_map = {spec.name: name for name, tensors in shards for spec in tensors}
        total_size = sum(stored_bytes(spec) for spec in specs)
        texts.append(
            (
                INDEX_FILE,
                to_json(
                    {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
                ),
            )
        )
    files = [CheckpointFile(name, len(text.encode())) for name, text in texts]
    for name, tensors in shards:
        files.append(
            CheckpointFile(
                name, len(safetensors_header(tensors, metadata)) + sum(stored_bytes(spec) for spec in tensors)
            )
        )
    total = sum(spec.num_parameters for spec in specs)
    summary = Summary(
        tuple(files), parameters_total=total, parameters_active=_active_parameters(config, specs)
    )
    return CheckpointPlan(tuple(texts), shards, metadata, summary)


def write_checkpoint(
    out: Path,
    config: ModelConfig,
    *,
    seed: int,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    add_files: Callable[[Path], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Write a checkpoint of random weights. The same seed gives the same tensors, however they are
    split into files.

    The files are written to a hidden folder beside `out` that is renamed at the end, so that an
    interrupted run leaves no partial checkpoint.

    Args:
        out: the folder to create; may exist if empty. Its parents are created.
        add_files: called with the folder before the rename, to add files to it (a tokenizer).
        progress: called with (bytes written, bytes in all) of the weight files.
    Raises:
        ConfigError: `out` is not empty or not a folder, the disk is too small, or writing failed;
            nothing is left behind.
    """
    out = Path(os.path.abspath(out))
    plan = plan_checkpoint(config, seed=seed, max_shard_bytes=max_shard_bytes)
    _check_empty(out)
    _check_disk(out, plan.summary.num_bytes)
    unfinished = out.parent / f".{out.name}.unfinished-{os.getpid()}"
    try:
        unfinished.mkdir(parents=True)
        _write_files(unfinished, plan, seed, progress)
        if add_files is not None:
            add_files(unfinished)
        unfinished.rename(out)
    except OSError as error:
        raise ConfigError(f"cannot write the checkpoint to {out}: {error.strerror or error}") from error
    finally:
        # After the rename it no longer exists; in any other case, including an interrupt, it must
        # be removed.
        shutil.rmtree(unfinished, ignore_errors=True)
    return plan.summary


_KEPT_MODULES = (
    "model.layers.*.self_attn",
    "model.layers.*.mlp.router",
    "model.embed_tokens",
    "lm_head",
)


def config_json(config: ModelConfig) -> dict[str, object]:
    """Return the fields of a published gpt-oss config.json, with this config's values."""
    windows = {window for window in config.layer_windows if window is not None}
    if len(windows) > 1:
        raise ConfigError(
            f"layer_windows has windows {sorted(windows)}; config.json holds one for all sliding layers"
        )
    layer_types = [
        "full_attention" if window is None else "sliding_attention" for window in config.layer_windows
    ]
    fields: dict[str, object] = {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": config.stop_token_ids[0] if config.stop_token_ids else None,
        "experts_per_token": config.num_experts_per_token,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initial_context_length": config.rope.original_max_position_embeddings,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "layer_types": layer_types,
        "max_position_embeddings": config.max_context_len,
        "model_type": "gpt_oss",
        "num_attention_heads": config.num_heads,
        "num_experts_per_tok": config.num_experts_per_token,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "num_local_experts": config.num_experts,
        "output_router_logits": False,
        "pad_token_id": _pad_token_id(config),
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": {
            "beta_fast": config.rope.beta_fast,
            "beta_slow": config.rope.beta_slow,
            "factor": config.rope.factor,
            "original_max_position_embeddings": config.rope.original_max_position_embeddings,
            "rope_type": "yarn",
            "truncate": config.rope.truncate,
        },
        "rope_theta": config.rope.theta,
        "router_aux_loss_coef": 0.9,
        "sliding_window": config.sliding_window or _WINDOW,
        "swiglu_limit": config.swiglu_limit,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
    if config.swiglu_alpha != _SWIGLU_ALPHA:
        fields["swiglu_alpha"] = config.swiglu_alpha
    if config.experts_format == "mxfp4":
        fields["quantization_config"] = {
            "modules_to_not_convert": list(_KEPT_MODULES),
            "quant_method": "mxfp4",
        }
    return fields


def generation_config_json(config: ModelConfig) -> dict[str, object]:
    """Return the fields of a published generation_config.json."""
    return {
        "do_sample": True,
        "eos_token_id": list(config.stop_token_ids) or None,
        "pad_token_id": _pad_token_id(config),
    }


def _pad_token_id(config: ModelConfig) -> int | None:
    return _HARMONY_STOP_IDS[1] if config.vocab_size == _HARMONY_VOCAB else None


def _active_parameters(config: ModelConfig, specs: Sequence[TensorSpec]) -> int:
    # The experts' tensors, including biases, have the number of experts as first dimension; a token
    # uses num_experts_per_token of them.
    active = 0
    for spec in specs:
        if spec.name == EMBEDDING:
            continue
        if ".mlp.experts." in spec.name:
            active += spec.num_parameters // config.num_experts * config.num_experts_per_token
        else:
            active += spec.num_parameters
    return active


def _split_into_shards(specs: Sequence[TensorSpec], max_shard_bytes: int) -> list[tuple[TensorSpec, ...]]:
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + stored_bytes(spec) > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += stored_bytes(spec)
    return [tuple(shard) for shard in shards]


def _name_shards(shards: Sequence[tuple[TensorSpec, ...]]) -> tuple[tuple[str, tuple[TensorSpec, ...]], ...]:
    if len(shards) == 1:
        return ((SINGLE_FILE, shards[0]),)
    return tuple(
        (f"model-{number:05d}-of-{len(shards):05d}.safetensors", shard)
        for number, shard in enumerate(shards, start=1)
    )


def to_json(value: object) -> str:
    """Return the text of a JSON file of a checkpoint."""
    return json.dumps(value, indent=2) + "\n"


def _check_empty(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} exists and is not a folder; give the path of a new or empty folder")
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(
            f"{out} is not empty; give the path of a new or empty folder, nothing is overwritten"
        )


def _check_disk(out: Path, num_bytes: int) -> None:
    existing = next(folder for folder in out.parents if folder.exists())
    free = shutil.disk_usage(existing).free
    if num_bytes + _DISK_MARGIN_BYTES > free:
        raise ConfigError(
            f"the checkpoint takes {num_bytes / 1e9:.2f} GB ({num_bytes} bytes) "
            f"but {existing} has {free / 1e9:.2f} GB free ({free} bytes); free some space, choose another "
            f"folder or fewer layers"
        )


def _write_files(
    folder: Path, plan: CheckpointPlan, seed: int, progress: Callable[[int, int], None] | None
) -> None:
    total = sum(stored_bytes(spec) for _, tensors in plan.shards for spec in tensors)
    done = 0

    def written(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if progress is not None:
            progress(done, total)

    for name, tensors in plan.shards:
        write_safetensors(folder / name, tensors, plan.metadata, partial(random_pieces, seed=seed), written)
    for name, text in plan.texts:
        (folder / name).write_text(text, encoding="utf-8")
