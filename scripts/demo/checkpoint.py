"""The network as a checkpoint that the engine loads."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.harmony.encoding import HarmonyEncoding
from kernels.mxfp4 import pack
from scripts.demo.network import Network
from workers.config import ModelConfig
from workers.model.make_checkpoint import config_json, generation_config_json, to_json
from workers.model.safetensors_files import SINGLE_FILE
from workers.model.safetensors_writer import write_safetensors
from workers.model.tensor_specs import TensorSpec, tensor_names, tensor_specs

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def demo_config(encoding: HarmonyEncoding) -> ModelConfig:
    """Return the shape of the demo model: gpt-oss's in small, with two of eight experts."""
    layers = 4
    return ModelConfig(
        vocab_size=encoding.vocab_size,
        hidden_size=192,
        intermediate_size=160,
        num_layers=layers,
        num_heads=6,
        num_kv_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_token=2,
        layer_windows=tuple(128 if layer % 2 == 0 else None for layer in range(layers)),
        max_context_len=131_072,
        stop_token_ids=encoding.stop_token_ids,
    )


def save_checkpoint(network: Network, out: Path, tokenizer: Path) -> None:
    """Write the network and the tokenizer's files as the folder `out`; one of that name is
    replaced once the new one is complete."""
    unfinished = out.parent / f".{out.name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    config = network.config
    tensors = _stored(network)
    write_safetensors(
        unfinished / SINGLE_FILE,
        list(tensor_specs(config)),
        {"format": "pt"},
        partial(_bytes, tensors),
        lambda num_bytes: None,
    )
    (unfinished / "config.json").write_text(to_json(config_json(config)), encoding="utf-8")
    (unfinished / "generation_config.json").write_text(
        to_json(generation_config_json(config)), encoding="utf-8"
    )
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, unfinished / name)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(unfinished, out)


@torch.no_grad()
def as_stored(network: Network) -> Network:
    """Return the network whose dense weights are rounded to bf16, as a checkpoint holds them; the
    experts are rounded in every forward pass."""
    experts = {
        name
        for layer in tensor_names(network.config).layers
        for name in (layer.gate_up.dense, layer.down.dense)
    }
    return Network(
        replace(network.config),
        {
            name: tensor if name in experts else tensor.bfloat16().float()
            for name, tensor in network.named_weights()
        },
    )


@torch.no_grad()
def _stored(network: Network) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {name: tensor.detach() for name, tensor in network.named_weights()}
    for layer in tensor_names(network.config).layers:
        for experts in (layer.gate_up, layer.down):
            dense = tensors.pop(experts.dense)
            packed = pack(dense)
            num_experts, num_rows, width = dense.shape
            tensors[experts.blocks] = packed.blocks.reshape(num_experts, num_rows, width // 32, 16)
            tensors[experts.scales] = packed.scales
    return {
        name: tensor if tensor.dtype == torch.uint8 else tensor.bfloat16() for name, tensor in tensors.items()
    }


def _bytes(tensors: dict[str, Tensor], spec: TensorSpec) -> Iterator[NDArray[np.uint8]]:
    tensor = tensors[spec.name]
    assert tensor.shape == spec.shape, f"{spec.name}: {list(tensor.shape)}, not {list(spec.shape)}"
    yield tensor.contiguous().view(torch.uint8).numpy()
