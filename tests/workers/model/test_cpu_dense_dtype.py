"""int8 attention projections and lm_head: what is loaded, how large it is, how far its logits are
from those of bf16."""

from pathlib import Path

import pytest
import torch

from kernels.cpu import native
from kernels.linear import PackedWeight
from tests.support.model_steps import random_tokens, whole_prompt_logits
from workers.config import DenseDtype, EngineConfig, ModelConfig, ParallelConfig
from workers.errors import ConfigError
from workers.model.checkpoint import LoadOptions, load_model
from workers.model.gpt_oss import GptOss
from workers.model.make_checkpoint import write_checkpoint
from workers.model.sizes import rank_bytes
from workers.parallel.shard import plan_shards
from workers.rank.kernel_table import model_kernels

CONFIG = ModelConfig(
    vocab_size=77,
    hidden_size=96,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=12,
    num_experts=6,
    num_experts_per_token=2,
    layer_windows=(16, None),
    max_context_len=1024,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, CONFIG, seed=3)
    return folder


def load(folder: Path, cpu_dense_dtype: DenseDtype, dtype: torch.dtype = torch.bfloat16) -> GptOss:
    return load_model(
        folder,
        CONFIG,
        dtype=dtype,
        device=torch.device("cpu"),
        options=LoadOptions(cpu_dense_dtype=cpu_dense_dtype),
    )


def test_the_large_dense_weights_are_int8(folder: Path) -> None:
    model = load(folder, "int8")
    for linear in (model.lm_head, model.layers[1].attention.qkv, model.layers[1].attention.output):
        assert isinstance(linear.weight, PackedWeight)
        assert linear.weight.values.dtype == torch.int8
    assert model.layers[1].experts.gate.weight.dtype == torch.float32  # type: ignore[union-attr]
    assert model.embedding.dtype == torch.bfloat16
    (shard,) = plan_shards(CONFIG, ParallelConfig())
    assert model.weight_bytes == rank_bytes(CONFIG, shard, "bfloat16", cpu_dense_dtype="int8").total
    assert model.weight_bytes < load(folder, "bf16").weight_bytes
    assert model_kernels(model)["dense layers"].layout == "packed int8"


def test_logits_stay_close(folder: Path) -> None:
    tokens = random_tokens(CONFIG, 50, seed=4)
    exact = whole_prompt_logits(load(folder, "bf16", torch.float32), tokens)
    # A weight is off by 0.6 % of the row's mean magnitude; a near-tie of the gate may go either
    # way.
    assert (whole_prompt_logits(load(folder, "int8"), tokens) - exact).norm() < 0.08 * exact.norm()


def test_int8_is_refused_where_it_cannot_be_had(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigError,
        match=r"^engine\.cpu_dense_dtype int8 needs dtype bfloat16 and device cpu, "
        r"got dtype float32 and device cpu$",
    ):
        EngineConfig(folder, dtype="float32", cpu_dense_dtype="int8")
    with pytest.raises(ConfigError, match=r"got dtype bfloat16 and device cuda:1$"):
        EngineConfig(folder, device="cuda:1", cpu_dense_dtype="int8")
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    native._loaded.cache_clear()
    try:
        with pytest.raises(
            ConfigError, match=r"no kernels: the C\+\+ kernels were not built: install a C\+\+ compiler"
        ):
            load(folder, "int8")
    finally:
        native._loaded.cache_clear()
