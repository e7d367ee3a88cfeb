"""The same model as Hugging Face MXFP4, bf16 and OpenAI's own layout: the same logits, on one rank
and on several."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GptOssForCausalLM

from tests.support.checkpoint_formats import read_weights, write_bf16, write_original
from tests.support.model_steps import random_tokens, whole_prompt_logits
from tests.support.thread_ranks import ThreadRank, on_ranks
from workers.config import ModelConfig, ParallelConfig
from workers.errors import CheckpointError, ConfigError
from workers.model.checkpoint import LoadOptions, load_model
from workers.model.gpt_oss import GptOss
from workers.model.make_checkpoint import write_checkpoint
from workers.model.stored_model import fingerprint
from workers.model_config import load_model_config
from workers.parallel.shard import plan_shards

# 8 query and 4 key-value heads, 6 experts, 5 groups of columns: nothing divides anything else by
# chance.
CONFIG = ModelConfig(
    vocab_size=77,
    hidden_size=96,
    intermediate_size=160,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=12,
    num_experts=6,
    num_experts_per_token=2,
    layer_windows=(16, None),
    max_context_len=131072,
)
TOKENS = random_tokens(CONFIG, 50, seed=4)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("formats")
    write_checkpoint(folder / "mxfp4", CONFIG, seed=3)
    return {
        "mxfp4": folder / "mxfp4",
        "bf16": write_bf16(folder / "mxfp4", folder / "bf16", CONFIG),
        "original": write_original(folder / "mxfp4", folder / "download" / "original", CONFIG),
    }


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: object) -> GptOss:
    return load_model(folder, load_model_config(folder), dtype=dtype, device=CPU, **options)  # type: ignore[arg-type]


def logits(folder: Path, dtype: torch.dtype = torch.float32, **options: object) -> torch.Tensor:
    return whole_prompt_logits(load(folder, dtype, **options), TOKENS)


def test_openais_layout_is_the_same_model(folders: dict[str, Path]) -> None:
    config = load_model_config(folders["original"])
    assert config == replace(CONFIG, layout="original")
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(logits(folders["original"], dtype), logits(folders["mxfp4"], dtype))


def test_the_folder_around_openais_layout_will_do(folders: dict[str, Path]) -> None:
    around = folders["original"].parent
    assert load_model_config(around).layout == "original"
    assert torch.equal(logits(around), logits(folders["mxfp4"]))
    assert fingerprint(around) == fingerprint(folders["original"]) != fingerprint(folders["mxfp4"])


def test_bf16_experts_are_the_same_model(folders: dict[str, Path]) -> None:
    # Every MXFP4 value is a bf16 value; the sums run in another order.
    exact = logits(folders["mxfp4"])
    torch.testing.assert_close(logits(folders["bf16"]), exact, atol=1e-4, rtol=0)
    # In bf16 the MXFP4 kernels may round between the projections too, and a near-tie of the gate
    # may go either way; each is as far from fp32 as eight bits make it.
    for name in ("bf16", "mxfp4"):
        assert (logits(folders[name], torch.bfloat16) - exact).norm() < 0.05 * exact.norm()


def test_scales_of_a_kv_cache_beside_bf16_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    """The files are as llm-compressor writes them: the config names a quantiser, no weight is
    quantised."""
    folder = shutil.copytree(folders["bf16"], tmp_path / "calibrated")
    fields = json.loads((folder / "config.json").read_text())
    scheme = {"dynamic": False, "num_bits": 8, "strategy": "tensor", "symmetric": True, "type": "float"}
    fields["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "config_groups": {},
        "kv_cache_scheme": scheme,
    }
    (folder / "config.json").write_text(json.dumps(fields))
    (file,) = folder.glob("*.safetensors")
    scales = {
        f"model.layers.{layer}.self_attn.{kind}_scale": torch.tensor([0.5 + layer])
        for layer in (0, 1)
        for kind in "kv"
    }
    save_file(load_file(file) | scales, file)
    found = [layer.attention.kv_scales for layer in load(folder).layers]
    assert [None if scales is None else scales.tolist() for scales in found] == [
        [[0.5] * 4] * 2,
        [[1.5] * 4] * 2,
    ]
    assert torch.equal(logits(folder), logits(folders["bf16"])), "without effect on a cache that is not fp8"


def test_quantising_what_was_unpacked_gives_it_back(folders: dict[str, Path]) -> None:
    assert (
        load(folders["bf16"]).weight_bytes
        > load(folders["bf16"], options=LoadOptions(quantize="mxfp4")).weight_bytes
    )
    torch.testing.assert_close(
        logits(folders["bf16"], options=LoadOptions(quantize="mxfp4")),
        logits(folders["mxfp4"]),
        atol=0,
        rtol=0,
    )
    assert torch.equal(
        logits(folders["mxfp4"], options=LoadOptions(quantize="mxfp4")), logits(folders["mxfp4"])
    )


def test_transformers_reads_the_bf16_form_the_same(folders: dict[str, Path]) -> None:
    model = GptOssForCausalLM.from_pretrained(
        folders["bf16"], dtype=torch.float32, attn_implementation="eager"
    )
    with torch.inference_mode():
        expected = model(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(logits(folders["bf16"]), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("plan", [(2, 2), (4, 2), (2, 1), (4, 1)], ids=str)
@pytest.mark.parametrize(("name", "quantize"), [("original", None), ("bf16", None), ("bf16", "mxfp4")])
def test_every_format_can_be_sharded(
    folders: dict[str, Path], name: str, quantize: Literal["mxfp4"] | None, plan: tuple[int, int]
) -> None:
    def work(rank: ThreadRank) -> torch.Tensor:
        shard = plan_shards(CONFIG, ParallelConfig(*plan))[rank.rank]
        return logits(folders[name], shard=shard, collectives=rank, options=LoadOptions(quantize=quantize))

    torch.testing.assert_close(on_ranks(plan[0], work)[0], logits(folders["mxfp4"]), atol=1e-4, rtol=0)


def copied(folder: Path, to: Path) -> Path:
    to.mkdir(parents=True)
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_blocks_without_scales_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    broken = copied(folders["mxfp4"], tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    del weights["model.layers.1.mlp.experts.down_proj_scales"]
    save_file(weights, broken / "model.safetensors")
    with pytest.raises(
        CheckpointError,
        match=r"tensor model\.layers\.1\.mlp\.experts\.down_proj_scales of shape \[6, 96, 5\] is missing",
    ):
        load(broken)


def test_a_bf16_expert_between_packed_ones_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    broken = copied(folders["mxfp4"], tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    stem = "model.layers.0.mlp.experts.down_proj"
    weights[stem] = read_weights(folders["bf16"])[stem]
    save_file(weights, broken / "model.safetensors")
    with pytest.raises(
        CheckpointError,
        match=rf"broken/model\.safetensors: tensor {stem} of shape \[6, 160, 96\] is not part of the model",
    ):
        load(broken)


def test_a_config_of_the_other_layout_is_refused_by_the_first_tensor(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    mixed = copied(folders["mxfp4"], tmp_path / "mixed")
    (mixed / "config.json").write_bytes((folders["original"] / "config.json").read_bytes())
    with pytest.raises(
        CheckpointError,
        match=r"mixed/model\.safetensors: tensor embedding\.weight of shape \[77, 96\] is missing",
    ):
        load(mixed)


def test_openais_files_are_checked_like_others(folders: dict[str, Path], tmp_path: Path) -> None:
    broken = copied(folders["original"], tmp_path / "original")
    file = broken / "model--00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model--00002-of-00002\.safetensors is truncated: tensor"):
        load(broken)


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_experts", None), ("head_dim", "x"), ("rope_theta", 0), ("initial_context_length", -1)],
)
def test_openais_config_is_checked(
    folders: dict[str, Path], tmp_path: Path, field: str, value: object
) -> None:
    broken = copied(folders["original"], tmp_path / "original")
    fields = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(fields | {field: value}))
    with pytest.raises(
        CheckpointError,
        match=r"config\.json: .*(num_local_experts|head_dim|rope_theta|initial_context_length)",
    ):
        load_model_config(broken)


def test_sizes_that_cannot_be_quantised_are_refused(tmp_path: Path) -> None:
    config = replace(CONFIG, experts_format="bf16", hidden_size=100)
    write_checkpoint(tmp_path / "odd", config, seed=0)
    with pytest.raises(
        ConfigError,
        match=r"quantize mxfp4 needs a hidden_size that is .* 32, .* 100",
    ):
        load(tmp_path / "odd", options=LoadOptions(quantize="mxfp4"))
