"""The subcommands of `cantata bench`."""

import argparse
from collections.abc import Sequence

from cluster.bench import serve


def main(arguments: Sequence[str]) -> int:
    """Run `cantata bench ARGUMENTS…`; returns the exit code.

    Raises:
        ConfigError: the benchmark cannot be run as asked.
    """
    parser = argparse.ArgumentParser(prog="cantata bench", description="Measure a running server.", allow_abbrev=False)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    serving = commands.add_parser("serve", allow_abbrev=False, help="load over HTTP streaming: latencies, throughput, errors")
    serve.add_arguments(serving)
    serving.set_defaults(run=serve.run)
    options = parser.parse_args(arguments)
    return int(options.run(options))
