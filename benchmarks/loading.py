"""Speed and memory of loading a rank's shard.

    python3 -m benchmarks.loading [--layers 2] [--vocab 32000] [--rounds 5] [--folder FOLDER]

Writes a random checkpoint of the 20b shape with few layers. For each parallel plan a process of its
own loads rank 0's shard again and again, and each time does beside it what it is compared with, so
that whatever else the machine does meets both:

- cold (the files out of this system's page cache; a virtual machine's host may still have them): a
  plain sequential `read` of the same ranges of the files into one small buffer. Where a rank takes
  a part of each row (ep below tp, and the attention output), a range is the whole rows, since these
  share pages.
- warm (the files in the page cache), twice, by as many threads as the loader has: a plain `read` of
  the same ranges into fresh memory on huge pages, and a plain copy of as many bytes as the shard
  has from memory to such memory, which no file can reach.

A ratio is the time of the comparison over the time of loading, the median of the rounds; that of
processor time (user and system, all threads, the smallest of the rounds) says what it would be on a
machine that does nothing else. Memory is the highest peak of anonymous and shared pages (mapped
file pages are the page cache's) above what the process had before, against the shard's size plus 10
% plus 300 MB.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import numpy as np
import torch

from kernels.cpu.memory import zeros
from workers.config import ParallelConfig
from workers.model.checkpoint import load_model, touched_extents
from workers.model.make_checkpoint import preset_config, write_checkpoint
from workers.model.mapped_files import Extent
from workers.model.sizes import rank_bytes
from workers.model_config import load_model_config
from workers.parallel.shard import plan_shards

PLANS = ((1, 1), (2, 2), (8, 8), (2, 1), (4, 1))
_PIECE_BYTES = 1 << 20
_COPY_BYTES = 8 << 20
_SAMPLE_S = 0.005
_COMPARED = {"read": "read", "fill": "read into memory", "copy": "copy"}


class _Rank:
    """The collectives that loading needs: none."""

    rank = 0

    def __init__(self, size: int) -> None:
        self.size = size

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor] | None:
        return [tensor] * self.size

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def meet(self, place: str, timeout_s: float) -> None:
        pass


def private_bytes() -> int:
    """Return the bytes of this process's anonymous and shared pages."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem")) * 1024


class _Peak:
    """A watch on this process's private pages."""

    def __enter__(self) -> "_Peak":
        self._before = self._highest = private_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._see()
        self._done.set()
        self._thread.join()

    @property
    def num_bytes(self) -> int:
        """Bytes above those at the start."""
        return self._highest - self._before

    def _watch(self) -> None:
        while not self._done.wait(_SAMPLE_S):
            self._see()

    def _see(self) -> None:
        self._highest = max(self._highest, private_bytes())


class _Stopwatch:
    """Seconds of the clock and of the processor, all threads."""

    def __init__(self) -> None:
        self._started = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self._started[0], time.process_time() - self._started[1]


def measure_rank(path: Path, tensor: int, expert: int, rounds: int) -> dict[str, list[float]]:
    """Load rank 0 in this process.

    Returns:
        By round: seconds of `read`, `cold`, `fill`, `copy` and `warm`, of the processor as
        `read_cpu` …, and `peak`; once: `stored`, `read_bytes`, `held`, all in bytes.
    """
    model = load_model_config(path)
    shard = plan_shards(model, ParallelConfig(tensor, expert))[0]
    sizes = rank_bytes(model, shard, "bfloat16")
    stored = sizes.total - sizes.padding  # in bf16 and MXFP4 as here; padding is not read
    extents = touched_extents(path, model, shard)
    found: dict[str, list[float]] = defaultdict(list)

    def record(name: str, times: tuple[float, float]) -> None:
        found[name].append(times[0])
        found[f"{name}_cpu"].append(times[1])

    def load() -> tuple[float, float]:
        touch_memory(sizes.total)
        with _Peak() as peak:
            watch = _Stopwatch()
            loaded = load_model(
                path,
                model,
                dtype=torch.bfloat16,
                device=torch.device("cpu"),
                shard=shard,
                collectives=_Rank(tensor),
            )
            times = watch.read()
        found["peak"].append(peak.num_bytes)
        found["held"] = [loaded.weight_bytes]
        return times

    def cold_load() -> None:
        drop_cache(path)
        record("cold", load())

    def cold_read() -> None:
        drop_cache(path)
        record("read", read_plainly(extents))

    for number in range(rounds):
        # In turn, because a host caches the pages that the first has read.
        for step in (cold_load, cold_read) if number % 2 == 0 else (cold_read, cold_load):
            step()
        record("fill", read_into_memory(extents))
        record("copy", copy_plainly(stored))
        record("warm", load())
    return dict(found) | {"stored": [stored], "read_bytes": [sum(extent.num_bytes for extent in extents)]}


def touch_memory(num_bytes: int) -> None:
    """Make a virtual machine's host return this much free memory: otherwise the first touch of a
    page would pay for that, now and then."""
    zeros((num_bytes,), torch.uint8).fill_(1)


def drop_cache(path: Path) -> None:
    """Take the files' pages out of the page cache."""
    for file in path.glob("*.safetensors"):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_plainly(extents: list[Extent]) -> tuple[float, float]:
    """Return the times to read these one after the other into a small buffer."""
    buffer = memoryview(bytearray(_PIECE_BYTES))
    watch = _Stopwatch()
    for extent in extents:
        with extent.tensor.file.open("rb", buffering=0) as stream:
            left = extent.num_bytes
            stream.seek(extent.start)
            while left > 0:
                left -= stream.readinto(buffer[:left])
    return watch.read()


def read_into_memory(extents: list[Extent]) -> tuple[float, float]:
    """Return the times to read these, which are in the page cache, into fresh memory on huge pages,
    with as many threads as the loader has."""
    num_bytes = sum(extent.num_bytes for extent in extents)
    pieces, begin = [], 0
    for extent in extents:
        for start in range(extent.start, extent.stop, _COPY_BYTES):
            size = min(_COPY_BYTES, extent.stop - start)
            pieces.append((extent.tensor.file, start, begin, size))
            begin += size
    descriptors = {file: os.open(file, os.O_RDONLY) for file, *_ in pieces}
    read_plainly(extents)
    touch_memory(num_bytes)
    to = memoryview(zeros((num_bytes,), torch.uint8).numpy())

    def read(piece: tuple[Path, int, int, int]) -> None:
        file, start, begin, left = piece
        while left > 0:
            done = os.preadv(descriptors[file], [to[begin : begin + left]], start)
            start, begin, left = start + done, begin + done, left - done

    try:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            watch = _Stopwatch()
            list(pool.map(read, pieces))
            return watch.read()
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def copy_plainly(num_bytes: int) -> tuple[float, float]:
    """Return the times to copy this many bytes from memory to fresh memory on huge pages, with as
    many threads as the loader has."""
    source = zeros((num_bytes,), torch.uint8).fill_(1).numpy()
    touch_memory(num_bytes)
    to = zeros((num_bytes,), torch.uint8).numpy()

    def copy(start: int) -> None:
        np.copyto(to[start : start + _COPY_BYTES], source[start : start + _COPY_BYTES])

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        watch = _Stopwatch()
        list(pool.map(copy, range(0, num_bytes, _COPY_BYTES)))
        return watch.read()


def rows(plan: tuple[int, int], found: dict[str, list[float]]) -> list[str]:
    """Return the rows of the table: cold, and warm compared with both."""
    peak, limit = max(found["peak"]), 1.1 * found["held"][0] + 300e6
    lines = []
    touched, stored = found["read_bytes"][0], found["stored"][0]
    for cache, compared, num_bytes in (
        ("cold", "read", touched),
        ("warm", "fill", touched),
        ("warm", "copy", stored),
    ):
        ratios = [plain / load for plain, load in zip(found[compared], found[cache], strict=True)]
        cells = (
            f"{plan[0]}, {plan[1]}",
            cache,
            f"{stored / 1e6:.0f} MB",
            f"{median(found[cache]):.2f} s",
            f"{_COMPARED[compared]} {num_bytes / 1e6:.0f} MB, {median(found[compared]):.2f} s",
            f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            f"{min(found[f'{compared}_cpu']) / min(found[f'{cache}_cpu']):.2f}",
            f"{peak / 1e6:.0f} MB",
            f"{limit / 1e6:.0f} MB",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Parse the flags and run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--folder",
        type=Path,
        help="where the checkpoint is made for the time of the run (default: a temporary folder)",
    )
    parser.add_argument("--rank", nargs=3, metavar=("PATH", "TENSOR", "EXPERT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        path, tensor, expert = options.rank
        print(json.dumps(measure_rank(Path(path), int(tensor), int(expert), options.rounds)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "20b-part"
        summary = write_checkpoint(
            path, preset_config("20b", num_layers=options.layers, vocab_size=options.vocab), seed=0
        )
        print(
            f"{time.strftime('%Y-%m-%d')}, {summary.num_bytes / 1e9:.2f} GB in all, {options.rounds} "
            f"rounds, {os.cpu_count()} cores\n"
        )
        print(
            "| tp, ep | page cache | shard | load | compared with | ratio | processor time | peak memory | "
            "limit |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
        for plan in PLANS:
            command = [
                sys.executable,
                "-m",
                "benchmarks.loading",
                "--rounds",
                str(options.rounds),
                "--rank",
                str(path),
                *map(str, plan),
            ]
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            print("\n".join(rows(plan, json.loads(output))), flush=True)


if __name__ == "__main__":
    main()
