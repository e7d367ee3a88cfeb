"""The subcommands of `cantata bench`."""

import argparse
from collections.abc import Sequence

from cluster.commands.bench import engine, serve


def main(arguments: Sequence[str]) -> int:
    """Run `cantata bench ARGUMENTS…`; return the exit code.

    Raises:
        ConfigError: the benchmark cannot be run as requested.
    """
    parser = argparse.ArgumentParser(
        prog="cantata bench",
        description="Measure a running server, or an engine in this process.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    serving = commands.add_parser(
        "serve", allow_abbrev=False, help="load over HTTP streaming: latencies, throughput, errors"
    )
    serve.add_arguments(serving)
    serving.set_defaults(run=serve.run)
    offline = commands.add_parser(
        "engine", allow_abbrev=False, help="an engine in this process: throughput, latency, profile of a step"
    )
    engine.add_arguments(offline)
    offline.set_defaults(run=engine.run)
    options = parser.parse_args(arguments)
    return int(options.run(options))
