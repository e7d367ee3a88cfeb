"""Ranks as child processes of the engine, all on this host: for standalone serving, offline use and
tests."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future

import torch

from workers.cores import thread_environment
from workers.errors import ConfigError
from workers.executor.launcher import OnExit, Placement
from workers.exit_codes import crash, ending
from workers.out_of_memory import OomKills
from workers.rank.process import RankSpec

_KILL_S = 10.0
"""Seconds for the kernel to end a killed process."""


class ProcessRanks:
    """A RankLauncher that starts child processes."""

    host = "127.0.0.1"

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[str]] = []
        self._watchers: list[threading.Thread] = []

    @property
    def pids(self) -> list[int]:
        """PIDs of the ranks, by rank."""
        return [process.pid for process in self._processes]

    def place(self, num_ranks: int, device: str, num_threads: int, timeout_s: float) -> Sequence[Placement]:
        """Place all ranks on this host (see RankLauncher)."""
        if device.startswith("cuda"):
            if device != "cuda":
                raise ConfigError(
                    f"engine.device {device!r} names one GPU, but there are {num_ranks} ranks: set it to cuda"
                )
            num_gpus = torch.cuda.device_count()
            if num_gpus < num_ranks:
                raise ConfigError(
                    f"engine.parallel.tensor needs {num_ranks} GPUs, but this host has {num_gpus}: lower it, "
                    f"or use several hosts with Ray"
                )
        return [
            Placement(self.host, rank, num_ranks, max(1, num_threads // num_ranks))
            for rank in range(num_ranks)
        ]

    def launch(self, spec: RankSpec, on_exit: OnExit) -> None:
        """Start a rank (see RankLauncher)."""
        started: Future[subprocess.Popen[str]] = Future()
        watcher = threading.Thread(
            target=_run, args=(spec, started, on_exit), name=f"cantata-rank-{spec.rank}", daemon=True
        )
        watcher.start()
        self._watchers.append(watcher)  # from here on `end` may join it, also on another watcher
        process = started.result()
        self._processes.append(process)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died at once; its watcher reports how
            process.stdin.write(spec.to_json() + "\n")
            process.stdin.close()

    def end(self, grace_s: float) -> None:
        """End the ranks (see RankLauncher)."""
        deadline = time.monotonic() + grace_s
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(deadline - time.monotonic(), 0))
        for process in self._processes:
            if process.poll() is None:
                process.kill()  # also ends a stopped process
        for process in self._processes:
            process.wait(_KILL_S)
        for watcher in self._watchers:
            if watcher is not threading.current_thread():
                watcher.join(_KILL_S)  # all watchers have reported how their ranks ended


def _run(spec: RankSpec, started: "Future[subprocess.Popen[str]]", on_exit: OnExit) -> None:
    """Start a rank and wait for its end. It lives no longer than the thread that starts it
    (`workers.parent_death`)."""
    kills = OomKills()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "workers.rank.process", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=sys.stderr.fileno()
            if _has_fileno(sys.stderr)
            else subprocess.DEVNULL,  # the engine's stdout is reserved for its one line
            env={**os.environ, **thread_environment(spec.num_threads)},
            text=True,
        )
    except BaseException as error:
        started.set_exception(error)
        return
    started.set_result(process)
    code = process.wait()
    on_exit(f"ended with {ending(code, out_of_memory=kills.explain(code))}", crash(code))


def _has_fileno(stream: object) -> bool:
    try:
        return isinstance(stream.fileno(), int)  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):
        return False
