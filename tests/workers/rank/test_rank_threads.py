"""A rank and the threads that call it."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.support.tiny_model import TINY
from workers.config import EngineConfig, ParallelConfig
from workers.parallel.collectives import Alone
from workers.parallel.shard import plan_shards
from workers.rank.rank import Rank
from workers.scheduler.plan import StepPlan


def test_steps_of_any_thread_run_on_the_rank_s_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new thread's current device is GPU 0, whichever was made current in the thread that
    loaded."""
    seen: list[object] = []
    device = torch.device("cuda", 1)
    rank = Rank(
        EngineConfig(Path("unused")), TINY, plan_shards(TINY, ParallelConfig())[0], Alone(), device=device
    )

    class Runner:
        def launch(self, plan: StepPlan) -> None:
            seen.append(plan.step)

    monkeypatch.setattr(torch.cuda, "set_device", seen.append)
    monkeypatch.setattr(rank, "_runner", Runner())
    with ThreadPoolExecutor(1) as pool:
        pool.submit(rank.launch, StepPlan(7)).result()
    assert seen == [device, 7]


def test_a_gpu_that_cannot_be_entered_is_a_failed_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    device = torch.device("cuda", 0)
    rank = Rank(
        EngineConfig(Path("unused")), TINY, plan_shards(TINY, ParallelConfig())[0], Alone(), device=device
    )
    monkeypatch.setattr(torch.cuda, "set_device", fail)
    monkeypatch.setattr(rank, "_runner", object())
    assert "step 3 failed on rank 0" in str(rank.launch(StepPlan(3)).result().error)
