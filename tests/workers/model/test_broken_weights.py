"""Weights that load and would make noise: zeros where there should be values, values that are not
finite."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.checkpoint_formats import write_bf16, write_original
from tests.support.thread_ranks import ThreadRank, on_ranks
from tests.support.tiny_model import TINY, write_tiny_checkpoint
from workers.config import CacheConfig, EngineConfig, ParallelConfig
from workers.errors import CheckpointError
from workers.executor.inline import InlineExecutor
from workers.kv_cache.memory import plan_kv_cache
from workers.model.checkpoint import LoadOptions, load_model
from workers.model_config import load_model_config
from workers.parallel.shard import plan_shards
from workers.rank.rank import Rank

CPU = torch.device("cpu")
LAYER = "model.layers.1."
Q, HEAD, NORM = f"{LAYER}self_attn.q_proj.weight", "lm_head.weight", f"{LAYER}input_layernorm.weight"
BLOCKS, SCALES = f"{LAYER}mlp.experts.down_proj_blocks", f"{LAYER}mlp.experts.down_proj_scales"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound, tmp_path / "model")
    return tmp_path / "model"


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    for file in folder.glob("*.safetensors"):
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        edit(tensors)
        save_file(tensors, file, {"format": "pt"})


def start(folder: Path, *, allow_zero_weights: bool = False) -> None:
    config = EngineConfig(
        folder,
        dtype="float32",
        max_model_len=64,
        cache=CacheConfig(4 << 20),
        allow_zero_weights=allow_zero_weights,
    )
    executor = InlineExecutor(config, TINY)
    try:
        executor.start()
        logits = executor.logits([1, 2, 3])
        assert bool(logits.isfinite().all())
        assert float(logits.std(-1).min()) > 0
    finally:
        executor.shutdown()


def test_a_sound_checkpoint_starts(folder: Path) -> None:
    start(folder)


ZEROS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "a projection": (lambda tensors: tensors[Q].zero_(), f"tensor {Q} is all zeros;"),
    "the output head": (lambda tensors: tensors[HEAD].zero_(), f"tensor {HEAD} is all zeros;"),
    "the embedding": (
        lambda tensors: tensors["model.embed_tokens.weight"].zero_(),
        "tensor model.embed_tokens.weight is all zeros;",
    ),
    "the gate": (
        lambda tensors: tensors[f"{LAYER}mlp.router.weight"].zero_(),
        f"tensor {LAYER}mlp.router.weight is all zeros;",
    ),
    "a norm": (lambda tensors: tensors[NORM].zero_(), f"tensor {NORM} is all zeros;"),
    "an expert": (lambda tensors: tensors[BLOCKS][3].zero_(), f"tensor {BLOCKS} is all zeros in expert 3;"),
    "an expert of negative zeros": (
        lambda tensors: tensors[BLOCKS][3].fill_(0x88),
        f"tensor {BLOCKS} is all zeros in expert 3;",
    ),
    "an expert's scales": (
        lambda tensors: tensors[SCALES][0].zero_(),
        f"tensor {SCALES} is all zeros in expert 0;",
    ),
}


@pytest.mark.parametrize("fault", list(ZEROS))
def test_zeros_are_refused_unless_they_are_allowed(folder: Path, fault: str) -> None:
    edit, said = ZEROS[fault]
    change(folder, edit)
    with pytest.raises(CheckpointError) as caught:
        start(folder)
    assert str(caught.value).startswith(str(folder))
    assert said in str(caught.value)
    assert "--allow-zero-weights" in str(caught.value)
    assert "\n" not in str(caught.value)
    load_model(folder, TINY, dtype=torch.float32, device=CPU, options=LoadOptions(allow_zero_weights=True))
    if fault not in ("the output head", "the embedding"):  # those make all logits the same
        start(folder, allow_zero_weights=True)


@pytest.mark.parametrize(
    "name", [f"{LAYER}self_attn.q_proj.bias", f"{LAYER}self_attn.sinks", f"{LAYER}mlp.experts.down_proj_bias"]
)
def test_biases_and_sinks_may_be_zeros(folder: Path, name: str) -> None:
    change(folder, lambda tensors: tensors[name].zero_())
    start(folder)


def test_one_row_of_values_is_enough(folder: Path) -> None:
    """Vocabularies have unused rows; a matrix may begin with them."""
    change(folder, lambda tensors: [tensors[name][:-1].zero_() for name in (Q, "model.embed_tokens.weight")])
    start(folder)


def test_each_projection_of_a_fused_one_is_looked_at(sound: Path, tmp_path: Path) -> None:
    original = write_original(sound, tmp_path / "original", TINY)
    name, keys = (
        "block.1.attn.qkv.weight",
        slice(TINY.num_heads * TINY.head_dim, (TINY.num_heads + TINY.num_kv_heads) * TINY.head_dim),
    )
    config = load_model_config(original)
    load_model(original, config, dtype=torch.float32, device=CPU)
    change(original, lambda tensors: tensors[name][keys].zero_() if name in tensors else None)
    with pytest.raises(CheckpointError, match=f"tensor {name} is all zeros"):
        load_model(original, config, dtype=torch.float32, device=CPU)


def test_an_expert_that_is_not_packed_is_looked_at(sound: Path, tmp_path: Path) -> None:
    bf16 = write_bf16(sound, tmp_path / "bf16", TINY)
    config = load_model_config(bf16)
    load_model(bf16, config, dtype=torch.float32, device=CPU)
    name = f"{LAYER}mlp.experts.gate_up_proj"
    change(bf16, lambda tensors: tensors[name][4].zero_())
    with pytest.raises(CheckpointError, match=f"tensor {name} is all zeros in expert 4"):
        load_model(bf16, config, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("whole", [True, False])
def test_a_shard_may_be_zeros_if_the_whole_is_not(folder: Path, whole: bool) -> None:
    """Rank 0 of three has the first two of six query heads."""
    num_rows = (6 if whole else 2) * TINY.head_dim
    change(folder, lambda tensors: tensors[Q][:num_rows].zero_())

    def load(rank: ThreadRank) -> str:
        shard = plan_shards(TINY, ParallelConfig(3))[rank.rank]
        try:
            load_model(folder, TINY, dtype=torch.float32, device=CPU, shard=shard, collectives=rank)
        except CheckpointError as error:
            return str(error)
        return ""

    assert [f"{Q} is all zeros" in said for said in on_ranks(3, load)] == [whole] * 3


@pytest.mark.parametrize(
    ("name", "value", "where"),
    [
        ("model.embed_tokens.weight", float("nan"), "the embedding"),
        (f"{LAYER}self_attn.q_proj.weight", float("nan"), "the attention of layer 1"),
        ("model.layers.0.self_attn.o_proj.bias", float("inf"), "the attention of layer 0"),
        ("model.layers.0.mlp.router.bias", float("nan"), "the experts of layer 0"),
        (f"{LAYER}mlp.experts.gate_up_proj_bias", float("nan"), "the experts of layer 1"),
        ("model.norm.weight", float("nan"), "the final norm"),
        (HEAD, float("nan"), "lm_head"),
    ],
)
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_what_is_not_finite_is_found_before_anything_is_served(
    folder: Path, name: str, value: float, where: str, num_ranks: int
) -> None:
    # All of a bias; of a matrix one row, of a head that is on one rank.
    change(folder, lambda tensors: tensors[name][..., :1].fill_(value))
    config = EngineConfig(
        folder,
        dtype="float32",
        max_model_len=64,
        cache=CacheConfig(4 << 20),
        parallel=ParallelConfig(num_ranks),
    )

    def begin(thread: ThreadRank) -> str:
        shard = plan_shards(TINY, config.parallel)[thread.rank]
        rank = Rank(config, TINY, shard, thread, device=CPU)
        try:
            rank.allocate(plan_kv_cache(config, TINY, shard, [rank.load().kv_memory]))
        except CheckpointError as error:
            return str(error)
        return ""

    said = on_ranks(num_ranks, begin)
    assert said[0] == f"the weights in {folder} are broken: what {where} computes is not finite"
    # The logits are on rank 0 only.
    assert set(said[1:]) <= ({""} if where == "lm_head" else {said[0]})


def test_logits_that_are_all_the_same_are_refused(folder: Path) -> None:
    change(folder, lambda tensors: tensors[HEAD].copy_(tensors[HEAD][:1].expand_as(tensors[HEAD])))
    with pytest.raises(
        CheckpointError, match="what the model computes is the same for every token of the vocabulary"
    ):
        start(folder)


def test_logits_that_are_all_the_same_after_one_token_are_refused(folder: Path) -> None:
    """Without biases, a first token whose embedding is zero has only zeros in each layer."""

    def zero(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("bias"):
                tensor.zero_()
        tensors["model.embed_tokens.weight"][0].zero_()

    change(folder, zero)
    with pytest.raises(CheckpointError, match="is the same for every token of the vocabulary"):
        start(folder)


@pytest.mark.parametrize(("scale", "refused"), [(252, False), (253, True), (254, True), (255, True)])
def test_a_scale_that_makes_values_infinite_is_refused(folder: Path, scale: int, refused: bool) -> None:
    change(folder, lambda tensors: tensors[SCALES][3, 7].fill_(scale))
    if not refused:
        load_model(folder, TINY, dtype=torch.float32, device=CPU)
        return
    with pytest.raises(CheckpointError) as caught:
        load_model(folder, TINY, dtype=torch.float32, device=CPU)
    reason = "NaN" if scale == 255 else "too large for its values to be finite"
    assert f"tensor {SCALES} has scale {scale}, which is {reason}, at [3, 7, 0]" in str(caught.value)
