"""Logits equal transformers' GptOssForCausalLM in float32, loaded from the same checkpoint. All
dimensions of each model differ."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import GptOssForCausalLM, Mxfp4Config

from tests.support.model_steps import random_tokens, whole_prompt_logits
from workers.config import ModelConfig, RopeConfig
from workers.model.checkpoint import load_model
from workers.model.gpt_oss import GptOss
from workers.model.make_checkpoint import write_checkpoint
from workers.model_config import load_model_config

TOLERANCE = 1e-4
"""Tolerance as a share of the largest logit's magnitude. Two fp32 formulations measure around 3e-6
here."""
NEAR_TIE = 1e-5
"""Gate logits this close may be ordered either way by rounding; the token then meets another
expert."""
MAX_NEAR_TIES = 1e-3

CONFIGS = {
    # As published, only smaller.
    "published": ModelConfig(
        vocab_size=300,
        hidden_size=96,
        intermediate_size=160,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        num_experts=9,
        num_experts_per_token=4,
        layer_windows=(128, None),
        max_context_len=131072,
    ),
    # Full layer first, another window, whole-dimension YaRN range, clamps that are reached.
    "window_40": ModelConfig(
        vocab_size=210,
        hidden_size=128,
        intermediate_size=64,
        num_layers=2,
        num_heads=3,
        num_kv_heads=1,
        head_dim=40,
        num_experts=5,
        num_experts_per_token=2,
        layer_windows=(None, 40),
        max_context_len=8192,
        rope=RopeConfig(
            theta=10000.0,
            factor=8.0,
            beta_fast=16.0,
            beta_slow=2.0,
            original_max_position_embeddings=1024,
            truncate=True,
        ),
        swiglu_limit=0.8,
        swiglu_alpha=1.3,
    ),
    # Experts that are not packed, no sliding layer, dimensions that are no multiple of 32.
    "bf16_experts": ModelConfig(
        vocab_size=190,
        hidden_size=84,
        intermediate_size=52,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=24,
        num_experts=7,
        num_experts_per_token=3,
        layer_windows=(None, None),
        max_context_len=131072,
        rms_norm_eps=1e-2,
        experts_format="bf16",
    ),
    # Three layers with a window that is no multiple of a block, one expert per token, YaRN stretch
    # from position 128 on.
    "window_17": ModelConfig(
        vocab_size=250,
        hidden_size=160,
        intermediate_size=96,
        num_layers=3,
        num_heads=4,
        num_kv_heads=1,
        head_dim=16,
        num_experts=11,
        num_experts_per_token=1,
        layer_windows=(17, 17, None),
        max_context_len=2048,
        rope=RopeConfig(theta=500000.0, factor=4.0, original_max_position_embeddings=128),
    ),
}
LENGTHS = (1, 17, 127, 128, 129, 1000, 5000)


@dataclass(frozen=True)
class Pair:
    config: ModelConfig
    ours: GptOss
    theirs: GptOssForCausalLM


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    config = CONFIGS[request.param]
    path = tmp_path_factory.mktemp("reference") / request.param
    write_checkpoint(path, config, seed=7, max_shard_bytes=100_000)
    assert load_model_config(path) == config
    quantization = (
        {"quantization_config": Mxfp4Config(dequantize=True)} if config.experts_format == "mxfp4" else {}
    )
    theirs, info = GptOssForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, **quantization
    )
    assert not any(info.values()), info
    assert {parameter.dtype for parameter in theirs.parameters()} == {torch.float32}
    return Pair(
        config, load_model(path, config, dtype=torch.float32, device=torch.device("cpu")), theirs.eval()
    )


def reference(pair: Pair, token_ids: list[int]) -> tuple[Tensor, Tensor]:
    """Return the logits [T, vocab], and [T] the smallest distance over all layers of the last
    chosen to the first rejected expert's gate logit."""
    gaps: list[Tensor] = []

    def keep_gap(_module: torch.nn.Module, _args: object, output: tuple[Tensor, ...]) -> None:
        chosen = pair.config.num_experts_per_token
        top = output[0].topk(chosen + 1, dim=-1).values
        gaps.append(top[:, chosen - 1] - top[:, chosen])

    hooks = [layer.mlp.router.register_forward_hook(keep_gap) for layer in pair.theirs.model.layers]
    try:
        with torch.inference_mode():
            logits = pair.theirs(torch.tensor([token_ids]), use_cache=False).logits[0]
    finally:
        for hook in hooks:
            hook.remove()
    assert len(gaps) == pair.config.num_layers
    return logits, torch.stack(gaps).amin(dim=0)


@pytest.mark.parametrize("length", LENGTHS)
def test_logits_equal_transformers(
    pair: Pair, length: int, record_property: Callable[[str, object], None]
) -> None:
    token_ids = random_tokens(pair.config, length, seed=length)
    wanted, gate_gaps = reference(pair, token_ids)
    actual = whole_prompt_logits(pair.ours, token_ids)

    near_ties = gate_gaps < NEAR_TIE
    record_property("gate_near_ties", int(near_ties.sum()))
    print(f"{int(near_ties.sum())} of {length} positions have a near-tie of the gate")
    assert int(near_ties.sum()) <= MAX_NEAR_TIES * length
    actual, wanted = actual[~near_ties], wanted[~near_ties]

    assert actual.dtype == torch.float32
    scale = wanted.abs().max()
    assert (actual - wanted).abs().max() <= TOLERANCE * scale
    top_two = wanted.topk(2, dim=-1).values
    clear = top_two[:, 0] - top_two[:, 1] > TOLERANCE * scale
    assert torch.equal(actual.argmax(dim=-1)[clear], wanted.argmax(dim=-1)[clear])
    assert clear.float().mean() > 0.9
