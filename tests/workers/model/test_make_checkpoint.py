"""Random checkpoints have exactly the published shapes, come out of little memory, and are whole or
not there."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM

from tests.support.model_steps import random_tokens, whole_prompt_logits
from workers.config import ModelConfig
from workers.errors import ConfigError
from workers.model.checkpoint import load_model
from workers.model.make_checkpoint import (
    DEFAULT_VOCAB,
    PRESETS,
    config_json,
    plan_checkpoint,
    preset_config,
    write_checkpoint,
)
from workers.model.tensor_specs import tensor_specs
from workers.model_config import load_model_config

SMALL = ModelConfig(
    vocab_size=70,
    hidden_size=64,
    intermediate_size=96,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    num_experts=5,
    num_experts_per_token=2,
    layer_windows=(16, None, 16),
    max_context_len=1024,
)


def stored(path: Path) -> dict[str, Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


class TestPresets:
    @pytest.mark.parametrize(
        ("preset", "total", "active", "gibibytes"),
        # arXiv 2508.10925, table 1, in billions; the size of the published MXFP4 weights in GiB.
        [("120b", 116.83, 5.13, 60.8), ("20b", 20.91, 3.61, 12.8)],
    )
    def test_published_totals(
        self, preset: str, total: float, active: float, gibibytes: float, tmp_path: Path
    ) -> None:
        summary = plan_checkpoint(preset_config(preset), seed=0).summary
        assert round(summary.parameters_total / 1e9, 2) == total
        assert round(summary.parameters_active / 1e9, 2) == active
        assert round(summary.num_bytes / 2**30, 1) == gibibytes
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("preset", "shape"),
        [
            ("tiny", (4, 256, 192, 8, 8, 2, 2048)),
            ("small", (12, 1024, 1024, 32, 16, 2, 201088)),
            ("20b", (24, 2880, 2880, 32, 64, 8, 201088)),
            ("120b", (36, 2880, 2880, 128, 64, 8, 201088)),
        ],
    )
    def test_shapes(self, preset: str, shape: tuple[int, ...], tmp_path: Path) -> None:
        config = preset_config(preset)
        assert shape == (
            config.num_layers,
            config.hidden_size,
            config.intermediate_size,
            config.num_experts,
            config.num_heads,
            config.num_kv_heads,
            config.vocab_size,
        )
        assert (config.head_dim, config.num_experts_per_token) == (64, 4)
        assert config.layer_windows[:4] == (128, None, 128, None)
        assert plan_checkpoint(preset_config(preset), seed=0).summary.parameters_total == sum(
            spec.num_parameters for spec in tensor_specs(config)
        )
        assert DEFAULT_VOCAB[preset] == shape[-1]

    def test_all_presets_are_tested(self) -> None:
        assert PRESETS == ("tiny", "small", "20b", "120b")

    def test_parameters_as_transformers_counts_them(self, tmp_path: Path) -> None:
        config = preset_config("tiny", num_layers=3)
        with torch.device("meta"):
            model = GptOssForCausalLM(GptOssConfig(**{**config_json(config), "quantization_config": None}))
        total = plan_checkpoint(preset_config("tiny", num_layers=3), seed=0).summary.parameters_total
        assert total == sum(parameter.numel() for parameter in model.parameters())

    def test_config_json_has_the_published_fields(self) -> None:
        assert config_json(preset_config("120b")) == {
            "architectures": ["GptOssForCausalLM"],
            "attention_bias": True,
            "attention_dropout": 0.0,
            "eos_token_id": 200002,
            "experts_per_token": 4,
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 2880,
            "initial_context_length": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 2880,
            "layer_types": ["sliding_attention", "full_attention"] * 18,
            "max_position_embeddings": 131072,
            "model_type": "gpt_oss",
            "num_attention_heads": 64,
            "num_experts_per_tok": 4,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "num_local_experts": 128,
            "output_router_logits": False,
            "pad_token_id": 199999,
            "quantization_config": {
                "modules_to_not_convert": [
                    "model.layers.*.self_attn",
                    "model.layers.*.mlp.router",
                    "model.embed_tokens",
                    "lm_head",
                ],
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
            "router_aux_loss_coef": 0.9,
            "sliding_window": 128,
            "swiglu_limit": 7.0,
            "tie_word_embeddings": False,
            "use_cache": True,
            "vocab_size": 201088,
        }

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            ({"preset": "huge"}, "'huge'"),
            ({"vocab_size": 0}, "vocab must be at least 1, got 0"),
            ({"num_layers": -1}, "layers must be at least 1, got -1"),
            ({"seed": -1}, "seed"),
            ({"vocab_size": 100, "stop_token_ids": [3, 100]}, "100 is outside"),
        ],
    )
    def test_impossible_arguments(self, tmp_path: Path, arguments: dict[str, object], named: str) -> None:
        seed = arguments.pop("seed", 0)
        with pytest.raises(ConfigError, match=named):
            write_checkpoint(tmp_path / "out", preset_config(**{"preset": "tiny", **arguments}), seed=seed)
        assert list(tmp_path.iterdir()) == []


class TestFiles:
    @pytest.mark.parametrize("max_shard_bytes", [100_000, 10**9])
    def test_summary_is_what_is_there(self, tmp_path: Path, max_shard_bytes: int) -> None:
        summary = write_checkpoint(tmp_path / "out", SMALL, seed=0, max_shard_bytes=max_shard_bytes)
        assert {file.name: file.num_bytes for file in summary.files} == {
            file.name: file.stat().st_size for file in (tmp_path / "out").iterdir()
        }
        assert [file.name for file in tmp_path.iterdir()] == ["out"]

    def test_tensors_are_those_of_the_table(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path / "out", SMALL, seed=0)
        with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
            assert file.metadata() == {"format": "pt", "seed": "0"}
            found = {
                name: (file.get_slice(name).get_dtype(), tuple(file.get_slice(name).get_shape()))
                for name in file.keys()  # noqa: SIM118
            }
        assert found == {
            spec.name: ("BF16" if spec.kind == "dense" else "U8", spec.shape) for spec in tensor_specs(SMALL)
        }

    def test_index_lists_each_tensor_where_it_is(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        write_checkpoint(out, SMALL, seed=0, max_shard_bytes=100_000)
        index = json.loads((out / "model.safetensors.index.json").read_text())
        shards = sorted(file.name for file in out.glob("*.safetensors"))
        assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
        found = {name: shard for shard in shards for name in load_file(out / shard)}
        assert index["weight_map"] == found
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored(out).values())
        for shard in shards:
            tensors = load_file(out / shard)
            assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 100_000

    def test_config_reads_back(self, tmp_path: Path) -> None:
        config = replace(SMALL, stop_token_ids=(5, 6), swiglu_alpha=1.5, rms_norm_eps=1e-6)
        write_checkpoint(tmp_path / "out", config, seed=0)
        assert load_model_config(tmp_path / "out") == replace(config, stop_token_ids=(5,))
        assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [5, 6]

    @pytest.mark.parametrize("experts_format", ["mxfp4", "bf16"])
    def test_preset_loads_and_its_logits_are_sane(self, tmp_path: Path, experts_format: str) -> None:
        write_checkpoint(tmp_path / "tiny", preset_config("tiny", experts_format=experts_format), seed=0)
        config = load_model_config(tmp_path / "tiny")
        model = load_model(tmp_path / "tiny", config, dtype=torch.float32, device=torch.device("cpu"))
        logits = whole_prompt_logits(model, random_tokens(config, 100, seed=0))
        assert 0.5 < logits.std() < 2
        assert len(set(logits.argmax(dim=-1).tolist())) > 50

    def test_two_windows_cannot_be_written(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"layer_windows.*\[16, 32\]"):
            write_checkpoint(tmp_path / "out", replace(SMALL, layer_windows=(16, None, 32)), seed=0)


class TestSeed:
    def test_same_seed_same_tensors_whatever_the_files_and_layers(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path / "one", SMALL, seed=5)
        write_checkpoint(tmp_path / "many", SMALL, seed=5, max_shard_bytes=50_000)
        write_checkpoint(tmp_path / "fewer", replace(SMALL, num_layers=2, layer_windows=(16, None)), seed=5)
        one, many, fewer = (stored(tmp_path / name) for name in ("one", "many", "fewer"))
        assert one.keys() == many.keys() > fewer.keys()
        assert all(torch.equal(tensor, many[name]) for name, tensor in one.items())
        assert all(torch.equal(tensor, one[name]) for name, tensor in fewer.items())

    def test_other_seed_other_tensors(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path / "one", SMALL, seed=5)
        write_checkpoint(tmp_path / "two", SMALL, seed=6)
        two = stored(tmp_path / "two")
        assert not any(torch.equal(tensor, two[name]) for name, tensor in stored(tmp_path / "one").items())

    def test_no_two_tensors_share_their_bits(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path / "one", SMALL, seed=5)
        tensors = stored(tmp_path / "one")
        beginnings = {
            name: tuple(tensor.flatten()[:5].tolist())
            for name, tensor in tensors.items()
            if not name.endswith("_scales")
        }
        assert len(set(beginnings.values())) == len(beginnings)

    def test_every_part_is_random(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path / "one", SMALL, seed=5)
        for name, tensor in stored(tmp_path / "one").items():
            assert tensor.float().std() > 0, name
            assert tensor.dtype == torch.uint8 or (tensor != 0).any(), name
        assert (
            int(stored(tmp_path / "one")["model.layers.0.mlp.experts.down_proj_blocks"].unique().numel())
            == 256
        )

    def test_values_are_those_of_the_stream(self, tmp_path: Path) -> None:
        """A pin: a demo checkpoint of one seed is the same on every machine and with every later
        version."""
        write_checkpoint(tmp_path / "one", SMALL, seed=5)
        tensors = stored(tmp_path / "one")
        assert tensors["model.embed_tokens.weight"][0, :3].tolist() == [-1.703125, 0.95703125, 0.0908203125]
        assert tensors["model.layers.0.mlp.experts.down_proj_blocks"][0, 0, 0, :4].tolist() == [
            195,
            0,
            173,
            105,
        ]


class TestRefusals:
    def test_folder_that_is_not_empty(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes.txt").write_text("mine")
        with pytest.raises(ConfigError, match=r"out is not empty"):
            write_checkpoint(tmp_path / "out", SMALL, seed=0)
        assert [file.name for file in (tmp_path / "out").iterdir()] == ["notes.txt"]

    def test_path_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("mine")
        with pytest.raises(ConfigError, match=r"not a folder"):
            write_checkpoint(tmp_path / "out", SMALL, seed=0)
        assert (tmp_path / "out").read_text() == "mine"

    def test_parent_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        with pytest.raises(ConfigError, match=r"file.out"):
            write_checkpoint(tmp_path / "file" / "out", SMALL, seed=0)

    def test_empty_folder_and_new_parents_are_fine(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "out").mkdir()
        write_checkpoint(tmp_path / "out", SMALL, seed=0)
        write_checkpoint(tmp_path / "a" / "b" / "out", SMALL, seed=0)
        monkeypatch.chdir(tmp_path)
        write_checkpoint(Path("relative"), SMALL, seed=0)
        assert (tmp_path / "relative" / "config.json").is_file()

    def test_disk_too_small(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=7_000_000_000))
        with pytest.raises(ConfigError, match=r"takes 65\.25 GB .* has 7\.00 GB free"):
            write_checkpoint(tmp_path / "new" / "out", preset_config("120b"), seed=0)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("error", "raised"),
        [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "No space left"), ConfigError)],
    )
    def test_interrupted_run_leaves_nothing(
        self, tmp_path: Path, error: BaseException, raised: type[BaseException]
    ) -> None:
        def fail_half_way(done: int, total: int) -> None:
            if done > total / 2:
                raise error

        with pytest.raises(raised):
            write_checkpoint(tmp_path / "out", SMALL, seed=0, progress=fail_half_way)
        assert list(tmp_path.iterdir()) == []


def test_progress_counts_weight_bytes(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_checkpoint(
        tmp_path / "out",
        SMALL,
        seed=0,
        max_shard_bytes=100_000,
        progress=lambda done, total: seen.append((done, total)),
    )
    total = sum(tensor.nbytes for tensor in stored(tmp_path / "out").values())
    assert [entry[1] for entry in seen] == [total] * len(seen)
    assert [entry[0] for entry in seen] == sorted({entry[0] for entry in seen})
    assert seen[-1][0] == total


def test_added_files_are_there_when_the_checkpoint_appears(tmp_path: Path) -> None:
    def add(folder: Path) -> None:
        assert not (tmp_path / "out").exists()
        assert (folder / "config.json").is_file()
        (folder / "tokenizer.json").write_text("{}")

    write_checkpoint(tmp_path / "out", SMALL, seed=0, add_files=add)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def peak_memory(out: Path, arguments: str) -> tuple[int, int]:
    """Return (peak resident bytes, bytes written) of a fresh process that makes a checkpoint."""
    # Not getrusage: its maximum survives exec, so a child starts with the size of the process that
    # started it.
    code = (
        "import re, sys; from pathlib import Path; from workers.model.make_checkpoint import "
        "preset_config, write_checkpoint; "
        f"summary = write_checkpoint(Path(sys.argv[1]), preset_config({arguments}), seed=0); "
        r"peak = re.search(r'VmHWM:\s+(\d+) kB', Path('/proc/self/status').read_text()); "
        "print(int(peak[1]) * 1024, summary.num_bytes)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], check=True, capture_output=True, text=True, timeout=280
    )
    peak, num_bytes = map(int, done.stdout.split())
    return peak, num_bytes


@pytest.fixture
def big_folder(tmp_path: Path) -> Iterator[Path]:
    """Yield a place for a checkpoint of gigabytes, which is removed at once (pytest keeps
    tmp_path)."""
    yield tmp_path / "big"
    shutil.rmtree(tmp_path / "big", ignore_errors=True)


def test_streams_in_little_memory(big_folder: Path) -> None:
    peak, num_bytes = peak_memory(big_folder, "'20b', num_layers=2, vocab_size=4096")
    assert num_bytes > 800_000_000
    # Python with torch and numpy alone takes about 250 MB.
    assert peak < 400_000_000
    assert sum(file.stat().st_size for file in big_folder.iterdir()) == num_bytes


@pytest.mark.slow
def test_one_layer_of_120b_streams_in_little_memory(big_folder: Path) -> None:
    peak, num_bytes = peak_memory(big_folder, "'120b', num_layers=1")
    print(f"wrote {num_bytes} bytes with {peak} bytes of memory at most")
    assert num_bytes > 4_000_000_000
    assert peak < 400_000_000
    assert sum(file.stat().st_size for file in big_folder.iterdir()) == num_bytes
    with safe_open(big_folder / "model.safetensors", framework="pt") as file:
        assert file.get_slice("model.layers.0.mlp.experts.gate_up_proj_blocks").get_shape() == [
            128,
            5760,
            90,
            16,
        ]
        assert file.get_slice("model.layers.0.mlp.experts.down_proj_scales")[127, 2879].shape == (90,)
