"""Cost of serving without requests: processor time of all processes, of `cantata serve` without
and with Ray and of an empty Serve application on the same Ray.

    python3 -m benchmarks.idle --model checkpoints/tiny [--seconds 60] [--settle 20]
        [--ways standalone empty ray]

Each way is started, left alone for --settle seconds and then watched for --seconds. It is processor
time, so what else the machine does matters little. Ray takes its usual ports: run this where
nothing else serves, for instance in a network namespace with loopback.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.processes import process_tree

READY = "Cantata serves:"
# As `cantata serve` starts Ray and Serve, but what is served is nothing.
EMPTY_APPLICATION = f"""
import logging, os, threading
from cluster.serve.launch import OBJECT_STORE_BYTES
from cluster.serve.ray_environment import RAY_ENVIRONMENT
for name, value in RAY_ENVIRONMENT.items():
    os.environ.setdefault(name, value)
import ray
ray.init(
    address="local", namespace="serve", include_dashboard=False,
    object_store_memory=OBJECT_STORE_BYTES, logging_level=logging.WARNING,
)
os.environ["RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP"] = "1"
from ray import serve
from ray.serve.config import HTTPOptions, gRPCOptions
from cluster.serve.app import GRPC_SERVICERS
serve.start(
    http_options=HTTPOptions(host="127.0.0.1", port=8000),
    grpc_options=gRPCOptions(port=9000, grpc_servicer_functions=list(GRPC_SERVICERS)),
)
@serve.deployment
class Empty:
    async def __call__(self, request):
        return "empty"
serve.run(Empty.bind(), name="empty", route_prefix="/")
print("{READY}", flush=True)
try:
    threading.Event().wait()
finally:
    serve.shutdown()
    ray.shutdown()
"""

_NAMES = (
    (re.compile(r"ServeReplica:\w+:(\w+)"), r"replica of \1"),
    (re.compile(r"ray::(\w+)"), r"ray \1"),
    (re.compile(r"(gcs_server|raylet|haproxy)"), r"\1"),
    (re.compile(r"ray/[\w/]+/(\w+)\.py"), r"ray \1"),
    (re.compile(r"-m workers\.engine"), "engine"),
    (re.compile(r"cantata serve|python -c"), "the command"),
)


def name_of(command: str) -> str:
    """Return a process's name for the table."""
    for pattern, name in _NAMES:
        if found := pattern.search(command):
            return found.expand(name)
    return command.split()[0].rpartition("/")[2] if command else "?"


def command_of(way: str, model: Path) -> list[str]:
    """Return the command that serves in that way until SIGINT, and prints READY."""
    if way == "empty":
        return [sys.executable, "-c", EMPTY_APPLICATION]
    flags = ["--model", str(model), "--kv-cache-memory", "256MiB"]
    flags += ["--standalone", "--http-port", "0", "--grpc-port", "0"] if way == "standalone" else []
    return [str(Path(sys.executable).with_name("cantata")), "serve", *flags]


@contextmanager
def running(command: list[str]) -> Iterator[int]:
    """Run the command; yield its process id when it is ready."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            if not any(READY in line for line in process.stdout):
                raise SystemExit(f"{command[:3]} did not start; its log above says why")
            yield process.pid
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=120)


def idle_cores(pid: int, settle_s: float, seconds: float) -> dict[str, float]:
    """Return the cores used by a process and its descendants, by name."""
    time.sleep(settle_s)
    begin_s, before = time.perf_counter(), {process.pid: process.cpu_s for process in process_tree(pid)}
    time.sleep(seconds)
    lasted_s = time.perf_counter() - begin_s
    used: dict[str, float] = defaultdict(float)
    for process in process_tree(pid):
        used[name_of(process.command)] += max(process.cpu_s - before.get(process.pid, 0.0), 0.0) / lasted_s
    return dict(used)


def table(found: dict[str, dict[str, float]]) -> str:
    """Return Markdown: per cent of a core, a row for each kind of process, a column for each
    way."""
    names = sorted(
        {name for used in found.values() for name in used},
        key=lambda name: -max(used.get(name, 0.0) for used in found.values()),
    )
    lines = [f"| % of a core | {' | '.join(found)} |", "| --- |" + " ---: |" * len(found)]
    for name in names:
        cells = (f"{100 * used[name]:.2f}" if name in used else "" for used in found.values())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append(
        f"| **together** | {' | '.join(f'{100 * sum(used.values()):.2f}' for used in found.values())} |"
    )
    return "\n".join(lines)


def main() -> None:
    """Parse the flags and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of a checkpoint")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--settle", type=float, default=20)
    parser.add_argument(
        "--ways", nargs="+", choices=("standalone", "empty", "ray"), default=["standalone", "empty", "ray"]
    )
    options = parser.parse_args()
    found = {}
    for way in options.ways:
        with running(command_of(way, options.model)) as pid:
            found[way] = idle_cores(pid, options.settle, options.seconds)
    print(table(found))


if __name__ == "__main__":
    main()
