"""Loaded weights equal stored ones, and every damaged or foreign checkpoint ends in one sentence
naming file and tensor."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kernels.cpu.dense import unpack
from kernels.linear import PackedWeight
from kernels.mxfp4 import WGMMA, to_natural
from workers.config import ModelConfig, ParallelConfig
from workers.errors import CheckpointError
from workers.model import expert_loader
from workers.model.checkpoint import load_model
from workers.model.gpt_oss import GptOss
from workers.model.linear import Linear
from workers.model.make_checkpoint import write_checkpoint
from workers.model.stored_model import fingerprint
from workers.parallel.shard import plan_shards

CONFIG = ModelConfig(
    vocab_size=70,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    num_experts=5,
    num_experts_per_token=2,
    layer_windows=(16, None),
    max_context_len=1024,
)
BF16_CONFIG = replace(CONFIG, experts_format="bf16")
Q_WEIGHT = "model.layers.1.self_attn.q_proj.weight"
BLOCKS = "model.layers.0.mlp.experts.down_proj_blocks"
SCALES = "model.layers.0.mlp.experts.down_proj_scales"
INDEX = "model.safetensors.index.json"
CPU = torch.device("cpu")


def load(path: Path, config: ModelConfig = CONFIG, dtype: torch.dtype = torch.float32) -> GptOss:
    return load_model(path, config, dtype=dtype, device=CPU)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Return a checkpoint of one file."""
    write_checkpoint(tmp_path / "model", CONFIG, seed=1)
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Return a checkpoint of several files and an index."""
    write_checkpoint(tmp_path / "sharded", CONFIG, seed=1, max_shard_bytes=60_000)
    return tmp_path / "sharded"


def weights(path: Path) -> dict[str, Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def change(path: Path, edit: Callable[[dict[str, Tensor]], object], file: str = "model.safetensors") -> None:
    """Rewrite one file with its tensors edited."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path / file).items()}
    edit(tensors)
    save_file(tensors, path / file)


def change_index(path: Path, edit: Callable[[dict[str, str]], object]) -> None:
    raw = json.loads((path / INDEX).read_text())
    edit(raw["weight_map"])
    (path / INDEX).write_text(json.dumps(raw))


def refusal(path: Path, *named: str, config: ModelConfig = CONFIG) -> str:
    """Return the message of the refusal; it is one sentence and has each of `named`."""
    with pytest.raises(CheckpointError) as caught:
        load(path, config)
    message = str(caught.value)
    assert "\n" not in message
    for part in (path.name, *named):
        assert part in message
    return message


def values(linear: Linear) -> Tensor:
    """Return a layer's weight, unpacked where it is packed."""
    return unpack(linear.weight).bfloat16() if isinstance(linear.weight, PackedWeight) else linear.weight


class TestLoaded:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_dense_weights_in_the_model_dtype(self, checkpoint: Path, dtype: torch.dtype) -> None:
        stored = weights(checkpoint)
        model = load(checkpoint, dtype=dtype)
        assert torch.equal(model.embedding, stored["model.embed_tokens.weight"].to(dtype))
        assert torch.equal(values(model.lm_head), stored["lm_head.weight"].to(dtype))
        assert torch.equal(model.final_norm, stored["model.norm.weight"].to(dtype))
        for number, layer in enumerate(model.layers):
            prefix = f"model.layers.{number}."
            qkv = [stored[f"{prefix}self_attn.{name}_proj.weight"] for name in "qkv"]
            assert torch.equal(values(layer.attention.qkv), torch.cat(qkv).to(dtype))
            biases = [stored[f"{prefix}self_attn.{name}_proj.bias"] for name in "qkv"]
            assert torch.equal(layer.attention.qkv.bias, torch.cat(biases).to(dtype))
            assert torch.equal(
                values(layer.attention.output), stored[f"{prefix}self_attn.o_proj.weight"].to(dtype)
            )
            assert torch.equal(layer.attention.sinks, stored[f"{prefix}self_attn.sinks"].float())
            assert torch.equal(layer.attention_norm, stored[f"{prefix}input_layernorm.weight"].to(dtype))
            assert torch.equal(
                layer.experts_norm, stored[f"{prefix}post_attention_layernorm.weight"].to(dtype)
            )
            assert torch.equal(layer.experts.gate.weight, stored[f"{prefix}mlp.router.weight"].float())
            assert torch.equal(
                layer.experts.weights.gate_up_bias, stored[f"{prefix}mlp.experts.gate_up_proj_bias"].to(dtype)
            )
            assert torch.equal(
                layer.experts.weights.down_bias, stored[f"{prefix}mlp.experts.down_proj_bias"].to(dtype)
            )
            assert layer.attention.window == CONFIG.layer_windows[number]

    def test_mxfp4_experts_stay_packed(self, checkpoint: Path) -> None:
        stored = weights(checkpoint)
        for number, layer in enumerate(load(checkpoint).layers):
            for name, packed in (
                ("gate_up_proj", layer.experts.weights.gate_up),
                ("down_proj", layer.experts.weights.down),
            ):
                blocks, scales = to_natural(packed)
                assert torch.equal(blocks, stored[f"model.layers.{number}.mlp.experts.{name}_blocks"])
                assert torch.equal(scales, stored[f"model.layers.{number}.mlp.experts.{name}_scales"])
            assert layer.experts.weights.gate_up.shape == (5, 192, 64)
            assert layer.experts.weights.down.shape == (5, 64, 96)

    def test_unpacked_experts_are_turned_output_first(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path / "bf16", BF16_CONFIG, seed=1)
        stored = weights(tmp_path / "bf16")
        for number, layer in enumerate(load(tmp_path / "bf16", BF16_CONFIG).layers):
            for name, dense in (
                ("gate_up_proj", layer.experts.weights.gate_up),
                ("down_proj", layer.experts.weights.down),
            ):
                assert torch.equal(
                    dense, stored[f"model.layers.{number}.mlp.experts.{name}"].transpose(1, 2).float()
                )

    def test_shards_give_the_same_model(self, checkpoint: Path, sharded: Path) -> None:
        assert len(list(sharded.glob("*.safetensors"))) > 3
        assert torch.equal(
            load(sharded).layers[1].attention.qkv.weight, load(checkpoint).layers[1].attention.qkv.weight
        )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_other_floating_point_files_load(self, checkpoint: Path, dtype: torch.dtype) -> None:
        change(
            checkpoint, lambda tensors: tensors.update({Q_WEIGHT: torch.full((48, 64), 1 / 3, dtype=dtype)})
        )
        assert torch.equal(
            load(checkpoint).layers[1].attention.qkv.weight[:48],
            torch.full((48, 64), 1 / 3, dtype=dtype).float(),
        )

    def test_progress_counts_up_to_the_end(self, sharded: Path) -> None:
        seen: list[tuple[int, int]] = []
        load_model(
            sharded,
            CONFIG,
            dtype=torch.bfloat16,
            device=CPU,
            progress=lambda done, total: seen.append((done, total)),
        )
        assert seen == [(done, len(seen)) for done in range(1, len(seen) + 1)]
        assert len(seen) > CONFIG.num_layers

    def test_model_does_not_need_the_files_any_more(self, checkpoint: Path) -> None:
        model = load(checkpoint, dtype=torch.bfloat16)
        blocks = to_natural(model.layers[0].experts.weights.down)[0].clone()
        embedding = model.embedding.clone()
        with (checkpoint / "model.safetensors").open("r+b") as file:
            size = file.seek(0, 2)
            file.seek(0)
            file.write(b"\xff" * size)
        assert torch.equal(to_natural(model.layers[0].experts.weights.down)[0], blocks)
        assert torch.equal(model.embedding, embedding)


class TestWrongTensors:
    def test_missing(self, checkpoint: Path) -> None:
        change(checkpoint, lambda tensors: tensors.pop(Q_WEIGHT))
        refusal(checkpoint, "model.safetensors", Q_WEIGHT, "[48, 64]", "missing")

    def test_unknown(self, checkpoint: Path) -> None:
        change(checkpoint, lambda tensors: tensors.update(extra_bias=torch.zeros(3)))
        refusal(checkpoint, "model.safetensors", "extra_bias", "[3]")

    def test_more_layers_than_the_config_says(self, checkpoint: Path) -> None:
        refusal(checkpoint, "model.layers.1.", config=replace(CONFIG, num_layers=1, layer_windows=(16,)))

    def test_fewer_layers_than_the_config_says(self, checkpoint: Path) -> None:
        refusal(
            checkpoint,
            "model.layers.2.input_layernorm.weight",
            config=replace(CONFIG, num_layers=3, layer_windows=(16, None, 16)),
        )

    def test_packed_experts_where_the_config_says_bf16(self, checkpoint: Path) -> None:
        refusal(checkpoint, "model.layers.0.mlp.experts.gate_up_proj ", "missing", config=BF16_CONFIG)

    def test_shape(self, checkpoint: Path) -> None:
        change(
            checkpoint, lambda tensors: tensors.update({Q_WEIGHT: torch.zeros(64, 48, dtype=torch.bfloat16)})
        )
        refusal(checkpoint, "model.safetensors", Q_WEIGHT, "[64, 48]", "[48, 64]")

    def test_shape_of_unpacked_experts(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path / "bf16", BF16_CONFIG, seed=1)
        name = "model.layers.0.mlp.experts.down_proj"
        change(
            tmp_path / "bf16",
            lambda tensors: tensors.update({name: tensors[name].transpose(1, 2).contiguous()}),
        )
        refusal(tmp_path / "bf16", name, "[5, 64, 96]", "[5, 96, 64]", config=BF16_CONFIG)

    @pytest.mark.parametrize(
        ("name", "dtype", "stored", "wanted"),
        [
            (Q_WEIGHT, torch.float64, "F64", "BF16 or F16 or F32"),
            (Q_WEIGHT, torch.uint8, "U8", "BF16"),
            (BLOCKS, torch.int8, "I8", "U8"),
            (SCALES, torch.bfloat16, "BF16", "U8"),
        ],
    )
    def test_dtype(self, checkpoint: Path, name: str, dtype: torch.dtype, stored: str, wanted: str) -> None:
        change(checkpoint, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
        refusal(checkpoint, "model.safetensors", name, f"dtype {stored}", wanted)

    def test_nan_scale(self, checkpoint: Path) -> None:
        change(checkpoint, lambda tensors: tensors[SCALES][3, 7].fill_(255))
        refusal(checkpoint, "model.safetensors", SCALES, "255", "[3, 7, 0]")

    def test_scale_that_the_layout_cannot_hold(
        self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(expert_loader, "choose_layout", lambda device: WGMMA)
        change(checkpoint, lambda tensors: tensors[SCALES][3, 7].fill_(128))
        load(checkpoint)
        change(checkpoint, lambda tensors: tensors[SCALES][3, 7].fill_(129))
        refusal(checkpoint, "model.safetensors", BLOCKS, "scales must be at most 128", WGMMA, "found 129")

    def test_largest_scale_of_finite_values(self, checkpoint: Path) -> None:
        change(checkpoint, lambda tensors: tensors[SCALES][3, 7].fill_(252))
        load(checkpoint)
        change(checkpoint, lambda tensors: tensors[SCALES][3, 7].fill_(253))
        refusal(checkpoint, "model.safetensors", SCALES, "253", "[3, 7, 0]")


class TestDamagedFiles:
    def test_cut_off_inside_a_tensor(self, checkpoint: Path) -> None:
        file = checkpoint / "model.safetensors"
        content = file.read_bytes()
        file.write_bytes(content[:-100])
        refusal(
            checkpoint,
            "model.safetensors",
            "lm_head.weight",
            "truncated",
            str(len(content)),
            str(len(content) - 100),
        )

    @pytest.mark.parametrize("length", [0, 5, 8, 300])
    def test_cut_off_inside_the_header(self, checkpoint: Path, length: int) -> None:
        file = checkpoint / "model.safetensors"
        file.write_bytes(file.read_bytes()[:length])
        refusal(checkpoint, "model.safetensors", "truncated", f"{length} bytes")

    def test_surplus_bytes(self, checkpoint: Path) -> None:
        with (checkpoint / "model.safetensors").open("ab") as file:
            file.write(b"surplus")
        refusal(checkpoint, "model.safetensors", "7 bytes after")

    def test_git_lfs_pointer(self, checkpoint: Path) -> None:
        (checkpoint / "model.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 4792272488\n"
        )
        refusal(checkpoint, "model.safetensors", "Git LFS")

    @pytest.mark.parametrize(
        "header",
        [
            b"not json",
            b"[]",
            b'{"a": 3}',
            b'{"a": {"dtype": "BF16", "shape": [2]}}',
            b'{"a": {"dtype": "BF16", "shape": "2", "data_offsets": [0, 4]}}',
            b'{"a": {"dtype": "BF16", "shape": [-2], "data_offsets": [0, 4]}}',
            b'{"a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4, 8]}}',
            b'{"a": {"dtype": "BF16", "shape": [2], "data_offsets": [4, 0]}}',
            b'{"a": {"dtype": "BF16", "shape": [2.0], "data_offsets": [0, 4]}}',
            b"\xff\xfe",
            b"[" * 100_000,
        ],
    )
    def test_broken_header(self, checkpoint: Path, header: bytes) -> None:
        (checkpoint / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
        refusal(checkpoint, "model.safetensors", "broken safetensors header")

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            ('"shape":[3],"data_offsets":[0,4]', "has 4 bytes, expected 6"),
            ('"shape":[2],"data_offsets":[2,6]', "begins at byte"),
        ],
    )
    def test_header_that_does_not_add_up(self, checkpoint: Path, entry: str, message: str) -> None:
        header = f'{{"a":{{"dtype":"BF16",{entry}}}}}'.encode()
        (checkpoint / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 6)
        refusal(checkpoint, "model.safetensors", "tensor a", message)

    def test_no_weights(self, checkpoint: Path) -> None:
        (checkpoint / "model.safetensors").unlink()
        refusal(checkpoint, "model.safetensors", INDEX, "missing")

    def test_no_folder(self, tmp_path: Path) -> None:
        refusal(tmp_path / "nowhere", "not a folder")


class TestIndex:
    def test_file_is_missing(self, sharded: Path) -> None:
        missing = sorted(sharded.glob("*.safetensors"))[2]
        missing.unlink()
        refusal(sharded, missing.name, "missing")

    def test_tensor_is_in_another_file(self, sharded: Path) -> None:
        files = sorted(file.name for file in sharded.glob("*.safetensors"))
        change_index(sharded, lambda weight_map: weight_map.update({"model.embed_tokens.weight": files[-1]}))
        refusal(sharded, INDEX, "model.embed_tokens.weight", files[0], files[-1])

    def test_tensor_is_nowhere(self, sharded: Path) -> None:
        files = sorted(file.name for file in sharded.glob("*.safetensors"))
        change_index(sharded, lambda weight_map: weight_map.update({"ghost": files[1]}))
        refusal(sharded, files[1], "ghost")

    def test_tensor_is_not_listed(self, sharded: Path) -> None:
        change_index(sharded, lambda weight_map: weight_map.pop(Q_WEIGHT))
        refusal(sharded, Q_WEIGHT, INDEX)

    def test_tensor_is_in_two_files(self, sharded: Path) -> None:
        files = sorted(file.name for file in sharded.glob("*.safetensors"))
        change(
            sharded, lambda tensors: tensors.update({"model.embed_tokens.weight": torch.zeros(2)}), files[1]
        )
        refusal(sharded, files[0], files[1], "model.embed_tokens.weight")

    @pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", "sub/model.safetensors", ""])
    def test_file_outside_the_folder(self, sharded: Path, name: str) -> None:
        change_index(sharded, lambda weight_map: weight_map.update({Q_WEIGHT: name}))
        refusal(sharded, INDEX, Q_WEIGHT, "not the name of a file")

    @pytest.mark.parametrize(
        "content",
        [
            "{",
            "[]",
            "{}",
            '{"weight_map": {}}',
            '{"weight_map": {"a": 3}}',
            '{"weight_map": ["a"]}',
            "[" * 100_000,
        ],
    )
    def test_is_no_index(self, sharded: Path, content: str) -> None:
        (sharded / INDEX).write_text(content)
        refusal(sharded, INDEX)

    def test_single_file_beside_the_index(self, sharded: Path) -> None:
        shutil.copy(next(sharded.glob("*.safetensors")), sharded / "model.safetensors")
        refusal(sharded, INDEX, "both")


class TestFingerprint:
    def test_copy_has_the_same(self, sharded: Path, tmp_path: Path) -> None:
        shutil.copytree(sharded, tmp_path / "copy")
        assert fingerprint(tmp_path / "copy") == fingerprint(sharded)
        assert re.fullmatch("[0-9a-f]{64}", fingerprint(sharded))

    def test_other_weights_of_the_same_shape(self, checkpoint: Path) -> None:
        before = fingerprint(checkpoint)
        change(checkpoint, lambda tensors: None)
        same_weights_other_writer = fingerprint(checkpoint)
        change(checkpoint, lambda tensors: tensors[SCALES][0, 0].add_(1))
        assert len({before, same_weights_other_writer, fingerprint(checkpoint)}) == 3

    def test_seed_config_and_size_count(self, checkpoint: Path, tmp_path: Path) -> None:
        write_checkpoint(tmp_path / "seed", CONFIG, seed=2)
        write_checkpoint(tmp_path / "window", replace(CONFIG, layer_windows=(32, None)), seed=1)
        write_checkpoint(tmp_path / "vocab", replace(CONFIG, vocab_size=71), seed=1)
        prints = {fingerprint(tmp_path / name) for name in ("model", "seed", "window", "vocab")}
        assert len(prints) == 4

    def test_damaged_file(self, checkpoint: Path) -> None:
        (checkpoint / "model.safetensors").write_bytes(b"xx")
        with pytest.raises(CheckpointError, match="truncated"):
            fingerprint(checkpoint)


class TestKVScales:
    """Scales of an fp8 KV cache, which a checkpoint may bring."""

    K, V = "model.layers.1.self_attn.k_scale", "model.layers.1.self_attn.v_scale"

    def test_one_for_all_heads_or_one_for_each(self, checkpoint: Path) -> None:
        change(
            checkpoint,
            lambda tensors: tensors.update(
                {self.K: torch.tensor(0.25), self.V: torch.tensor([0.5, 3.0]).bfloat16()}
            ),
        )
        layers = load(checkpoint).layers
        assert layers[0].attention.kv_scales is None
        scales = layers[1].attention.kv_scales
        assert scales is not None
        assert scales.dtype == torch.float32
        assert scales.tolist() == [[0.25, 0.25], [0.5, 3.0]]

    @pytest.mark.parametrize(
        "names",
        [
            ("k_proj.k_scale", "v_proj.v_scale"),
            ("k_proj.output_scale", "v_proj.output_scale"),
            ("attn.k_scale", "attn.v_scale"),
        ],
    )
    def test_by_the_names_that_other_quantisers_give_them(
        self, checkpoint: Path, names: tuple[str, str]
    ) -> None:
        k, v = (f"model.layers.0.self_attn.{name}" for name in names)
        change(
            checkpoint,
            lambda tensors: tensors.update(
                {k: torch.tensor([[0.25]]), v: torch.tensor([0.5, 3.0]).view(2, 1, 1)}
            ),
        )
        layers = load(checkpoint).layers
        scales = layers[0].attention.kv_scales
        assert scales is not None
        assert scales.tolist() == [[0.25, 0.25], [0.5, 3.0]]
        assert layers[1].attention.kv_scales is None

    def test_under_two_names_they_are_refused(self, checkpoint: Path) -> None:
        other = {
            "model.layers.1.self_attn.k_proj.k_scale": torch.tensor(1.0),
            "model.layers.1.self_attn.v_proj.v_scale": torch.tensor(1.0),
        }
        change(
            checkpoint,
            lambda tensors: tensors.update({self.K: torch.tensor(1.0), self.V: torch.tensor(1.0)} | other),
        )
        refusal(checkpoint, "both give a layer's scales")

    def test_a_rank_has_those_of_its_heads(self, checkpoint: Path) -> None:
        change(
            checkpoint,
            lambda tensors: tensors.update(
                {self.K: torch.tensor([0.5, 2.0]), self.V: torch.tensor([1.0, 4.0])}
            ),
        )
        found = []
        for shard in plan_shards(CONFIG, ParallelConfig(2, 1)):
            scales = (
                load_model(checkpoint, CONFIG, dtype=torch.float32, device=CPU, shard=shard)
                .layers[1]
                .attention.kv_scales
            )
            assert scales is not None
            found.append(scales.tolist())
        assert found == [[[0.5], [1.0]], [[2.0], [4.0]]]

    @pytest.mark.parametrize(
        ("k", "v", "named"),
        [
            (torch.tensor(1.0), None, "v_scale is missing"),
            (torch.ones(3), torch.ones(3), "expected floats of shape [], [1] or [2]"),
            (torch.tensor(1), torch.tensor(1), "I64"),
            (torch.tensor(0.0), torch.tensor(1.0), "positive"),
            (torch.tensor(1.0), torch.tensor(torch.inf), "positive"),
        ],
    )
    def test_bad_ones(self, checkpoint: Path, k: Tensor, v: Tensor | None, named: str) -> None:
        change(
            checkpoint, lambda tensors: tensors.update({self.K: k} if v is None else {self.K: k, self.V: v})
        )
        refusal(checkpoint, named)
