"""The step that memory is profiled with is as large as any that the scheduler may plan, and the model can run it."""

from pathlib import Path

import pytest
import torch

from tests.support.tiny_model import TINY, write_tiny_checkpoint
from workers.config import BLOCK_SIZE, KVDtype, SchedulerConfig
from workers.executor import memory_profile
from workers.executor.memory_profile import largest_batch, run_largest_step, warm_up
from workers.model.checkpoint import load_model
from workers.model.gpt_oss import GptOss

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "num_tokens", "num_seqs"),
    [(5, 73, 100, 73, 5), (200, 30, 100, 30, 30), (3, 1000, 50, 150, 3)],
)
def test_the_largest_batch(max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int, num_tokens: int, num_seqs: int) -> None:
    batch = largest_batch(SchedulerConfig(max_num_seqs, max_num_batched_tokens), max_model_len, CPU)
    assert len(batch.token_ids) == len(batch.positions) == len(batch.slot_mapping_full) == num_tokens
    assert len(batch.context_lens) == len(batch.sample_indices) == num_seqs
    assert batch.context_lens.max() <= max_model_len
    assert batch.cu_seqlens_q.tolist() == [0, *batch.context_lens.cumsum(0).tolist()]
    assert (batch.positions[batch.sample_indices] == batch.context_lens - 1).all()
    assert batch.max_query_len == batch.context_lens.max()
    assert batch.block_table_full.shape[1] * BLOCK_SIZE > max_model_len


@pytest.mark.parametrize("kv_dtype", ["float32", "fp8_e4m3"])
def test_the_model_runs_it_and_samples_every_sequence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kv_dtype: KVDtype) -> None:
    model = load_model(write_tiny_checkpoint(tmp_path), TINY, dtype=torch.float32, device=CPU)
    sampled = []
    real = memory_profile.sample
    monkeypatch.setattr(memory_profile, "sample", lambda logits, batch: sampled.append(real(logits, batch).token_ids))
    run_largest_step(model, SchedulerConfig(7, 300), 100, kv_dtype)
    assert [len(token_ids) for token_ids in sampled] == [7]


def test_warming_up_runs_steps_of_every_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(write_tiny_checkpoint(tmp_path), TINY, dtype=torch.float32, device=CPU)
    sizes = []
    real = GptOss.forward
    monkeypatch.setattr(GptOss, "forward", lambda self, batch, caches: sizes.append(len(batch.token_ids)) or real(self, batch, caches))
    warmed = []
    monkeypatch.setattr(memory_profile, "warm_up_sampling", lambda vocab_size, device: warmed.append(vocab_size))
    warm_up(model, SchedulerConfig(7, 33), 100, "float32")
    assert sizes == [1, 2, 4, 8, 16, 32]
    assert warmed == [TINY.vocab_size]
