"""How long ranks wait for their engine, with and without overlap of planning and running.

    python3 -m benchmarks.overlap [--ranks 1 2] [--sequences 1 64 256] [--steps 200] [--model PATH]

Real ranks in processes of their own run a small random model (made in a temporary folder unless
--model names one). For each setting and number of sequences, decode steps are counted once all
sequences run. Printed are the time of a step and the share of it in which rank 0 had nothing to do,
medians over the steps, means over two turns; the settings take turns, so the machine's other load
meets both.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

from workers.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from workers.engine import step_loop
from workers.engine.engine import Engine
from workers.engine.stream import ThreadReader
from workers.executor.distributed import DistributedExecutor
from workers.executor.launch_processes import ProcessRanks
from workers.model.make_checkpoint import preset_config, write_checkpoint
from workers.model_config import load_model_config
from workers.request import EngineRequest, SamplingParams
from workers.scheduler.plan import StepMasks, StepPlan, StepResult

MAX_MODEL_LEN = 2048


class Watched(DistributedExecutor):
    """A recorder of each result of a decode step of all sequences."""

    num_sequences = 0

    def watch(self, num_sequences: int) -> None:
        self.num_sequences = num_sequences
        self.results: list[StepResult] = []

    def execute(self, plan: StepPlan, masks: "Future[StepMasks] | None" = None) -> "Future[StepResult]":
        future = super().execute(plan, masks)
        if len(plan.seq_ids) == sum(plan.num_scheduled_tokens) == self.num_sequences:
            future.add_done_callback(lambda done: self.results.append(done.result()))
        return future


@contextmanager
def in_flight(limit: int) -> Iterator[None]:
    """Let engines have this many plans in flight; with one there is no overlap."""
    before = step_loop.MAX_IN_FLIGHT
    step_loop.MAX_IN_FLIGHT = limit
    try:
        yield
    finally:
        step_loop.MAX_IN_FLIGHT = before


def measure(engine: Engine, executor: Watched, num_sequences: int, num_steps: int) -> tuple[float, float]:
    """Return (seconds a step, share of it that rank 0 waited), medians."""
    executor.watch(num_sequences)
    reader = ThreadReader()
    sampling = SamplingParams(temperature=0, seed=0, max_tokens=num_steps + 8, ignore_eos=True)
    streams = [
        engine.submit(EngineRequest(f"r{index}", (index + 1, 2, 3), sampling), reader)
        for index in range(num_sequences)
    ]
    for _ in reader.read(streams):
        pass
    results = [result for result in executor.results if result.error is None][2:-2]
    shares = [result.idle_s / (result.idle_s + result.elapsed_s) for result in results]
    return statistics.median(result.idle_s + result.elapsed_s for result in results), statistics.median(
        shares
    )


def run(model_path: Path, model: ModelConfig, num_ranks: int, sequences: list[int], num_steps: int) -> None:
    """Print the table of one number of ranks."""
    config = EngineConfig(
        model_path,
        dtype="float32",
        max_model_len=MAX_MODEL_LEN,
        cache=CacheConfig(512 << 20, prefix_caching=False),
        scheduler=SchedulerConfig(max_num_seqs=max(sequences), max_num_batched_tokens=2048),
        parallel=ParallelConfig(num_ranks),
    )
    executor = Watched(config, model, MAX_MODEL_LEN, ProcessRanks())
    engine = Engine(config, model, executor)
    engine.start()
    try:
        for count in sequences:
            found: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
            for limit in (1, 2, 1, 2):
                with in_flight(limit):
                    found[limit].append(measure(engine, executor, count, num_steps))
            for limit, name in ((1, "no"), (2, "yes")):
                step_s, share = (statistics.mean(values) for values in zip(*found[limit], strict=True))
                print(
                    f"| {num_ranks} | {count} | {name} | {step_s * 1e3:.2f} ms | {share * 100:.1f} % | "
                    f"{step_s * share * 1e3:.2f} ms |",
                    flush=True,
                )
    finally:
        engine.shutdown()


def main() -> None:
    """Parse the flags and run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--model", type=Path, help="a checkpoint (default: a random one of the preset tiny)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.model or Path(folder) / "tiny"
        if options.model is None:
            write_checkpoint(path, preset_config("tiny"), seed=0)
        print(f"{time.strftime('%Y-%m-%d')}, {options.steps} steps each\n")
        print(
            "| ranks | sequences | overlap | step | rank 0 waits | that is |\n"
            "| --- | --- | --- | --- | --- | --- |"
        )
        for num_ranks in options.ranks:
            run(path, load_model_config(path), num_ranks, options.sequences, options.steps)


if __name__ == "__main__":
    main()
