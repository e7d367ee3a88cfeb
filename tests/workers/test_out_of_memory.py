"""Memory that has run out: allocations that fail, and processes that the kernel kills."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from workers import out_of_memory
from workers.exit_codes import ending
from workers.out_of_memory import OomKills, is_out_of_memory

MEMORY_BYTES = 64 << 20
HUNGRY = f"""
import sys
sys.stdin.readline()
memory = bytearray({4 * MEMORY_BYTES})
for page in range(0, len(memory), 4096):
    memory[page] = 1
"""


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("bytearray(sys.maxsize)", True),
        ("torch.empty(1 << 60, dtype=torch.uint8)", True),
        ("raise_(torch.OutOfMemoryError('CUDA out of memory'))", True),
        ('raise_(RuntimeError("can\'t start new thread"))', True),
        ("torch.empty(2) @ torch.empty(3)", False),
        ("1 / 0", False),
    ],
)
def test_allocations_that_failed(code: str, expected: bool) -> None:
    with pytest.raises(Exception) as caught:
        eval(code, {"torch": torch, "sys": sys, "raise_": raise_})
    assert is_out_of_memory(caught.value) == expected


def raise_(error: Exception) -> None:
    raise error


def test_only_a_kill_with_a_new_count_is_one_of_the_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vmstat = tmp_path / "vmstat"
    monkeypatch.setattr(out_of_memory, "_VMSTAT", vmstat)
    assert not OomKills().explain(-9), "the kernel does not say"
    vmstat.write_text("nr_free_pages 17\noom_kill 3\n")
    kills = OomKills()
    assert not kills.explain(-9)
    vmstat.write_text("nr_free_pages 17\noom_kill 4\n")
    assert [kills.explain(code) for code in (-9, -11, 1, 0)] == [True, False, False, False]
    assert not OomKills().explain(-9)


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """Yield a control group whose processes have MEMORY_BYTES, where we may make one."""
    first, second = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    root, limit = (first, "memory.limit_in_bytes") if first.is_dir() else (second, "memory.max")
    group = root / "cantata-test"
    try:
        group.mkdir()
        (group / limit).write_text(str(MEMORY_BYTES))
    except OSError as error:
        with suppress(OSError):
            group.rmdir()
        pytest.skip(f"a control group with a limit of memory cannot be made here: {error.strerror}")
    yield group
    group.rmdir()


def test_what_the_kernel_kills_for_want_of_memory(cgroup: Path) -> None:
    kills = OomKills()
    process = subprocess.Popen([sys.executable, "-c", HUNGRY], stdin=subprocess.PIPE)
    (cgroup / "cgroup.procs").write_text(str(process.pid))
    process.communicate(b"go on\n", timeout=60)
    assert process.returncode == -9
    assert kills.explain(process.returncode)
    assert "was out of memory" in ending(process.returncode, out_of_memory=True)
