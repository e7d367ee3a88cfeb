"""Folders for sockets: private, and gone once their process is, whatever its end was."""

import fcntl
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from workers.private_folder import PrivateFolder


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="run-") as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        yield Path(folder)


def test_it_is_private_and_goes_with_close(runtime: Path) -> None:
    folder = PrivateFolder()
    (folder.path / "socket").touch()
    assert folder.path.parent == runtime / f"cantata-{os.geteuid()}"
    assert [path.stat().st_mode & 0o777 for path in (folder.path, folder.path.parent)] == [0o700, 0o700]
    folder.close()
    folder.close()
    assert list(folder.path.parent.iterdir()) == []


def test_those_of_killed_processes_are_removed_and_no_others(runtime: Path) -> None:
    code = (
        "import sys; from workers.private_folder import *; folder = PrivateFolder(); "
        "print(folder.path, flush=True); sys.stdin.read()"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    try:
        paths = []
        for process in processes:
            assert process.stdout is not None
            paths.append(Path(process.stdout.readline().strip()))
            (paths[-1] / "socket").touch()
        processes[0].kill()
        processes[0].wait(10)
        assert all(path.exists() for path in paths)
        own = PrivateFolder()
        assert [path.exists() for path in (*paths, own.path)] == [False, True, True]
        own.close()
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("moment", ["before the lock", "while it is removed", "before it is opened"])
def test_one_that_another_process_takes_for_abandoned_is_made_again(
    runtime: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    made: list[Path] = []
    removers = []
    make, lock = tempfile.mkdtemp, fcntl.flock

    def made_and_taken(*args: Any, **kwargs: Any) -> str:
        made.append(Path(make(*args, **kwargs)))
        if len(made) == 1 and moment == "before it is opened":
            made[0].rmdir()
        if len(made) == 1 and moment == "while it is removed":
            removers.append(os.open(made[0], os.O_RDONLY))
            lock(removers[0], fcntl.LOCK_EX)
        return str(made[-1])

    def removed_and_locked(descriptor: int, operation: int) -> None:
        if len(made) == 1 and moment == "before the lock":
            made[0].rmdir()
        lock(descriptor, operation)

    monkeypatch.setattr(tempfile, "mkdtemp", made_and_taken)
    monkeypatch.setattr(fcntl, "flock", removed_and_locked)
    folder = PrivateFolder()
    assert len(made) == 2
    assert folder.path == made[1]
    assert folder.path.exists()
    folder.close()
    for remover in removers:
        os.close(remover)


@pytest.mark.parametrize("fault", ["open to others", "a link", "a file", "a path that is too long"])
def test_a_place_that_is_not_ours_is_not_used(
    runtime: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    root = runtime / f"cantata-{os.geteuid()}"
    if fault == "open to others":
        root.mkdir()
        root.chmod(0o777)
    elif fault == "a link":
        (runtime / "elsewhere").mkdir(mode=0o700)
        root.symlink_to("elsewhere")
    elif fault == "a file":
        root.touch()
    else:
        long = runtime / ("x" * 80)
        long.mkdir()
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
        root = long
    folder = PrivateFolder()
    assert root not in folder.path.parents
    assert folder.path.stat().st_mode & 0o777 == 0o700
    folder.close()
