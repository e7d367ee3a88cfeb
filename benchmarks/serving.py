"""`cantata serve --standalone` under `cantata bench serve` at several numbers of clients:
throughput, latencies, and ratios to one client.

Server and load share the machine. Every step sends other random prompts, so none finds an earlier
one's in the prefix cache. Run from the repository root: `python3 -m benchmarks.serving --model
checkpoints/tiny [--clients 1 4 16 32] [--json FILE]`.
"""

import argparse
import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path

from cluster.commands.bench import serve
from cluster.commands.bench.report import Report

HTTP = re.compile(r"HTTP +(http://[\d.]+:\d+)/v1")


def standalone(model: Path, dtype: str, *flags: str) -> AbstractContextManager[str]:
    """Run `served` with `--standalone`."""
    return served(model, "--standalone", "--dtype", dtype, *flags)


@contextmanager
def served(model: Path, *flags: str) -> Iterator[str]:
    """Run `cantata serve` with more flags on free ports; yield its URL."""
    command = [
        str(Path(sys.executable).with_name("cantata")),
        "serve",
        "--model",
        str(model),
        "--http-port",
        "0",
        "--grpc-port",
        "0",
        *flags,
    ]
    # The summary is on stdout; progress and log stay on the terminal.
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            found = next((match for line in server.stdout if (match := HTTP.search(line))), None)
            if found is None:
                raise SystemExit("cantata serve did not start; its log above says why")
            yield found[1]
        finally:
            server.send_signal(signal.SIGINT)
            server.communicate(timeout=60)


def free_port() -> int:
    """Return a port on loopback that was free just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def measure(url: str, clients: int, options: argparse.Namespace) -> Report:
    """Run one step: four requests a client, at least sixteen."""
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    flags = [
        "--endpoint",
        "completions",
        "--ignore-eos",
        "--concurrency",
        str(clients),
        "--num-prompts",
        str(max(16, 4 * clients)),
    ]
    flags += [
        "--input-len",
        str(options.input_len),
        "--output-len",
        str(options.output_len),
        "--seed",
        str(clients),
        "--warmup",
        "2",
    ]
    return asyncio.run(serve.measure(parser.parse_args(flags), url))


def table(reports: dict[int, Report]) -> str:
    """Return Markdown; the last column compares output tokens a second with the first row's."""
    lines = [
        "| clients | requests | output tok/s | TTFT p50 / p99 ms | ITL p50 / p99 ms | TPOT mean ms | "
        "latency p50 ms | first = 1 |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    first = next(iter(reports.values()))
    for clients, report in reports.items():
        if report.ttft_s is None or report.itl_s is None or report.tpot_s is None or report.latency_s is None:
            raise SystemExit(f"{clients} clients: no answers; {report.errors}")
        cells = (
            f"{clients}",
            f"{report.num_completed}" + (f" ({report.num_failed} failed)" if report.num_failed else ""),
            f"{report.output_tokens_per_s:.0f}",
            f"{report.ttft_s.p50 * 1e3:.0f} / {report.ttft_s.p99 * 1e3:.0f}",
            f"{report.itl_s.p50 * 1e3:.1f} / {report.itl_s.p99 * 1e3:.1f}",
            f"{report.tpot_s.mean * 1e3:.1f}",
            f"{report.latency_s.p50 * 1e3:.0f}",
            f"{report.output_tokens_per_s / first.output_tokens_per_s:.2f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of a checkpoint")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--json", type=Path, help="write all reports there")
    options = parser.parse_args()
    with standalone(options.model, options.dtype) as url:
        reports = {clients: measure(url, clients, options) for clients in options.clients}
    print(table(reports))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(report) for report in reports.values()], indent=2) + "\n")


if __name__ == "__main__":
    main()
