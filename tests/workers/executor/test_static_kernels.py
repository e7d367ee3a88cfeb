"""The kernels that stand in where graphs are tested compute what the real ones do."""

from pathlib import Path

import pytest
import torch

from tests.support.model_steps import PagedSequences, random_tokens
from tests.support.static_kernels import static_decode_attention, static_experts
from tests.support.tiny_model import TINY, write_tiny_checkpoint
from workers.model import experts, gpt_oss
from workers.model.checkpoint import load_model


def test_decode_steps_are_those_of_the_real_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32, other order of sums: 1e-5."""
    model = load_model(write_tiny_checkpoint(tmp_path), TINY, dtype=torch.float32, device=torch.device("cpu"))
    expected, actual = PagedSequences(model, 20), PagedSequences(model, 20)
    prompts = {seq: random_tokens(TINY, length, seq) for seq, length in enumerate((1, 23, 70))}
    for sequences in (expected, actual):
        sequences.step(prompts)
    # Unwritten slots are NaN, which this attention reads (and masks) where the real one does not.
    for cache in actual.kv_caches:
        cache.nan_to_num_()
    for step in range(3):
        tokens = {seq: [5 * seq + step] for seq in prompts}
        real = expected.step(tokens)
        with monkeypatch.context() as patched:
            patched.setattr(gpt_oss, "paged_attention", static_decode_attention)
            patched.setattr(experts, "gated_experts", static_experts)
            static = actual.step(tokens)
        for seq in prompts:
            torch.testing.assert_close(static[seq], real[seq], atol=1e-5, rtol=1e-5)
