"""Real servers for end-to-end tests: `cantata serve --standalone`, `serve run` and `cantata serve`,
started as a user starts them."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.support.netns import Relay, can_isolate, isolated
from tests.support.processes import kill_marked, marked, new_mark

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
MODEL_NAME = "scripted"
MAX_MODEL_LEN = 16384
_COMMON_FLAGS = (
    "--served-model-name",
    MODEL_NAME,
    "--conversation-date",
    "none",
    "--kv-cache-memory",
    "64MiB",
)
_COMMON_FLAGS += ("--max-model-len", str(MAX_MODEL_LEN))

# Ray is kept on loopback, quiet, small and quick to stop. Its ports need no token: nothing else can
# reach them.
RAY_ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0.5",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
}
FAST_INGRESS = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}


@dataclass
class Served:
    """A running server.

    Attributes:
        http, grpc: host:port, as the test process reaches them.
        mark: finds its processes.
        log: file of its output.
    """

    name: str
    http: str
    grpc: str
    process: "subprocess.Popen[bytes]"
    mark: dict[str, str]
    log: Path

    @property
    def url(self) -> str:
        return f"http://{self.http}"

    def stop(self, number: int = signal.SIGINT, timeout_s: float = 90) -> int:
        """Signal the process a user would signal, and wait; returns its exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout_s)


@contextmanager
def standalone(folder: Path, model: Path, *flags: str, stderr: int = subprocess.STDOUT) -> Iterator[Served]:
    """Start `cantata serve --standalone` on free ports.

    Args:
        stderr: descriptor of its log; by default the file of its other output.
    """
    command = [
        str(BIN / "cantata"),
        "serve",
        "--standalone",
        "--model",
        str(model),
        "--http-port",
        "0",
        "--grpc-port",
        "0",
    ]
    command += [*_COMMON_FLAGS, *flags]
    with started("standalone", command, folder, {}, stderr=stderr) as served:
        found = wait_for(served, r"HTTP +http://([\d.:]+)/v1.*\n +gRPC +([\d.:]+) ")
        served.http, served.grpc = found[1], found[2]
        yield served


@contextmanager
def serve_run(
    folder: Path,
    model: Path,
    *,
    environment: Mapping[str, str] | None = None,
    engine: Mapping[str, object] | None = None,
    replicas: int = 1,
    gateways: int = 1,
) -> Iterator[Served]:
    """Start `serve run` with a copy of deploy/local.yaml that has our model and ports, and settings
    of the engine."""
    ports = _ray_ports()
    config = serve_config(model, ports, engine or {})
    for deployment, number in zip(
        config["applications"][0]["deployments"], (replicas, gateways), strict=True
    ):
        deployment["num_replicas"] = number
    file = folder / "local.yaml"
    file.write_text(yaml.safe_dump(config))
    with _ray_started(
        "serve run",
        [str(BIN / "serve"), "run", str(file)],
        folder,
        ports,
        RAY_ENVIRONMENT | dict(environment or {}),
    ) as served:
        yield served


def serve_config(model: Path, ports: tuple[int, int], engine: Mapping[str, object]) -> dict[str, Any]:
    """Return deploy/local.yaml with our model and settings of the engine; HTTP and gRPC on these
    ports."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "deploy/local.yaml").read_text())
    config["http_options"]["port"], config["grpc_options"]["port"] = ports
    arguments = config["applications"][0]["args"]
    arguments["engine"] = {
        "model_path": str(model),
        "max_model_len": MAX_MODEL_LEN,
        "cache": {"memory_bytes": "64MiB"},
    } | dict(engine)
    arguments["gateway"] = {"served_model_name": MODEL_NAME, "conversation_date": "none"}
    return config


@contextmanager
def cantata_serve(folder: Path, model: Path, *flags: str) -> Iterator[Served]:
    """Start `cantata serve` on a Ray that it starts."""
    ports = _ray_ports()
    command = [
        str(BIN / "cantata"),
        "serve",
        "--model",
        str(model),
        "--http-port",
        str(ports[0]),
        "--grpc-port",
        str(ports[1]),
    ]
    command += [*_COMMON_FLAGS, *flags]
    # The home folder: Ray writes its token there.
    with _ray_started("cantata serve", command, folder, ports, {"HOME": str(folder)}) as served:
        yield served


@contextmanager
def _ray_started(
    name: str, command: Sequence[str], folder: Path, ports: tuple[int, int], environment: Mapping[str, str]
) -> Iterator[Served]:
    with started(name, isolated_if_possible(command), folder, environment) as served, ExitStack() as stack:
        if can_isolate():
            _wait_for_namespace(served)
            reach = [stack.enter_context(Relay(served.process.pid, port)).port for port in ports]
        else:
            reach = list(ports)
        served.http, served.grpc = (f"127.0.0.1:{port}" for port in reach)
        wait_until_ready(served)
        yield served


def isolated_if_possible(command: Sequence[str]) -> list[str]:
    """Return the command, in a network namespace of its own where we may make one."""
    return isolated(command) if can_isolate() else list(command)


@contextmanager
def started(
    name: str,
    command: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    mark: dict[str, str] | None = None,
    stderr: int = subprocess.STDOUT,
) -> Iterator[Served]:
    """Run the command until the block ends; then kill all processes with its mark.

    Args:
        mark: None: a new one. A given mark is the caller's, and its other processes stay.
    """
    own = mark is None
    mark = mark or new_mark()
    log = folder / f"{name.replace(' ', '-')}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=stderr,
            cwd=ROOT,
            env={**os.environ, **environment, **mark, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # a group of its own, for a test that presses Ctrl-C
            # Where the tests run in the background of a script, SIGINT is ignored, and a child
            # inherits that; no user's terminal does so.
            preexec_fn=_heed_sigint,
        )
    served = Served(name, "", "", process, mark, log)
    try:
        yield served
    finally:
        if process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                served.stop()
        if own:
            kill_marked(mark)  # only after a failed test: nothing may outlive the run


def _heed_sigint() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _ray_ports() -> tuple[int, int]:
    if can_isolate():
        return 8000, 9000
    with socket.socket() as first, socket.socket() as second:
        for one in (first, second):
            one.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1]


def wait_for(served: Served, pattern: str, timeout_s: float = 120) -> re.Match[str]:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        text = served.log.read_text(errors="replace")
        if found := re.search(pattern, text):
            return found
        assert served.process.poll() is None, (
            f"{served.name} ended with {served.process.returncode}:\n{text[-4000:]}"
        )
        time.sleep(0.05)
    raise AssertionError(
        f"{served.name} did not print {pattern!r}:\n{served.log.read_text(errors='replace')[-4000:]}"
    )


def _wait_for_namespace(served: Served, timeout_s: float = 20) -> None:
    ours = os.readlink("/proc/self/ns/net")
    deadline = time.monotonic() + timeout_s
    while os.readlink(f"/proc/{served.process.pid}/ns/net") == ours:
        assert time.monotonic() < deadline, "no network namespace was made"
        time.sleep(0.01)


def wait_until_ready(served: Served, timeout_s: float = 180) -> None:
    """Wait until an engine takes requests."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{served.url}/ready", timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            pass
        assert served.process.poll() is None, (
            f"{served.name} ended:\n{served.log.read_text(errors='replace')[-4000:]}"
        )
        time.sleep(0.1)
    processes = "\n".join(marked(served.mark))
    raise AssertionError(
        f"{served.name} is not ready; "
        f"processes:\n{processes}\nlog:\n{served.log.read_text(errors='replace')[-6000:]}"
    )
