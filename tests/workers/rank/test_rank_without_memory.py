"""A rank that finds no memory reports it and names the setting that helps, in place of the
library's own words."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.tiny_model import TINY
from workers.config import EngineConfig
from workers.errors import ConfigError
from workers.parallel.collectives import Alone
from workers.parallel.shard import plan_shards
from workers.rank.rank import Rank
from workers.scheduler.plan import StepPlan

SENTENCE = r"there was no memory .*--kv-cache-memory"


def rank(loader: Any) -> Rank:
    config = EngineConfig(Path("unused"))
    (shard,) = plan_shards(TINY, config.parallel)
    return Rank(config, TINY, shard, Alone(), device=torch.device("cpu"), loader=loader)


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError, "torch's own"])
def test_while_it_loads(error: Any) -> None:
    def load(*_: object, **__: object) -> object:
        if isinstance(error, str):
            return torch.empty(1 << 60, dtype=torch.uint8)
        raise error

    with pytest.raises(ConfigError, match=SENTENCE):
        rank(load).load()


def test_another_error_while_it_loads_stays() -> None:
    def load(*_: object, **__: object) -> object:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        rank(load).load()


class Runner:
    """A runner that fails at once, or when the result is taken."""

    done = True

    def __init__(self, at_launch: bool) -> None:
        self._at_launch = at_launch

    def launch(self, plan: StepPlan) -> "Runner":
        if self._at_launch:
            bytearray(sys.maxsize)
        return self

    def result(self) -> None:
        bytearray(sys.maxsize)


@pytest.mark.parametrize("at_launch", [True, False])
def test_in_a_step(monkeypatch: pytest.MonkeyPatch, at_launch: bool) -> None:
    one = rank(None)
    monkeypatch.setattr(one, "_runner", Runner(at_launch))
    result = one.step(StepPlan(3))
    assert result.error is not None
    assert result.error.startswith("there was no memory for step 3: ")
    assert "--kv-cache-memory" in result.error
