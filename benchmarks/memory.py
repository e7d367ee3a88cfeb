"""Peak memory of serving: anonymous and shared pages of the gateway and of the engine, from the
start to a long prompt.

    python3 -m benchmarks.memory --model checkpoints/tiny checkpoints/small
        [--dense bf16 int8] [--kv 1GiB]

`cantata serve --standalone` is watched from outside, each 10 ms, while it starts (load, pack, warm
up), serves 16 clients (128 tokens in, 64 out), then one prompt of 4096 tokens. Pages of mapped
files belong to the page cache and are left out, but for the column that says how many of the
engine's were mapped at most, libraries among them. The limit for an engine is weights + KV pool +
600 MB; `above weights` is the peak less the weights alone: of the pool only pages that were written
to take memory.
"""

import argparse
import asyncio
import os
import threading
from collections import defaultdict
from pathlib import Path

from cluster.sizes import parse_size

from benchmarks.processes import process_tree
from benchmarks.serving import standalone
from cluster.commands.bench import serve
from workers.config import DenseDtype, ParallelConfig
from workers.model.sizes import rank_bytes
from workers.model_config import load_model_config
from workers.parallel.shard import plan_shards

_SAMPLE_S = 0.01
_TREE_SAMPLES = 10
"""Samples between two checks for new processes."""
ALLOWANCE_BYTES = 600_000_000
PROCESSES = {"engine": "workers.engine", "gateway": "cantata serve"}


class Watch:
    """A watch on the processes that this one has started, as long as the context lasts.

    Attributes:
        phase: the current phase of serving.
        peaks: highest private bytes by (process, phase).
        mapped: most bytes of mapped files by process.
    """

    def __init__(self) -> None:
        self.phase = "start"
        self.peaks: dict[tuple[str, str], int] = defaultdict(int)
        self.mapped: dict[str, int] = defaultdict(int)

    def __enter__(self) -> "Watch":
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        sample = 0
        while not self._done.wait(_SAMPLE_S):
            if sample % _TREE_SAMPLES == 0:
                processes = process_tree(os.getpid())
            sample += 1
            for name, command in PROCESSES.items():
                for process in processes:
                    if command in process.command:
                        self.peaks[name, self.phase] = max(
                            self.peaks[name, self.phase], process.private_bytes
                        )
                        self.mapped[name] = max(self.mapped[name], process.file_bytes)


def ask(url: str, clients: int, num_prompts: int, input_len: int, output_len: int) -> None:
    """Send requests; raise SystemExit if one fails."""
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    flags = [
        "--endpoint",
        "completions",
        "--ignore-eos",
        "--concurrency",
        str(clients),
        "--num-prompts",
        str(num_prompts),
    ]
    flags += ["--input-len", str(input_len), "--output-len", str(output_len), "--warmup", "0"]
    report = asyncio.run(serve.measure(parser.parse_args(flags), url))
    if report.num_failed or not report.num_completed:
        raise SystemExit(f"{report.num_failed} of {num_prompts} requests failed: {report.errors}")


def measure(model: Path, dense: str, kv: str) -> Watch:
    """Serve a model and watch."""
    with (
        Watch() as watch,
        standalone(model, "bfloat16", "--cpu-dense-dtype", dense, "--kv-cache-memory", kv) as url,
    ):
        for phase, (clients, num_prompts, input_len, output_len) in {
            "16 clients": (16, 32, 128, 64),
            "a prompt of 4096": (1, 1, 4096, 8),
        }.items():
            watch.phase = phase
            ask(url, clients, num_prompts, input_len, output_len)
        watch.phase = "stop"
    return watch


def row(model: Path, dense: DenseDtype, kv: str, watch: Watch) -> str:
    """Return a row of the table, in MB."""
    config = load_model_config(model)
    (shard,) = plan_shards(config, ParallelConfig())
    weights = rank_bytes(config, shard, "bfloat16", cpu_dense_dtype=dense).total
    limit = weights + parse_size(kv) + ALLOWANCE_BYTES
    phases = ("start", "16 clients", "a prompt of 4096")
    engine, gateway = ([watch.peaks[name, phase] for phase in phases] for name in PROCESSES)
    numbers = (
        weights,
        *engine,
        max(engine) - weights,
        limit,
        watch.mapped["engine"],
        gateway[0],
        max(gateway[1:]),
    )
    return f"| {model.name}, {dense} | {' | '.join(f'{number / 1e6:.0f}' for number in numbers)} |"


def main() -> None:
    """Parse the flags and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, nargs="+", required=True, help="folders of checkpoints")
    parser.add_argument("--dense", nargs="+", choices=("bf16", "int8"), default=["bf16", "int8"])
    parser.add_argument("--kv", default="1GiB", help="the KV pool (default: %(default)s)")
    options = parser.parse_args()
    print(
        "| MB | weights | start | 16 clients | 4096 tokens | above weights | limit | files mapped | "
        "gateway, start | gateway, serving |"
    )
    print("| --- |" + " ---: |" * 9)
    for model in options.model:
        for dense in options.dense:
            print(row(model, dense, options.kv, measure(model, dense, options.kv)), flush=True)


if __name__ == "__main__":
    main()
