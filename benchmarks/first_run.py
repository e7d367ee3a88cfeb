"""Where the time goes from a fresh clone to the first answer, phase by phase, and of a second
`make serve`.

Clones the repository's last commit into a temporary folder, runs `make serve` there, asks the
README's question, ends the server, and starts it once more. What was downloaded before comes from
the installers' caches unless `--no-cache` is given. Run from the repository root:

    python3 -m benchmarks.first_run [--no-cache] [--json FILE]

Needs about 3 GB where temporary files are (TMPDIR), and no package beyond Python itself.
"""

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 1800.0
LISTENS_WITHIN_S = 10.0
QUESTION = "What is 47 + 38?"
IMPORTS = "import cluster.cli, cluster.standalone.serve, workers.engine.server"
NO_CACHE = {"UV_NO_CACHE": "1", "PIP_NO_CACHE_DIR": "1"}

# What `make serve` prints, and the phase that ends with it. A line that never comes (pip prints
# nothing when it has everything) leaves its phase to the next one.
MILESTONES = (
    ("make .venv, get uv", re.compile("^Installing Cantata")),
    ("download, compile the C++", re.compile("^  prepared")),
    ("install", re.compile("^  installed")),
    ("import and config", re.compile("load weights")),
    ("engine", re.compile("^Cantata engine ")),
    ("gateway", re.compile(r"HTTP +(http://[\d.]+:\d+)/v1")),
)


@dataclass(frozen=True, slots=True)
class Run:
    """One `make serve`.

    Attributes:
        phases_s: seconds of each phase, in order.
        answer: what the model answered.
        warnings: lines of the output that warn.
    """

    phases_s: dict[str, float]
    answer: str
    warnings: list[str]

    @property
    def total_s(self) -> float:
        return sum(self.phases_s.values())


def measure(folder: Path, environment: dict[str, str]) -> Run:
    """Run `make serve` in a clone until it has answered."""
    phases_s: dict[str, float] = {}
    warnings: list[str] = []
    left = list(MILESTONES)
    last, url = time.perf_counter(), ""
    with _serving(folder, environment) as lines:
        for line in lines:
            if "warning" in line.lower():
                warnings.append(line.rstrip())
            for index, (name, pattern) in enumerate(left):
                if found := pattern.search(line):
                    now = time.perf_counter()
                    phases_s[name], last = now - last, now
                    url = found[1] if found.groups() else url
                    del left[: index + 1]
                    break
            if not left:
                break
        if left:
            raise SystemExit(f"make serve ended before the phase {left[0][0]!r} was over")
        answer = ask(url)
        phases_s["first answer"] = time.perf_counter() - last
    return Run(phases_s, answer, warnings)


@contextmanager
def _serving(folder: Path, environment: dict[str, str]) -> Iterator[Iterator[str]]:
    """Give the lines that `make serve` prints; its processes end with the context."""
    ports = [f"HTTP_PORT={_free_port()}", f"GRPC_PORT={_free_port()}"]
    with subprocess.Popen(
        ["make", "serve", *ports],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as server:
        assert server.stdout is not None
        try:
            yield _shown(server.stdout)
        finally:
            os.killpg(server.pid, signal.SIGINT)
            try:
                server.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)


def _shown(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        print(f"    {line}", end="", flush=True, file=sys.stderr)
        yield line


def ask(url: str) -> str:
    """Ask the served model the README's question; the summary is printed just before the server
    listens."""
    deadline = time.monotonic() + LISTENS_WITHIN_S
    while True:
        try:
            with urllib.request.urlopen(f"{url}/v1/models", timeout=TIMEOUT_S) as response:
                model = json.load(response)["data"][0]["id"]
            break
        except urllib.error.URLError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
    body = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 300}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
        return str(json.load(response)["choices"][0]["message"]["content"])


def import_s(folder: Path, runs: int = 3) -> float:
    """Return the least seconds that a process takes to import what serving needs."""
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        subprocess.run([folder / ".venv/bin/python", "-c", IMPORTS], cwd=folder, check=True)
        times.append(time.perf_counter() - started)
    return min(times)


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def table(name: str, run: Run) -> str:
    lines = [f"  {phase:<28}{s:8.1f} s" for phase, s in run.phases_s.items()]
    return "\n".join([name, *lines, f"  {'total':<28}{run.total_s:8.1f} s", f"  answer: {run.answer!r}"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--no-cache", action="store_true", help="download everything anew")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args(arguments)
    environment = {key: text for key, text in os.environ.items() if key != "VIRTUAL_ENV"}
    environment |= NO_CACHE if options.no_cache else {}
    with tempfile.TemporaryDirectory(prefix="cantata-first-run-") as temporary:
        clone = Path(temporary) / "cantata"
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        first = measure(clone, environment)
        second = measure(clone, environment)
        imports_s = import_s(clone)
    print(table("from a fresh clone to the first answer", first))
    print(table("a second `make serve`", second))
    print(f"  {second.total_s / imports_s:.2f} times its imports alone ({imports_s:.1f} s)")
    for warning in first.warnings + second.warnings:
        print(f"a warning was shown: {warning}")
    if options.json:
        figures = {"first": first.phases_s, "second": second.phases_s, "imports_s": imports_s}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
