"""How soon the requests of a replica end when one of its ranks dies or hangs.

    python3 -m benchmarks.rank_death [--ranks 2] [--turns 5] [--launcher process ray]
        [--step-timeout 2]

Real ranks run a tiny random model. In the middle of four streams rank 1 is killed (SIGKILL) or
stopped (SIGSTOP); printed is the time from the signal to the end of the last stream, and what the
streams were told. With `ray` the ranks are actors of a Ray that is started here, on loopback.
"""

import argparse
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from workers.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig
from workers.engine.engine import Engine
from workers.engine.stream import ThreadReader
from workers.executor.distributed import DistributedExecutor
from workers.executor.launch_processes import ProcessRanks
from workers.executor.launcher import RankLauncher
from workers.model.make_checkpoint import preset_config, write_checkpoint
from workers.model_config import load_model_config
from workers.request import EngineRequest, SamplingParams

MARK = ("CANTATA_BENCHMARK", str(os.getpid()))
NUM_STREAMS = 4
MAX_MODEL_LEN = 1024


@contextmanager
def launcher_of(kind: str, num_ranks: int) -> Iterator[RankLauncher]:
    """Return new ranks of that kind; of Ray's, in a placement group of their own."""
    if kind == "process":
        yield ProcessRanks()
        return
    from ray.util.placement_group import placement_group, remove_placement_group

    from workers.executor.launch_ray import RayRanks

    group = placement_group([{"CPU": 1}] * num_ranks, strategy="PACK")
    try:
        yield RayRanks(group)
    finally:
        remove_placement_group(group)


def rank_pids() -> list[int]:
    """Return the PIDs of this benchmark's ranks, oldest first; processes started from here on
    inherit the mark."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):  # gone, or another user's
            if entry.name.isdigit() and "=".join(MARK).encode() in (entry / "environ").read_bytes().split(
                b"\0"
            ):
                command = (entry / "cmdline").read_bytes()
                if b"_RankActor" in command or b"workers.rank.process" in command:
                    found.append(int(entry.name))
    return sorted(found)


def turn(
    config: EngineConfig, model: ModelConfig, launcher: RankLauncher, number: signal.Signals
) -> tuple[float, str]:
    """Return (seconds from the signal to the last end, the errors that the streams got)."""
    before = set(rank_pids())
    engine = Engine(config, model, DistributedExecutor(config, model, launcher))
    engine.start()
    try:
        reader = ThreadReader()
        sampling = SamplingParams(temperature=0, seed=0, max_tokens=MAX_MODEL_LEN - 8, ignore_eos=True)
        streams = [
            engine.submit(EngineRequest(f"r{index}", (index + 1, 2, 3), sampling), reader)
            for index in range(NUM_STREAMS)
        ]
        victim = [pid for pid in rank_pids() if pid not in before][-1]
        begin_s, said = 0.0, set()
        for num_seen, (_, output) in enumerate(reader.read(streams)):
            if num_seen == 5 * NUM_STREAMS:
                begin_s = time.perf_counter()
                os.kill(victim, number)
            if output.finish_reason is not None:
                said.add(str(output.error))
        assert begin_s, "the streams ended before the signal"
        return time.perf_counter() - begin_s, ", ".join(said)
    finally:
        engine.shutdown()


def start_ray(num_cpus: int) -> Any:
    """Run a Ray on loopback."""
    os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    import ray

    ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=False,
        object_store_memory=128 << 20,
        logging_level="ERROR",
    )
    return ray


def main() -> None:
    """Parse the flags and run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--launcher", choices=("process", "ray"), nargs="+", default=["process", "ray"])
    parser.add_argument("--step-timeout", type=float, default=2.0)
    options = parser.parse_args()
    os.environ |= [MARK]
    ray = start_ray(options.ranks) if "ray" in options.launcher else None
    print(f"{time.strftime('%Y-%m-%d')}, {options.ranks} ranks, step timeout {options.step_timeout:g} s\n")
    print(
        "| ranks are | rank 1 gets | median | longest | turns | told |\n"
        "| --- | --- | ---: | ---: | ---: | --- |"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny"
        write_checkpoint(path, preset_config("tiny"), seed=0)
        config = EngineConfig(
            path,
            dtype="float32",
            max_model_len=MAX_MODEL_LEN,
            cache=CacheConfig(64 << 20),
            parallel=ParallelConfig(options.ranks, step_timeout_s=options.step_timeout),
        )
        for kind in options.launcher:
            for number in (signal.SIGKILL, signal.SIGSTOP):
                turns = []
                for _ in range(options.turns):
                    with launcher_of(kind, options.ranks) as launcher:
                        turns.append(turn(config, load_model_config(path), launcher, number))
                times, told = [seconds for seconds, _ in turns], sorted({sentence for _, sentence in turns})
                name = {"process": "child processes", "ray": "Ray actors"}[kind]
                row = (
                    f"{statistics.median(times) * 1e3:.0f} ms | {max(times) * 1e3:.0f} ms | "
                    f"{len(turns)} | {'; '.join(told)}"
                )
                print(f"| {name} | {number.name} | {row} |", flush=True)
    if ray is not None:
        ray.shutdown()


if __name__ == "__main__":
    main()
