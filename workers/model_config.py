"""The config.json of a checkpoint, read and validated, in Hugging Face's or OpenAI's spelling."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from workers.config import ModelConfig, RopeConfig
from workers.errors import CheckpointError
from workers.model.safetensors_files import stored_names
from workers.model.tensor_specs import tensor_names

_ADAPTER_CONFIG = "adapter_config.json"


def checkpoint_folder(path: Path) -> Path:
    """Return the folder of a checkpoint's config and weights: the folder itself, or its `original/`
    if only that exists."""
    inner = path / "original"
    return inner if not (path / "config.json").exists() and (inner / "config.json").is_file() else path


def load_model_config(path: Path) -> ModelConfig:
    """Read and validate a checkpoint's `config.json`, Hugging Face's or OpenAI's own. The format of
    the experts is the one in which they are stored; without weights beside it, the config's.

    Raises:
        CheckpointError: the folder or file is missing, is not a gpt-oss config, or a field is
            missing, of a wrong type or out of range.
    """
    return _read_model_config(path)[1]


def checkpoint_warnings(path: Path) -> list[str]:
    """Return a sentence for each entry of a checkpoint that contradicts its weights, or belongs to
    something that is not loaded.

    Raises:
        CheckpointError: as in `load_model_config`.
    """
    said, model = _read_model_config(path)
    folder = checkpoint_folder(path)
    warnings = []
    if said.experts_format != model.experts_format:
        names = {"mxfp4": "MXFP4", "bf16": "bf16"}
        entry = "quant_method 'mxfp4'" if said.experts_format == "mxfp4" else "no quant_method 'mxfp4'"
        warnings.append(
            f"{folder / 'config.json'}: quantization_config has {entry}, but the experts are stored in "
            f"{names[model.experts_format]} and are read as that; correct the entry"
        )
    if (folder / _ADAPTER_CONFIG).is_file():
        warnings.append(
            f"{folder / _ADAPTER_CONFIG} describes an adapter, which is not applied: only the model beside "
            f"it is served; to serve the adapter, merge it into the model"
        )
    return warnings


def _read_model_config(path: Path) -> tuple[ModelConfig, ModelConfig]:
    """Return the model as config.json describes it, and as its experts are stored."""
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is not a folder; give the path of a gpt-oss checkpoint in Hugging Face layout"
            f"{_how_to_download(str(path))}"
        )
    path = checkpoint_folder(path)
    file = path / "config.json"
    if not file.is_file() and (path / _ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{path} holds an adapter ({_ADAPTER_CONFIG}) without its base model; merge it into the model "
            f"and give the merged checkpoint"
        )
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; {path} is not a Hugging Face checkpoint")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from error
    said = parse_model_config(raw, str(file))
    return said, replace(said, experts_format=_stored_experts_format(path, said))


def _stored_experts_format(folder: Path, config: ModelConfig) -> Literal["mxfp4", "bf16"]:
    """Return the format in which the experts are stored. Tools that merge or convert a checkpoint
    may keep a `quantization_config` that no longer holds."""
    try:
        stored = stored_names(folder)
    except CheckpointError:
        return config.experts_format  # the loader says what is broken
    experts = tensor_names(config).layers[0].gate_up
    if experts.blocks in stored:
        return "mxfp4"
    return "bf16" if experts.dense in stored else config.experts_format


def _how_to_download(name: str) -> str:
    """The end of a sentence about a path that is no folder but may be a model's name on a hub."""
    if not re.fullmatch(r"[\w-]+/[\w.-]+", name):
        return ""
    excluded = ' --exclude "original/*" --exclude "metal/*"' if name.startswith("openai/") else ""
    return f". To download a model of this name: hf download {name}{excluded} --local-dir {Path(name).name}"


def parse_model_config(raw: Any, source: str) -> ModelConfig:
    """Validate a decoded config.json; `source` names it in errors.

    Raises:
        CheckpointError: as in `load_model_config`.
    """
    if not isinstance(raw, dict):
        raise CheckpointError(f"{source} must hold a JSON object, found {type(raw).__name__}")
    if "model_type" not in raw and "rope_ntk_alpha" in raw:
        return _parse_original_config(raw, source)
    if raw.get("model_type") != "gpt_oss":
        raise CheckpointError(
            f"{source}: model_type is {raw.get('model_type')!r}; only 'gpt_oss' is supported"
        )
    fields = _Fields(raw, source)
    num_layers = fields.integer("num_hidden_layers")
    hidden_size = fields.integer("hidden_size")
    num_heads = fields.integer("num_attention_heads")
    num_kv_heads = fields.integer("num_key_value_heads")
    num_experts = fields.integer("num_local_experts", aliases=("num_experts",))
    experts_per_token = fields.integer("num_experts_per_tok", aliases=("experts_per_token",), default=4)
    head_dim = fields.integer("head_dim", default=64)
    intermediate_size = fields.integer("intermediate_size")
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"{source}: num_attention_heads {num_heads} is not a multiple of num_key_value_heads "
            f"{num_kv_heads}"
        )
    if experts_per_token > num_experts:
        raise CheckpointError(
            f"{source}: num_experts_per_tok {experts_per_token} is more than num_local_experts {num_experts}"
        )
    if head_dim % 2:
        raise CheckpointError(f"{source}: head_dim {head_dim} must be even")
    experts_format = _experts_format(raw.get("quantization_config"), source)
    if experts_format == "mxfp4":
        for name, size in (("hidden_size", hidden_size), ("intermediate_size", intermediate_size)):
            if size % 32:
                raise CheckpointError(f"{source}: {name} {size} is not a multiple of 32, the MXFP4 group")
    if raw.get("tie_word_embeddings", False):
        raise CheckpointError(f"{source}: tie_word_embeddings is true; gpt-oss has a separate lm_head")
    return ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        num_experts=num_experts,
        num_experts_per_token=experts_per_token,
        layer_windows=_layer_windows(fields, num_layers),
        max_context_len=fields.integer("max_position_embeddings", default=131072),
        rms_norm_eps=fields.number("rms_norm_eps", default=1e-5),
        swiglu_limit=fields.number("swiglu_limit", default=7.0),
        swiglu_alpha=fields.number("swiglu_alpha", default=1.702),
        rope=_rope(fields),
        stop_token_ids=_stop_token_ids(fields),
        experts_format=experts_format,
    )


def _experts_format(quantization: Any, source: str) -> Literal["mxfp4", "bf16"]:
    """Return the stored format: `mxfp4` experts, or `bf16` if nothing is quantised. A checkpoint of
    the second kind may still name a quantiser that only calibrated scales of an fp8 KV cache
    (llm-compressor with just a `kv_cache_scheme`, ModelOpt likewise)."""
    if quantization is None:
        return "bf16"
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if not isinstance(quantization, dict) or (method != "mxfp4" and not _leaves_weights(quantization)):
        raise CheckpointError(
            f"{source}: quantization_config.quant_method must be 'mxfp4', found {method!r}: weights are "
            f"read as MXFP4 experts with the "
            "rest in bf16, or all in bf16, either with scales of an fp8 KV cache or without; start from "
            "such a checkpoint (engine.quantize "
            "mxfp4 packs the experts of one in bf16)"
        )
    return "mxfp4" if method == "mxfp4" else "bf16"


def _leaves_weights(quantization: dict[str, Any]) -> bool:
    """Return whether a config of compressed-tensors or ModelOpt describes only an fp8 KV cache."""
    groups, scheme = quantization.get("config_groups") or {}, quantization.get("kv_cache_scheme")
    return (
        quantization.get("quant_method") in ("compressed-tensors", "modelopt")
        and quantization.get("quant_algo") is None
        and isinstance(groups, dict)
        and all(isinstance(group, dict) and group.get("weights") is None for group in groups.values())
        and isinstance(scheme, dict)
        and scheme.get("type") == "float"
        and scheme.get("num_bits") == 8
    )


def _parse_original_config(raw: dict[str, Any], source: str) -> ModelConfig:
    """Parse the config.json of OpenAI's `original/` folder: openai/gpt-oss `torch/model.py`
    ModelConfig, which builds a fixed kind of model."""
    known = {
        "num_hidden_layers": "num_hidden_layers",
        "num_experts": "num_local_experts",
        "experts_per_token": "num_experts_per_tok",
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "swiglu_limit": "swiglu_limit",
        "head_dim": "head_dim",
        "num_attention_heads": "num_attention_heads",
        "num_key_value_heads": "num_key_value_heads",
        "sliding_window": "sliding_window",
    }
    fields = _Fields(raw, source)
    translated: dict[str, Any] = {name: raw[original] for original, name in known.items() if original in raw}
    initial, factor = (
        fields.integer("initial_context_length", default=4096),
        fields.number("rope_scaling_factor", default=32.0),
    )
    translated |= {
        "model_type": "gpt_oss",
        "quantization_config": {"quant_method": "mxfp4"},
        "max_position_embeddings": int(initial * factor),
        "rope_theta": fields.number("rope_theta", default=150000.0),
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": factor,
            "beta_fast": fields.number("rope_ntk_beta", default=32.0),
            "beta_slow": fields.number("rope_ntk_alpha", default=1.0),
            "original_max_position_embeddings": initial,
            "truncate": False,
        },
    }
    return replace(parse_model_config(translated, source), layout="original")


class _Fields:
    """Typed access to a JSON object; errors name the source and the field."""

    def __init__(self, raw: dict[str, Any], source: str) -> None:
        self.raw = raw
        self.source = source

    def integer(self, name: str, *, aliases: tuple[str, ...] = (), default: int | None = None) -> int:
        value = next((self.raw[key] for key in (name, *aliases) if self.raw.get(key) is not None), default)
        if value is None:
            raise CheckpointError(f"{self.source}: field {name} is missing")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"{self.source}: field {name} must be a positive integer, found {value!r}")
        return value

    def number(self, name: str, *, default: float) -> float:
        value = self.raw.get(name, default)
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not math.isfinite(value)
            or value <= 0
        ):
            raise CheckpointError(f"{self.source}: field {name} must be a positive number, found {value!r}")
        return float(value)


def _layer_windows(fields: _Fields, num_layers: int) -> tuple[int | None, ...]:
    types = fields.raw.get("layer_types")
    if types is None:
        types = ["sliding_attention" if layer % 2 == 0 else "full_attention" for layer in range(num_layers)]
    if not isinstance(types, list) or len(types) != num_layers:
        raise CheckpointError(
            f"{fields.source}: layer_types must list one entry for each of the {num_layers} layers"
        )
    unknown = [entry for entry in types if entry not in ("sliding_attention", "full_attention")]
    if unknown:
        raise CheckpointError(
            f"{fields.source}: layer_types has {unknown[0]!r}; known are 'sliding_attention' and "
            f"'full_attention'"
        )
    window = fields.integer("sliding_window", default=128)
    return tuple(window if entry == "sliding_attention" else None for entry in types)


def _rope(fields: _Fields) -> RopeConfig:
    # transformers 4 writes rope_scaling and rope_theta, transformers 5 rope_parameters.
    scaling = fields.raw.get("rope_scaling") or fields.raw.get("rope_parameters")
    source = (
        f"{fields.source}: rope_scaling"
        if fields.raw.get("rope_scaling")
        else f"{fields.source}: rope_parameters"
    )
    if not isinstance(scaling, dict):
        raise CheckpointError(f"{fields.source}: field rope_scaling (or rope_parameters) is missing")
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind != "yarn":
        raise CheckpointError(f"{source}.rope_type is {kind!r}; only 'yarn' is supported")
    nested = _Fields(scaling, source)
    theta = nested.number("rope_theta", default=fields.number("rope_theta", default=150000.0))
    truncate = scaling.get("truncate", True)
    if not isinstance(truncate, bool):
        raise CheckpointError(f"{source}.truncate must be true or false, found {truncate!r}")
    if theta <= 1:
        raise CheckpointError(f"{source}: rope_theta must be more than 1, found {theta}")
    factor = nested.number("factor", default=32.0)
    # These would replace the factor's own attention concentration; gpt-oss sets neither.
    concentration = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    for name in ("attention_factor", "mscale", "mscale_all_dim"):
        value = scaling.get(name)
        if value is not None and not (name == "attention_factor" and value == concentration):
            raise CheckpointError(f"{source}.{name} is {value!r}; this is not supported, remove it")
    return RopeConfig(
        theta=theta,
        factor=factor,
        beta_fast=nested.number("beta_fast", default=32.0),
        beta_slow=nested.number("beta_slow", default=1.0),
        original_max_position_embeddings=nested.integer("original_max_position_embeddings", default=4096),
        truncate=truncate,
    )


def _stop_token_ids(fields: _Fields) -> tuple[int, ...]:
    value = fields.raw.get("eos_token_id")
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(entry, int) and not isinstance(entry, bool) and entry >= 0 for entry in values):
        raise CheckpointError(
            f"{fields.source}: eos_token_id must be a token id or a list of them, found {value!r}"
        )
    return tuple(values)
