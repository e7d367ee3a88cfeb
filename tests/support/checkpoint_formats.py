"""The same weights as OpenAI and fine-tuning tools store them, made from a checkpoint in Hugging
Face's MXFP4 form."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kernels.mxfp4 import from_natural, unpack
from workers.config import ModelConfig


def read_weights(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def write_original(source: Path, folder: Path, config: ModelConfig) -> Path:
    """Write the weights as openai/gpt-oss `torch/weights.py` reads them: other names, one qkv, no
    index, a config.json of its own."""
    weights = read_weights(source)
    renamed = {
        "embedding.weight": weights["model.embed_tokens.weight"],
        "norm.scale": weights["model.norm.weight"],
        "unembedding.weight": weights["lm_head.weight"],
    }
    for layer in range(config.num_layers):
        hf, own = f"model.layers.{layer}.", f"block.{layer}."
        renamed[f"{own}attn.norm.scale"] = weights[f"{hf}input_layernorm.weight"]
        renamed[f"{own}attn.sinks"] = weights[f"{hf}self_attn.sinks"]
        renamed[f"{own}mlp.norm.scale"] = weights[f"{hf}post_attention_layernorm.weight"]
        for kind in ("weight", "bias"):
            renamed[f"{own}attn.qkv.{kind}"] = torch.cat(
                [weights[f"{hf}self_attn.{name}_proj.{kind}"] for name in "qkv"]
            )
            renamed[f"{own}attn.out.{kind}"] = weights[f"{hf}self_attn.o_proj.{kind}"]
            renamed[f"{own}mlp.gate.{kind}"] = weights[f"{hf}mlp.router.{kind}"]
        for ours, theirs in (("mlp1", "gate_up_proj"), ("mlp2", "down_proj")):
            for kind in ("blocks", "scales"):
                renamed[f"{own}mlp.{ours}_weight.{kind}"] = weights[f"{hf}mlp.experts.{theirs}_{kind}"]
            renamed[f"{own}mlp.{ours}_bias"] = weights[f"{hf}mlp.experts.{theirs}_bias"]
    folder.mkdir(parents=True)
    names = sorted(renamed)
    for number, part in enumerate((names[0::2], names[1::2]), start=1):
        save_file(
            {name: renamed[name].contiguous() for name in part},
            folder / f"model--{number:05d}-of-00002.safetensors",
        )
    fields = {
        "num_hidden_layers": config.num_layers,
        "num_experts": config.num_experts,
        "experts_per_token": config.num_experts_per_token,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "swiglu_limit": config.swiglu_limit,
        "head_dim": config.head_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "sliding_window": config.sliding_window,
        "initial_context_length": config.rope.original_max_position_embeddings,
        "rope_theta": config.rope.theta,
        "rope_scaling_factor": config.rope.factor,
        "rope_ntk_alpha": config.rope.beta_slow,
        "rope_ntk_beta": config.rope.beta_fast,
    }
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def write_bf16(source: Path, folder: Path, config: ModelConfig) -> Path:
    """Write the weights as transformers saves a model that was trained in bf16: experts
    input-first, no quantization_config."""
    weights = read_weights(source)
    for layer in range(config.num_layers):
        for name in ("gate_up_proj", "down_proj"):
            stem = f"model.layers.{layer}.mlp.experts.{name}"
            packed = from_natural(weights.pop(f"{stem}_blocks"), weights.pop(f"{stem}_scales"))
            weights[stem] = unpack(packed, torch.bfloat16).transpose(1, 2).contiguous()
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    fields = json.loads((source / "config.json").read_text())
    del fields["quantization_config"]
    (folder / "config.json").write_text(json.dumps(fields | {"dtype": "bfloat16"}))
    return folder
