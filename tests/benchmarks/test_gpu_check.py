"""The arithmetic of the GPU report."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_check import Decoder, decode_step_bytes, weight_split
from tests.support.tiny_model import TINY, write_tiny_checkpoint
from workers.config import BLOCK_SIZE
from workers.executor.runner import Runner
from workers.model.checkpoint import load_model


def test_bytes_of_a_decode_step() -> None:
    model = replace(TINY, num_experts=10, num_experts_per_token=2, layer_windows=(24, None, 24))
    kv_of_a_sequence = 2 * (24 + 100 + 24) * 3 * 8 * 2
    assert decode_step_bytes(model, 500, 1000, 1, 100, 2) == pytest.approx(500 + 200 + kv_of_a_sequence)
    assert decode_step_bytes(model, 500, 1000, 2, 100, 2) == pytest.approx(500 + 360 + 2 * kv_of_a_sequence)
    assert decode_step_bytes(model, 500, 1000, 1, 10, 2) == pytest.approx(500 + 200 + 2 * 3 * 10 * 3 * 8 * 2)


def test_weights_and_batches_of_a_real_model(tmp_path: Path) -> None:
    model = load_model(write_tiny_checkpoint(tmp_path), TINY, dtype=torch.float32, device=torch.device("cpu"))
    dense, experts = weight_split(model)
    assert experts == 2 * (3 * 64 * 96) * 5 * 17 // 32, "two layers, five experts, 4.25 bits a weight"
    assert dense + experts + 211 * 96 * 4 == model.weight_bytes
    caches = [torch.zeros(2, 40, BLOCK_SIZE, TINY.num_kv_heads, TINY.head_dim) for _ in TINY.layer_windows]
    decoder = Decoder(Runner(model, caches, max_num_seqs=4, max_model_len=120))
    assert decoder.seconds(4, 100, 3) > 0
    assert decoder.seconds(3, 90, 2) > 0, "the first batch has left its slots"
