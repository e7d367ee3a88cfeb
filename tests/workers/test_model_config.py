"""config.json of published and re-saved checkpoints is read as transformers reads it; a wrong field
ends in one sentence naming it."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GptOssConfig

from workers.config import ModelConfig, RopeConfig
from workers.errors import CheckpointError
from workers.model_config import load_model_config, parse_model_config


def published() -> dict[str, Any]:
    """Return the fields of gpt-oss-120b's config.json that matter, as published."""
    return {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "eos_token_id": 200002,
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_size": 2880,
        "initial_context_length": 4096,
        "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 18,
        "max_position_embeddings": 131072,
        "model_type": "gpt_oss",
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "num_local_experts": 128,
        "pad_token_id": 199999,
        "quantization_config": {
            "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
            "quant_method": "mxfp4",
        },
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "vocab_size": 201088,
    }


KV_ONLY = {
    "config_groups": {
        "group_0": {
            "targets": ["GptOssAttention"],
            "weights": None,
            "input_activations": {"num_bits": 8, "type": "float"},
        }
    },
    "format": "dense",
    "ignore": [],
    "kv_cache_scheme": {
        "dynamic": False,
        "num_bits": 8,
        "strategy": "tensor",
        "symmetric": True,
        "type": "float",
    },
    "quant_method": "compressed-tensors",
}
"""Quantization config that llm-compressor writes where it calibrated a KV cache and left the
weights alone."""
QUARK = {
    "quant_method": "quark",
    "global_quant_config": {
        "weight": {"dtype": "fp4", "group_size": 32},
        "input_tensors": {"dtype": "fp8_e4m3"},
    },
    "kv_cache_quant_config": {"*k_proj": {"output_tensors": {"dtype": "fp8_e4m3"}}},
}
"""Quantization config of amd/gpt-oss-120b-w-mxfp4-a-fp8, whose experts are stored one by one."""


@pytest.mark.parametrize(
    "quantization",
    [
        KV_ONLY,
        KV_ONLY | {"config_groups": {}},
        {"quant_method": "modelopt", "quant_algo": None, "kv_cache_scheme": KV_ONLY["kv_cache_scheme"]},
    ],
)
def test_a_quantiser_of_the_kv_cache_alone_leaves_bf16(quantization: dict[str, Any]) -> None:
    assert (
        parse_model_config(published() | {"quantization_config": quantization}, "config.json").experts_format
        == "bf16"
    )
    assert (
        parse_model_config(published() | {"quantization_config": None}, "config.json").experts_format
        == "bf16"
    )


def test_published_config() -> None:
    assert parse_model_config(published(), "config.json") == ModelConfig(
        vocab_size=201088,
        hidden_size=2880,
        intermediate_size=2880,
        num_layers=36,
        num_heads=64,
        num_kv_heads=8,
        head_dim=64,
        num_experts=128,
        num_experts_per_token=4,
        layer_windows=(128, None) * 18,
        max_context_len=131072,
        rms_norm_eps=1e-5,
        swiglu_limit=7.0,
        swiglu_alpha=1.702,
        rope=RopeConfig(150000.0, 32.0, 32.0, 1.0, 4096, False),
        stop_token_ids=(200002,),
        experts_format="mxfp4",
    )


def test_config_saved_by_transformers(tmp_path: Path) -> None:
    saved = GptOssConfig(
        num_hidden_layers=3,
        num_local_experts=6,
        num_experts_per_tok=2,
        hidden_size=96,
        intermediate_size=160,
        head_dim=32,
        num_attention_heads=6,
        num_key_value_heads=3,
        vocab_size=300,
        sliding_window=40,
        max_position_embeddings=4096,
        swiglu_limit=5.0,
        swiglu_alpha=1.5,
        rms_norm_eps=1e-6,
        eos_token_id=[7, 9],
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "original_max_position_embeddings": 512,
        },
    )
    saved.save_pretrained(tmp_path)
    assert load_model_config(tmp_path) == ModelConfig(
        vocab_size=300,
        hidden_size=96,
        intermediate_size=160,
        num_layers=3,
        num_heads=6,
        num_kv_heads=3,
        head_dim=32,
        num_experts=6,
        num_experts_per_token=2,
        layer_windows=(40, None, 40),
        max_context_len=4096,
        rms_norm_eps=1e-6,
        swiglu_limit=5.0,
        swiglu_alpha=1.5,
        # transformers truncates unless the config says otherwise.
        rope=RopeConfig(10000.0, 8.0, 16.0, 2.0, 512, True),
        stop_token_ids=(7, 9),
        experts_format="bf16",
    )


def test_layers_alternate_when_layer_types_are_left_out() -> None:
    raw = published()
    del raw["layer_types"]
    assert parse_model_config(raw, "config.json").layer_windows == (128, None) * 18
    assert GptOssConfig(num_hidden_layers=36).layer_types == published()["layer_types"]


def test_explicit_attention_factor_equal_to_the_default_is_fine() -> None:
    raw = published()
    raw["rope_scaling"]["attention_factor"] = 1.3465735902799727
    assert parse_model_config(raw, "config.json").rope.factor == 32.0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"model_type": None}, "model_type"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, found 0"),
        ({"vocab_size": "201088"}, "vocab_size must be a positive integer, found '201088'"),
        ({"num_attention_heads": True}, "num_attention_heads"),
        ({"head_dim": 63}, "head_dim 63 must be even"),
        ({"num_key_value_heads": 7}, "num_attention_heads 64 is not a multiple of num_key_value_heads 7"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok 129 is more than num_local_experts 128"),
        ({"hidden_size": 2881}, "hidden_size 2881 is not a multiple of 32"),
        ({"intermediate_size": 100}, "intermediate_size 100 is not a multiple of 32"),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "quant_method must be 'mxfp4', found 'gptq': weights are read as MXFP4 experts",
        ),
        (
            {"quantization_config": QUARK},
            "found 'quark': .* with scales of an fp8 KV cache or without; start from such a checkpoint",
        ),
        ({"quantization_config": KV_ONLY | {"kv_cache_scheme": None}}, "found 'compressed-tensors'"),
        (
            {"quantization_config": KV_ONLY | {"kv_cache_scheme": {"type": "int", "num_bits": 8}}},
            "found 'compressed-tensors'",
        ),
        (
            {"quantization_config": KV_ONLY | {"config_groups": {"group_0": {"weights": {"num_bits": 4}}}}},
            "found 'compressed-tensors'",
        ),
        (
            {"quantization_config": KV_ONLY | {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
            "found 'modelopt'",
        ),
        ({"quantization_config": "mxfp4"}, "quant_method"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"layer_types": ["full_attention"]}, "layer_types must list one entry for each of the 36 layers"),
        ({"layer_types": ["linear_attention"] * 36}, "layer_types has 'linear_attention'"),
        ({"layer_types": 3}, "layer_types"),
        ({"sliding_window": -128}, "sliding_window must be a positive integer, found -128"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a positive number, found 0"),
        ({"swiglu_limit": float("nan")}, "swiglu_limit must be a positive number, found nan"),
        ({"swiglu_alpha": "1.702"}, "swiglu_alpha"),
        ({"rope_theta": 1.0}, "rope_theta must be more than 1"),
        ({"rope_scaling": None}, "rope_scaling .* is missing"),
        ({"eos_token_id": -1}, "eos_token_id"),
        ({"eos_token_id": [200002, "x"]}, "eos_token_id"),
    ],
    ids=str,
)
def test_wrong_field(change: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named) as caught:
        parse_model_config({**published(), **change}, "some/config.json")
    assert str(caught.value).startswith("some/config.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rope_type": "linear"}, "rope_type is 'linear'"),
        ({"rope_type": None}, "rope_type"),
        ({"factor": "32"}, "factor must be a positive number"),
        ({"truncate": "no"}, "truncate must be true or false, found 'no'"),
        ({"original_max_position_embeddings": 4096.5}, "original_max_position_embeddings"),
        ({"attention_factor": 1.0}, "attention_factor is 1.0"),
        ({"mscale": 1.0, "mscale_all_dim": 0.8}, "mscale is 1.0"),
    ],
    ids=str,
)
def test_wrong_rope_field(change: dict[str, Any], named: str) -> None:
    raw = published()
    raw["rope_scaling"].update(change)
    with pytest.raises(CheckpointError, match=f"config.json: rope_scaling.*{named}"):
        parse_model_config(raw, "config.json")


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe{}", b"[" * 100_000, b"[]", b"null"])
def test_file_that_is_no_config(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model_config(tmp_path)


def test_missing_folder_and_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a folder"):
        load_model_config(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load_model_config(tmp_path)


def test_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(published()))
    assert load_model_config(tmp_path) == parse_model_config(published(), "config.json")
