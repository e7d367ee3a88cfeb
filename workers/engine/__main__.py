"""The engine process: `python3 -m workers.engine --config JSON-or-path`. It serves on a Unix socket
that only this user can reach, or with --address HOST:PORT on TCP, where callers have to send the
secret in $CANTATA_ENGINE_SECRET.

Progress, summary and log go to stderr. When it serves, it prints exactly one line on stdout:
{"event": "ready", "address": …, "start_id": …, "metrics_address": …}; with --heartbeats {"event":
"alive"} follows each second. Exit code 0 after SIGTERM, SIGINT (a second one skips the grace
period) or the RPC Drain, 1 if it cannot start or has died, and 128 + N if one of its ranks crashed
by signal N (`workers.exit_codes`). With --parent-pid the kernel kills it when that process ends:
its output has no reader then, and its memory is needed.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from contextlib import ExitStack, closing
from pathlib import Path

from workers.config import EngineConfig
from workers.config_json import engine_config_from_json
from workers.console import drain_output, keep_output_from_failing
from workers.engine.access import SECRET_VARIABLE
from workers.engine.collector import spare_collections
from workers.engine.heartbeat import beat, say_to
from workers.engine.progress import StartUpProgress, summary
from workers.engine.server import EngineServer
from workers.errors import CheckpointError, ConfigError, RankCrashed
from workers.exit_codes import FAILED, exit_code_of_crashed_rank
from workers.parent_death import die_with_parent
from workers.private_folder import PrivateFolder


def main() -> int:
    """Parse the flags and run; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python3 -m workers.engine", description="One engine process of Cantata."
    )
    parser.add_argument(
        "--config", required=True, help="EngineConfig as JSON, or the path of a file that holds it"
    )
    parser.add_argument(
        "--address",
        help=f"gRPC address: unix:PATH, or HOST:PORT (port 0 selects a free one) with a secret in "
        f"${SECRET_VARIABLE}; by default a "
        "socket in a new folder that only this user can reach",
    )
    parser.add_argument(
        "--metrics-port",
        type=int,
        help="serve Prometheus metrics over HTTP on this port of 127.0.0.1; 0 selects a free one",
    )
    parser.add_argument(
        "--grace-s", type=float, default=30.0, help="seconds for running requests to finish after SIGTERM"
    )
    parser.add_argument("--parent-pid", type=int, help="PID of the parent process, with which this one ends")
    parser.add_argument(
        "--heartbeats",
        action="store_true",
        help="write a heartbeat line to stdout (a pipe) each second",
    )
    arguments = parser.parse_args()
    keep_output_from_failing()
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    if arguments.parent_pid is not None and not die_with_parent(arguments.parent_pid):
        return 0
    try:
        config = _read_config(arguments.config)
        with ExitStack() as stack:
            address = (
                arguments.address
                or f"unix:{stack.enter_context(closing(PrivateFolder())).path / 'engine.sock'}"
            )
            return asyncio.run(_serve(config, address, arguments))
    except (CheckpointError, ConfigError) as error:
        return _explain(error)


def _explain(error: Exception | str) -> int:
    """Write why the engine ends to stderr; return the exit code."""
    print(f"error: {error}", file=sys.stderr)
    return exit_code_of_crashed_rank(error.signal) if isinstance(error, RankCrashed) else FAILED


def _read_config(argument: str) -> EngineConfig:
    if argument.lstrip().startswith("{"):
        return engine_config_from_json(argument)
    try:
        return engine_config_from_json(Path(argument).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration file {argument} cannot be read: {error}") from error


async def _serve(config: EngineConfig, address: str, arguments: argparse.Namespace) -> int:
    stop, hurry = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)

    progress = StartUpProgress()
    # Removed from the environment so that children do not inherit it.
    server = EngineServer(progress=progress, secret=os.environ.pop(SECRET_VARIABLE, None))
    starting = asyncio.create_task(server.start(config, address, metrics_port=arguments.metrics_port))
    await _first(starting, stop)
    if not starting.done():
        # A thread is reading weights and cannot be interrupted; nothing is lost. The next start
        # removes a partly written folder.
        drain_output()
        os._exit(0)
    bound = starting.result()
    spare_collections()
    progress.close()
    start_up = server.start_up
    table = summary(
        start_up.executor,
        model=f"{config.model_path} ({start_up.info.model_fingerprint[:12]})",
        longest_context=start_up.longest_context,
        address=bound,
        metrics_address=server.metrics_address,
        grammars=server.engine.grammars,
    )
    print(f"Cantata engine {start_up.info.version}\n{table}", file=sys.stderr, flush=True)
    ready = {
        "event": "ready",
        "address": bound,
        "start_id": start_up.info.start_id,
        "metrics_address": server.metrics_address,
    }
    print(json.dumps(ready), flush=True)
    await asyncio.to_thread(drain_output)  # heartbeats bypass its buffer
    if arguments.heartbeats:
        heartbeat = asyncio.create_task(
            beat(server.engine.watch, say_to(sys.stdout.fileno(), b'{"event": "alive"}\n'))
        )

    await _first(stop, server.ended)
    if not server.ended.is_set():
        await _first(asyncio.create_task(server.drain(arguments.grace_s)), hurry, server.ended)
    await server.stop()
    if arguments.heartbeats:
        heartbeat.cancel()
    if server.engine.error is not None:
        # When a rank crashes, others fail as well, and their errors may have arrived first.
        return _explain(server.engine.crash or server.engine.error)
    return 0


async def _first(*things: "asyncio.Event | asyncio.Task[object]") -> None:
    """Wait for the first of these. The others, if events, are no longer waited for; tasks
    continue."""
    waits = [
        thing if isinstance(thing, asyncio.Task) else asyncio.create_task(thing.wait()) for thing in things
    ]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for thing, wait in zip(things, waits, strict=True):
        if thing is not wait:
            wait.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await wait


if __name__ == "__main__":
    sys.exit(main())
