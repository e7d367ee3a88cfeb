"""What training and merging tools leave in a checkpoint: read as what it is, with a warning where
an entry or a file has no effect."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.checkpoint_formats import write_bf16
from tests.support.model_steps import random_tokens, whole_prompt_logits
from tests.support.tiny_model import TINY, write_tiny_checkpoint
from workers.config import EngineConfig, ParallelConfig
from workers.errors import CheckpointError
from workers.model.checkpoint import load_model
from workers.model.make_checkpoint import write_checkpoint
from workers.model.stored_model import fingerprint
from workers.model_config import checkpoint_warnings, load_model_config
from workers.parallel.collectives import Alone
from workers.parallel.shard import plan_shards
from workers.rank.rank import Rank

TOKENS = random_tokens(TINY, 20, seed=4)
CPU = torch.device("cpu")
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "openai/gpt-oss-20b"}


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return write_tiny_checkpoint(tmp_path)


@pytest.fixture
def unpacked(packed: Path, tmp_path: Path) -> Path:
    return write_bf16(packed, tmp_path / "bf16", TINY)


def logits(folder: Path) -> Tensor:
    model = load_model(folder, load_model_config(folder), dtype=torch.float32, device=CPU)
    return whole_prompt_logits(model, TOKENS)


def quantization(folder: Path, entry: object) -> None:
    """Write the config's quantization_config; None removes it."""
    fields = json.loads((folder / "config.json").read_text())
    fields.pop("quantization_config", None)
    if entry is not None:
        fields["quantization_config"] = entry
    (folder / "config.json").write_text(json.dumps(fields))


def test_a_merge_in_bf16_that_kept_its_quantization_config(unpacked: Path) -> None:
    expected = logits(unpacked)
    assert checkpoint_warnings(unpacked) == []
    quantization(unpacked, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    assert load_model_config(unpacked).experts_format == "bf16"
    assert torch.equal(logits(unpacked), expected)
    assert checkpoint_warnings(unpacked) == [
        f"{unpacked / 'config.json'}: quantization_config has quant_method 'mxfp4', but the experts are "
        f"stored in bf16 and are read as that; correct the entry"
    ]


def test_packed_experts_whose_quantization_config_was_lost(packed: Path) -> None:
    expected = logits(packed)
    quantization(packed, None)
    assert torch.equal(logits(packed), expected)
    (warning,) = checkpoint_warnings(packed)
    assert "quantization_config has no quant_method 'mxfp4', but the experts are stored in MXFP4" in warning


def test_an_index_tells_the_format_as_well(tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    write_checkpoint(folder, TINY, seed=0, max_shard_bytes=60_000)
    assert (folder / INDEX).is_file()
    quantization(folder, None)
    assert load_model_config(folder).experts_format == "mxfp4"


def test_the_config_counts_where_no_weights_are_or_broken_ones(packed: Path) -> None:
    file = packed / WEIGHTS
    file.write_bytes(file.read_bytes()[:50])
    assert load_model_config(packed).experts_format == "mxfp4"
    with pytest.raises(CheckpointError, match=r"model\.safetensors .*truncated"):
        logits(packed)
    file.unlink()
    assert load_model_config(packed).experts_format == "mxfp4"
    assert checkpoint_warnings(packed) == []


def test_frequencies_of_the_rotary_embedding_are_ignored(packed: Path) -> None:
    expected = logits(packed)
    stored = load_file(packed / WEIGHTS)
    stored["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.zeros(3)
    stored["model.rotary_emb.inv_freq"] = torch.zeros(4, 2, dtype=torch.int64)
    save_file(stored, packed / WEIGHTS)
    assert torch.equal(logits(packed), expected)
    assert checkpoint_warnings(packed) == []
    stored["model.layers.1.self_attn.rotary_emb.inv_freq_2"] = torch.zeros(3)
    save_file(stored, packed / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"inv_freq_2 of shape .* is not part of the model"):
        logits(packed)


def test_an_adapter_beside_its_base_model_is_mentioned(packed: Path) -> None:
    expected = logits(packed)
    (packed / "adapter_config.json").write_text(json.dumps(ADAPTER))
    save_file({"lora_A": torch.zeros(2)}, packed / "adapter_model.safetensors")
    assert torch.equal(logits(packed), expected)
    (warning,) = checkpoint_warnings(packed)
    assert warning.startswith(f"{packed / 'adapter_config.json'} describes an adapter, which is not applied")


def test_an_adapter_alone_is_refused(packed: Path) -> None:
    (packed / "adapter_config.json").write_text(json.dumps(ADAPTER))
    shutil.move(packed / WEIGHTS, packed / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"weights are missing: adapter_model\.safetensors holds those"):
        logits(packed)
    (packed / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapter \(adapter_config\.json\) without its base model"):
        load_model_config(packed)


def test_an_index_that_names_only_the_single_file(packed: Path) -> None:
    expected, before = logits(packed), fingerprint(packed)
    weight_map = dict.fromkeys(load_file(packed / WEIGHTS), WEIGHTS)
    (packed / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert torch.equal(logits(packed), expected)
    assert fingerprint(packed) != before
    (packed / INDEX).write_text(
        json.dumps({"weight_map": weight_map | {"lm_head.weight": "other.safetensors"}})
    )
    with pytest.raises(CheckpointError, match="has both"):
        logits(packed)
    del weight_map["lm_head.weight"]
    (packed / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"holds tensor lm_head\.weight, which .* does not list"):
        logits(packed)


def test_the_first_rank_logs_the_warnings(unpacked: Path, caplog: pytest.LogCaptureFixture) -> None:
    quantization(unpacked, {"quant_method": "mxfp4"})
    (unpacked / "adapter_config.json").write_text(json.dumps(ADAPTER))
    model = load_model_config(unpacked)
    shard = plan_shards(model, ParallelConfig())[0]
    config = EngineConfig(unpacked, dtype="float32", device="cpu", max_model_len=64)
    with caplog.at_level(logging.WARNING):
        Rank(config, model, shard, Alone(), device=CPU).load()
    logged = [record.getMessage() for record in caplog.records if record.name == "workers.rank.rank"]
    assert logged[:2] == checkpoint_warnings(unpacked)
