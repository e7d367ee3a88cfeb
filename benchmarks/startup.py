"""Where the time goes until a model is served, phase by phase: of one engine, and of `cantata serve
--standalone`.

Each run is a fresh process; figures are medians over the runs. The first run on a machine also
reads files from the disk that later ones find in memory: `--drop-first` leaves it out. Run from the
repository root: `python3 -m benchmarks.startup --model checkpoints/tiny [--runs N] [--json FILE]`.
"""

import argparse
import json
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

TIMEOUT_S = 300.0

# The engine's phases, from inside: the executor reports its own, the rest is time between calls.
# argv: spawn time, config as JSON.
ENGINE_CHILD = """
import time; started = time.time()
import asyncio, json, sys
from workers.config_json import engine_config_from_json
from workers.engine.server import EngineServer
imported = time.time()
first_phase = []
async def main():
    config = engine_config_from_json(sys.argv[2])
    server = EngineServer(progress=lambda phase, done, total: first_phase.append(time.time()))
    await server.start(config, "127.0.0.1:0")
    ready = time.time()
    executor = server.start_up.executor.phases_s
    phases = {"start Python": started - float(sys.argv[1]), "import": imported - started,
              "config": first_phase[0] - imported}
    phases |= executor
    phases["serve gRPC"] = ready - first_phase[0] - sum(executor.values())
    print(json.dumps(phases), flush=True)
    await server.stop()
asyncio.run(main())
"""

# What `cantata serve --standalone` prints, in order, and the phase that ends with it.
MILESTONES = (
    ("import and config", re.compile(r"load weights")),
    ("engine", re.compile(r"Cantata engine ")),
    ("gateway", re.compile(r"HTTP +(http://[\d.]+:\d+)/v1")),
)


@dataclass(frozen=True, slots=True)
class Table:
    """Median seconds of each phase, in order."""

    name: str
    runs: int
    phases_s: dict[str, float]

    def __str__(self) -> str:
        total = sum(self.phases_s.values())
        lines = [
            f"{self.name}, median of {self.runs}",
            *(f"  {phase:<24}{s:8.2f} s {s / total:6.0%}" for phase, s in self.phases_s.items()),
        ]
        return "\n".join([*lines, f"  {'total':<24}{total:8.2f} s"])


def engine_phases(model: Path, dtype: str) -> dict[str, float]:
    """Return the seconds by phase of one engine in a new process."""
    config = json.dumps({"model_path": str(model), "dtype": dtype})
    command = [sys.executable, "-c", ENGINE_CHILD, str(time.time()), config]
    done = subprocess.run(command, stdout=subprocess.PIPE, timeout=TIMEOUT_S, check=True, text=True)
    phases: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return phases


def standalone_phases(model: Path, dtype: str) -> dict[str, float]:
    """Return the seconds by phase of `cantata serve --standalone`, seen from outside, until it has
    answered a chat with one token."""
    command = [
        str(Path(sys.executable).with_name("cantata")),
        "serve",
        "--standalone",
        "--model",
        str(model),
        "--dtype",
        dtype,
    ]
    last = time.perf_counter()
    phases: dict[str, float] = {}

    def end_phase(name: str) -> None:
        nonlocal last
        now = time.perf_counter()
        phases[name], last = now - last, now

    with subprocess.Popen(
        [*command, "--http-port", "0", "--grpc-port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as server:
        try:
            assert server.stdout is not None
            url = ""
            for name, pattern in MILESTONES:
                found = next((match for line in server.stdout if (match := pattern.search(line))), None)
                if found is None:
                    raise SystemExit(f"cantata serve ended before the phase {name!r} was over")
                end_phase(name)
                url = found[1] if found.groups() else url
            with httpx.Client(base_url=url, timeout=TIMEOUT_S, trust_env=False) as client:
                client.get("/ready").raise_for_status()
                end_phase("ready")
                body = {
                    "messages": [{"role": "user", "content": "Hello"}],
                    "max_tokens": 1,
                    "model": model.resolve().name,
                }
                client.post("/v1/chat/completions", json=body).raise_for_status()
                end_phase("first chat")
        finally:
            server.send_signal(signal.SIGINT)
            server.communicate(timeout=60)
    return phases


def medians(name: str, runs: Sequence[dict[str, float]]) -> Table:
    """Return the medians; the runs have the same phases."""
    return Table(name, len(runs), {phase: statistics.median(run[phase] for run in runs) for phase in runs[0]})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of a checkpoint")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--drop-first", action="store_true", help="one run more, whose times do not count")
    parser.add_argument("--json", type=Path, help="write the tables there")
    options = parser.parse_args()
    tables = []
    for name, measure in (("engine", engine_phases), ("cantata serve --standalone", standalone_phases)):
        runs = [measure(options.model, options.dtype) for _ in range(options.runs + options.drop_first)]
        tables.append(medians(name, runs[int(options.drop_first) :]))
        print(tables[-1], flush=True)
    if options.json is not None:
        result = {"model": str(options.model), "dtype": options.dtype, "runs": options.runs}
        options.json.write_text(
            json.dumps(result | {table.name: table.phases_s for table in tables}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
