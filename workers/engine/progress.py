"""Start-up output of an engine on stderr: the progress of loading, then a table of what was
selected."""

import sys
import threading
import time
from typing import NoReturn

from tqdm import tqdm

from workers.config import BLOCK_SIZE
from workers.executor.base import ExecutorInfo

_INTERVAL_S = 1.5


class StartUpProgress:
    """Start-up progress. On a terminal it is a bar for each phase that counts, those of several
    ranks below each other; otherwise a line when a phase starts and at least every two seconds
    while it counts. Called on the loading thread."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._bars: dict[str, tqdm[NoReturn]] = {}
        self._printed_s = 0.0
        self._lock = threading.Lock()

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Report progress, as `workers.rank.rank.Progress`."""
        with self._lock:
            if total == 0:
                self._print(f"{phase} ...")
            elif self._terminal:
                self._advance_bar(phase, done, total)
            elif done == total or time.monotonic() - self._printed_s >= _INTERVAL_S:
                self._print(f"{phase}: {done} of {total} ({100 * done // total} %)")

    def close(self) -> None:
        """Close all bars."""
        for bar in self._bars.values():
            bar.close()
        self._bars.clear()

    def _advance_bar(self, phase: str, done: int, total: int) -> None:
        bar = self._bars.get(phase)
        if bar is None:
            bar = self._bars[phase] = tqdm(total=total, desc=phase, file=sys.stderr)
        bar.update(done - bar.n)
        if done == total:
            bar.close()
            del self._bars[phase]

    def _print(self, line: str) -> None:
        self._printed_s = time.monotonic()
        tqdm.write(line, file=sys.stderr)  # printed above the bars
        sys.stderr.flush()


def summary(
    info: ExecutorInfo,
    *,
    model: str,
    longest_context: int,
    address: str,
    metrics_address: str | None,
    grammars: str,
) -> str:
    """Return the start-up table.

    Args:
        longest_context: the context that the engine would have with enough memory.
        grammars: `Engine.grammars`.
    """
    blocks = info.num_full_blocks or info.num_sliding_blocks
    rows = [
        ("model", model),
        (
            "address",
            f"grpc {address}" + (f", metrics http://{metrics_address}/metrics" if metrics_address else ""),
        ),
        ("device", f"{info.device}, {info.dtype}"),
        (
            "shards",
            f"{info.num_ranks} rank{'s' if info.num_ranks > 1 else ''}, weights "
            f"{_readable(info.weight_bytes)}",
        ),
        *((f"kernel {operation}", implementation) for operation, implementation in info.kernels.items()),
        ("context", _context(info, longest_context)),
        (
            "KV cache",
            f"{_readable(info.kv_cache_bytes)}, {(blocks - 1) * BLOCK_SIZE} tokens; "
            f"blocks of {BLOCK_SIZE}: {info.num_full_blocks} full, {info.num_sliding_blocks} sliding",
        ),
        ("grammars", grammars),
        ("start-up", ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in info.phases_s.items())),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def _context(info: ExecutorInfo, longest: int) -> str:
    if info.max_model_len == longest:
        return f"{longest} tokens"
    each = " each" if info.num_ranks > 1 else ""
    cache = f"a KV cache of {_readable(info.kv_cache_bytes // info.num_ranks)}{each}"
    return (
        f"{info.max_model_len} tokens of the model's {longest}, limited by {cache}; raise "
        f"engine.cache.memory_bytes for more"
    )


def _readable(num_bytes: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes} bytes"
