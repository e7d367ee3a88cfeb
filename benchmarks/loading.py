"""Speed and memory of loading a rank's shard.

    python -m benchmarks.loading [--layers 2] [--vocab 32000] [--folder FOLDER]

Writes a random checkpoint of the 20b shape with few layers. For each parallel plan, rank 0's shard is loaded in a process of its own, with
the files out of the page cache (cold) and in it (warm). The speed is the stored bytes of the shard over the time; beside it stands a plain
sequential read of as many bytes of the same files, cold or warm alike, in the same run. Memory is the peak of anonymous and shared pages
(mapped file pages are the page cache's) above what the process had before, against the shard's size plus 10 % plus 300 MB.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from workers.config import ParallelConfig, load_model_config
from workers.model.checkpoint import load_model
from workers.model.make_checkpoint import make_checkpoint
from workers.model.sizes import rank_bytes
from workers.parallel.shard import plan_shards

PLANS = ((1, 1), (2, 2), (8, 8), (2, 1), (4, 1))
_PIECE_BYTES = 1 << 20
_SAMPLE_S = 0.005


class _Rank:
    """As many collectives as loading needs: none."""

    rank = 0

    def __init__(self, size: int) -> None:
        self.size = size

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor] | None:
        return [tensor] * self.size

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def private_bytes() -> int:
    """Anonymous and shared pages of this process."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem")) * 1024


def load_rank(path: Path, tensor: int, expert: int) -> dict[str, float]:
    """Load rank 0 in this process; seconds, bytes of the shard, peak memory above the start."""
    model = load_model_config(path)
    shard = plan_shards(model, ParallelConfig(tensor, expert))[0]
    before, peak, done = private_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(_SAMPLE_S):
            peak = max(peak, private_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    loaded = load_model(path, model, dtype=torch.bfloat16, device=torch.device("cpu"), shard=shard, collectives=_Rank(tensor))
    elapsed = time.perf_counter() - started
    peak = max(peak, private_bytes())
    done.set()
    watcher.join()
    # Stored like this, in bf16 and MXFP4; padding is not read.
    stored = rank_bytes(model, shard, "bfloat16")
    return {"seconds": elapsed, "stored": stored.total - stored.padding, "held": loaded.weight_bytes, "peak": peak - before}


def drop_cache(path: Path) -> None:
    """Take the files' pages out of the page cache."""
    for file in path.glob("*.safetensors"):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_plainly(path: Path, num_bytes: int) -> float:
    """Seconds to read so many bytes one after the other."""
    left, buffer = num_bytes, bytearray(_PIECE_BYTES)
    started = time.perf_counter()
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb", buffering=0) as stream:
            while left > 0 and (count := stream.readinto(buffer)):
                left -= count
    return time.perf_counter() - started


def measure(path: Path, plan: tuple[int, int], *, cold: bool) -> str:
    """One row of the table."""
    command = [sys.executable, "-m", "benchmarks.loading", "--rank", str(path), *map(str, plan)]
    best: dict[str, float] = {}
    plain_s = float("inf")
    for _ in range(3):
        if cold:
            drop_cache(path)
        found: dict[str, float] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        if not best or found["seconds"] < best["seconds"]:
            best = found
        if cold:
            drop_cache(path)
        plain_s = min(plain_s, read_plainly(path, int(found["stored"])))
    speed, plain = best["stored"] / best["seconds"], best["stored"] / plain_s
    limit = 1.1 * best["held"] + 300e6
    size, seconds = f"{best['stored'] / 1e6:.0f} MB", f"{best['seconds']:.2f} s"
    speeds = f"{speed / 1e9:.2f} GB/s | {plain / 1e9:.2f} GB/s | {speed / plain:.2f}"
    memory = f"{best['peak'] / 1e6:.0f} MB | {limit / 1e6:.0f} MB"
    return f"| {plan[0]}, {plan[1]} | {'cold' if cold else 'warm'} | {size} | {seconds} | {speeds} | {memory} |"


def main() -> None:
    """Parse the flags and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is made for the time of the run (default: a temporary folder)")
    parser.add_argument("--rank", nargs=3, metavar=("PATH", "TENSOR", "EXPERT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        path, tensor, expert = options.rank
        print(json.dumps(load_rank(Path(path), int(tensor), int(expert))))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "20b-part"
        summary = make_checkpoint(path, "20b", num_layers=options.layers, vocab_size=options.vocab)
        print(f"{time.strftime('%Y-%m-%d')}, {summary.num_bytes / 1e9:.2f} GB in all, best of 3, {os.cpu_count()} cores\n")
        print("| tp, ep | page cache | shard | time | speed | plain read | ratio | peak memory | limit |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
        for plan in PLANS:
            for cold in (True, False):
                print(measure(path, plan, cold=cold), flush=True)


if __name__ == "__main__":
    main()
