"""The same logits however a sequence is cut into steps and whatever else is in the batch; nothing
is read outside a sequence's blocks."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.model_steps import PagedSequences, random_tokens, whole_prompt_logits
from workers.config import ModelConfig, RopeConfig
from workers.model.checkpoint import load_model
from workers.model.gpt_oss import GptOss
from workers.model.make_checkpoint import write_checkpoint

CONFIG = ModelConfig(
    vocab_size=310,
    hidden_size=96,
    intermediate_size=64,
    num_layers=4,
    num_heads=6,
    num_kv_heads=2,
    head_dim=24,
    num_experts=7,
    num_experts_per_token=3,
    layer_windows=(40, None, 40, None),
    max_context_len=4096,
    rope=RopeConfig(original_max_position_embeddings=128),
)
NUM_BLOCKS = 64
TOLERANCE = 1e-5
"""Tolerance as a share of the largest logit: fp32 rounding, since products of other shapes add in
another order."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("steps") / "model"
    write_checkpoint(path, CONFIG, seed=11)
    return path


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> GptOss:
    return load_model(checkpoint, CONFIG, dtype=torch.float32, device=torch.device("cpu"))


def assert_same(actual: Tensor, wanted: Tensor) -> None:
    assert actual.shape == wanted.shape
    assert (actual - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


@pytest.mark.parametrize(
    "chunks",
    [[1] * 90, [16, 16, 58], [15, 2, 40, 33], [39, 1, 1, 49], [89, 1]],
    ids=lambda chunks: f"{len(chunks)}_chunks_from_{chunks[0]}",
)
def test_chunked_prefill_equals_whole(model: GptOss, chunks: list[int]) -> None:
    token_ids = random_tokens(CONFIG, 90, seed=1)
    sequences = PagedSequences(model, NUM_BLOCKS)
    rows, start = [], 0
    for length in chunks:
        rows.append(sequences.step({0: token_ids[start : start + length]})[0])
        start += length
    assert_same(torch.cat(rows), whole_prompt_logits(model, token_ids))


def test_mixed_batch_equals_each_sequence_alone(model: GptOss) -> None:
    prompts = {seq: random_tokens(CONFIG, length, seed=seq) for seq, length in enumerate((150, 1, 41, 97))}
    sequences = PagedSequences(model, NUM_BLOCKS)
    steps: list[dict[int, tuple[int, int]]] = [
        {0: (0, 50), 1: (0, 1)},
        {0: (50, 130), 2: (0, 40), 3: (0, 17)},
        {3: (17, 96), 2: (40, 41), 0: (130, 131)},
        {0: (131, 150), 3: (96, 97)},
    ]
    rows: dict[int, list[Tensor]] = {seq: [] for seq in prompts}
    for step in steps:
        for seq, logits in sequences.step(
            {seq: prompts[seq][start:end] for seq, (start, end) in step.items()}
        ).items():
            rows[seq].append(logits)
    for seq, prompt in prompts.items():
        assert_same(torch.cat(rows[seq]), whole_prompt_logits(model, prompt))


def test_greedy_tokens_do_not_depend_on_the_batch(model: GptOss) -> None:
    prompts = {
        seq: random_tokens(CONFIG, length, seed=20 + seq) for seq, length in enumerate((1, 60, 16, 45, 128))
    }
    together = PagedSequences(model, NUM_BLOCKS).generate(prompts, num_tokens=20)
    for seq, prompt in prompts.items():
        assert (
            PagedSequences(model, NUM_BLOCKS, seed=5).generate({seq: prompt}, num_tokens=20)[seq]
            == together[seq]
        )


def test_greedy_continuation_is_what_the_whole_sequence_says(model: GptOss) -> None:
    prompt = random_tokens(CONFIG, 70, seed=3)
    generated = PagedSequences(model, NUM_BLOCKS).generate({0: prompt}, num_tokens=40)[0]
    logits = whole_prompt_logits(model, prompt + generated)
    assert logits[len(prompt) - 1 : -1].argmax(dim=-1).tolist() == generated
    assert len(set(generated)) > 5, "the model repeats itself; the test would show little"


def test_window_limits_what_is_seen(model: GptOss) -> None:
    """Every layer slides: a change `num_layers * (window - 1)` positions back is the last one that
    reaches a token."""
    layers = tuple(layer for layer in model.layers if layer.attention.window == 40)
    sliding = replace(model, layers=layers)
    reach = len(layers) * 39
    token_ids = random_tokens(CONFIG, reach + 2, seed=9)

    def last_logits(changed: int) -> Tensor:
        changed_ids = [
            (token + 1) % CONFIG.vocab_size if at == changed else token for at, token in enumerate(token_ids)
        ]
        sequences = PagedSequences(model, NUM_BLOCKS)
        sequences.kv_caches = sequences.kv_caches[: len(layers)]
        sequences.model = sliding
        return sequences.step({0: changed_ids})[0][-1]

    unchanged = last_logits(changed=-1)
    assert torch.equal(last_logits(changed=0), unchanged)
    assert not torch.equal(last_logits(changed=1), unchanged)


def test_bfloat16_is_near_float32(checkpoint: Path, model: GptOss) -> None:
    low = load_model(checkpoint, CONFIG, dtype=torch.bfloat16, device=torch.device("cpu"))
    token_ids = random_tokens(CONFIG, 60, seed=4)
    wanted = whole_prompt_logits(model, token_ids)
    actual = whole_prompt_logits(low, token_ids)
    assert actual.dtype == torch.float32
    assert low.dtype == torch.bfloat16
    # bf16 keeps 8 bits; a position whose gate takes another expert may be off by more, so the bound
    # is on the mean.
    assert (actual - wanted).abs().mean() < 0.1 * wanted.abs().mean()


def test_weight_bytes_counts_packed_experts_as_packed(model: GptOss) -> None:
    packed = sum(
        layer.experts.weights.gate_up.blocks.nbytes + layer.experts.weights.down.blocks.nbytes
        for layer in model.layers
    )
    expert_values = 4 * 7 * (2 * 64 * 96 + 96 * 64)
    assert packed == expert_values // 2
    scales = expert_values // 32
    dense = (
        2 * 310 * 96
        + 96
        + 4 * (2 * 96 + 10 * 24 * 96 + 10 * 24 + 96 * 144 + 96 + 6 + 7 * 96 + 7 + 7 * 128 + 7 * 96)
    )
    assert model.weight_bytes == packed + scales + 4 * dense


def test_wrong_number_of_caches_is_refused(model: GptOss) -> None:
    sequences = PagedSequences(model, NUM_BLOCKS)
    sequences.kv_caches = sequences.kv_caches[:-1]
    with pytest.raises(ValueError, match="zip"):
        sequences.step({0: [1]})
