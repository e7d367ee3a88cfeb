"""More compute threads than cores are refused with the numbers."""

import os
from pathlib import Path

import pytest

from workers import cores
from workers.cores import cores_of_rank, engine_threads, usable_cores
from workers.engine.llm import LLM
from workers.errors import ConfigError


def test_a_quota_leaves_fewer_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    file = tmp_path / "cpu.max"
    for text, wanted in (
        ("max 100000", 8),
        ("250000 100000", 2),
        ("50000 100000", 1),
        ("9900000 100000", 8),
        ("nonsense", 8),
    ):
        file.write_text(text)
        assert usable_cores(file) == wanted, text
    assert usable_cores(tmp_path / "missing") == 8


def test_threads_of_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "usable_cores", lambda: 6)
    assert engine_threads(None, 1, setting="threads") == 6
    assert engine_threads(None, 4, setting="threads") == engine_threads(None, 7, setting="threads") == 1
    assert engine_threads(2, 3, setting="threads") == 2
    with pytest.raises(ConfigError, match=r"^threads is 7, but this process may use 6 cores: set at most 6$"):
        engine_threads(7, setting="threads")
    with pytest.raises(
        ConfigError,
        match=r"^n is 4 for each of 2 engines, 8 in total, but this process may use 6 cores: set at most 3$",
    ):
        engine_threads(4, 2, setting="n")
    with pytest.raises(ConfigError, match=r"^threads must be at least 1, got 0$"):
        engine_threads(0, setting="threads")


def test_the_offline_engine_refuses_before_it_reads_anything(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^threads is 4096, but this process may use \d+ cores"):
        LLM(tmp_path / "no model", threads=4096)


def test_ranks_that_take_all_cores_have_each_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two sockets of two cores of two threads, numbered as Linux does: first one thread of each
    # core, sockets in turn.
    for core in range(8):
        folder = tmp_path / f"cpu{core}" / "topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text(f"{core % 2}\n")
        (folder / "core_id").write_text(f"{core // 2 % 2}\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert [cores_of_rank(rank, 2, 4, tmp_path) for rank in range(2)] == [[0, 4, 2, 6], [1, 5, 3, 7]]
    assert [cores_of_rank(rank, 4, 2, tmp_path) for rank in range(4)] == [[0, 4], [2, 6], [1, 5], [3, 7]]
    assert cores_of_rank(0, 1, 8, tmp_path) == [0, 4, 2, 6, 1, 5, 3, 7]
    assert cores_of_rank(1, 2, 4, tmp_path / "none") == [4, 5, 6, 7]
    for num_ranks, num_threads in ((2, 3), (2, 5), (1, 1), (3, 3)):
        assert cores_of_rank(0, num_ranks, num_threads, tmp_path) == []
