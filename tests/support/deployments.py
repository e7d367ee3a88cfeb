"""A Ray cluster of one node whose Serve application a test changes while it is used, as an operator
does with `serve deploy`."""

import copy
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from tests.support.hosts import DISK, Host, network
from tests.support.netns import Relay
from tests.support.processes import kill_marked, marked, new_mark
from tests.support.ray_nodes import GCS_PORT, NODE_ENVIRONMENT, ray_nodes
from tests.support.served import FAST_INGRESS, MODEL_NAME, ROOT, Served, serve_config
from tests.support.waiting import until

ENGINE, GATEWAY = "engine", "gateway"
_HTTP_PORT, _GRPC_PORT = 8000, 9000
NUM_CPUS = 8
"""Number of CPUs that the node reports: more engines than cores are enough for these tests."""
_HAPROXY = f"{DISK}/haproxy"
_ENVIRONMENT = FAST_INGRESS | {
    # On the host's own disk; Ray's default is one folder in /tmp for all HAProxy on a machine.
    "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{_HAPROXY}/haproxy.cfg",
    "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{_HAPROXY}/admin.sock",
    "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{_HAPROXY}/metrics.sock",
    "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": _HAPROXY,
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{_HAPROXY}/server-state",
}
_START_S = 120.0
_MAX_TOKENS = 16_000


@dataclass
class Deployments:
    """The cluster, and the config that was deployed last.

    Attributes:
        config: Serve's; change a copy and `deploy` it.
    """

    host: Host
    served: Served
    config: dict[str, Any]
    _operator: "subprocess.Popen[str]"

    @property
    def application(self) -> dict[str, Any]:
        """A copy of the first application in the config."""
        application: dict[str, Any] = copy.deepcopy(self.config["applications"][0])
        return application

    def deploy(self, application: Mapping[str, Any]) -> str | None:
        """Deploy this application; return Serve's immediate error, None if it accepts the
        application."""
        config = self.config | {"applications": [dict(application)]}
        answer = self._ask({"deploy": config})
        if "error" not in answer:
            self.config = config
        return answer.get("error")

    def scale(self, deployment: str, num_replicas: int) -> None:
        """Change only the number of the deployment's replicas."""
        application = self.application
        option(application, deployment)["num_replicas"] = num_replicas
        assert self.deploy(application) is None

    def take(self, num_cpus: int) -> None:
        """Have another application use this many of the node's NUM_CPUS from now on."""
        assert "error" not in self._ask({"take": num_cpus})

    def status(self) -> dict[str, Any]:
        """Return the application's status, message, and the statuses of its deployments."""
        answer: dict[str, Any] = self._ask({"status": True})["cantata"]
        return answer

    def wait_for(self, status: str, timeout_s: float = _START_S) -> dict[str, Any]:
        """Wait until the application has this status; return all of its status."""
        found: dict[str, Any] = {}

        def reached() -> bool:
            found.update(self.status())
            time.sleep(0.1)
            return bool(found["status"] == status)

        until(reached, timeout_s)
        return found

    def settle(self, timeout_s: float = _START_S, **num_replicas: int) -> None:
        """Wait until the application runs, with this many replicas of each deployment, and none
        that is stopping or starting."""

        def settled() -> bool:
            found = self.status()
            time.sleep(0.1)
            running = {name: found["deployments"].get(name, {}).get("replicas") for name in num_replicas}
            return found["status"] == "RUNNING" and running == {
                name: {"RUNNING": number} for name, number in num_replicas.items()
            }

        until(settled, timeout_s)

    def pids(self, deployment: str) -> set[int]:
        """Return the PIDs of the deployment's replicas, whatever their state."""
        return {
            int(process.split()[0])
            for process in marked(self.served.mark)
            if f"ServeReplica:cantata:{deployment}" in process
        }

    def logs(self, deployment: str) -> str:
        """Return the logs of the deployment's replicas."""
        disk = Path(f"/proc/{self.host.pid}/root{DISK}")
        files = sorted(disk.glob(f"ray/session_2*/logs/serve/replica_*{deployment}*.log"))
        return "".join(file.read_text(errors="replace") for file in files)

    def haproxy_config(self) -> str:
        """Return the config with which HAProxy was started."""
        (file,) = Path(f"/proc/{self.host.pid}/root{_HAPROXY}").rglob(
            "haproxy.cfg"
        )  # in a folder for each node
        return file.read_text()

    def _ask(self, command: Mapping[str, Any]) -> dict[str, Any]:
        assert self._operator.stdin is not None
        assert self._operator.stdout is not None
        self._operator.stdin.write(json.dumps(command) + "\n")
        self._operator.stdin.flush()
        line = self._operator.stdout.readline()
        assert line, "the operator's process has ended"
        answer: dict[str, Any] = json.loads(line)
        return answer


def option(application: Mapping[str, Any], deployment: str) -> dict[str, Any]:
    """Return an option of this deployment in the application's config."""
    (found,) = (entry for entry in application["deployments"] if entry["name"] == deployment)
    options: dict[str, Any] = found
    return options


@contextmanager
def deployments(
    folder: Path, model: Path, *, step_s: float = 0.0, environment: Mapping[str, str] | None = None
) -> Iterator[Deployments]:
    """Yield a running Ray on a host of its own, without an application.

    Args:
        step_s: seconds by which each step of an engine is made longer.
        environment: added to the node's.
    """
    mark = new_mark()
    slow = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests/support/slow_steps'}", "CANTATA_TEST_STEP_S": str(step_s)}
    with ExitStack() as stack:
        (host,) = stack.enter_context(network(1)).hosts
        variables = _ENVIRONMENT | slow | dict(environment or {})
        stack.enter_context(ray_nodes((host,), folder, mark, num_cpus=NUM_CPUS, environment=variables))
        # what is served need not end well, as it does for an operator
        stack.callback(kill_marked, mark)
        command = host.command([sys.executable, str(ROOT / "tests/support/serve_operator.py")])
        process = stack.enter_context(
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=(folder / "operator.log").open("w"),
                text=True,
                env=NODE_ENVIRONMENT
                | variables
                | mark
                | {"RAY_ADDRESS": f"{host.address}:{GCS_PORT}", "PATH": "/usr/bin:/bin"},
            )
        )
        stack.callback(process.kill)
        assert process.stdout is not None
        assert process.stdout.readline(), (folder / "operator.log").read_text()
        http, grpc = (stack.enter_context(Relay(host.pid, port)).port for port in (_HTTP_PORT, _GRPC_PORT))
        config = serve_config(model, (_HTTP_PORT, _GRPC_PORT), {})
        served = Served(
            "serve deploy", f"127.0.0.1:{http}", f"127.0.0.1:{grpc}", process, mark, folder / "operator.log"
        )  # type: ignore[arg-type]
        yield Deployments(host, served, config, process)


@dataclass
class Stream:
    """One client's stream.

    Attributes:
        num_events: number of events received.
        end: None while it runs; then `enough` if the client left it, else the reason of its end.
    """

    prompt: str
    text: str = ""
    num_events: int = 0
    end: str | None = None


class LongStreams:
    """Clients that read long answers until the block ends: two for each prompt, so that their texts
    can be compared."""

    def __init__(self, served: Served, num_streams: int) -> None:
        self.streams = [Stream(f"{number // 2} is a number") for number in range(num_streams)]
        self._served = served
        self._enough = threading.Event()
        self._pool = ThreadPoolExecutor(num_streams)

    def __enter__(self) -> "LongStreams":
        self._reading = [self._pool.submit(self._read, stream) for stream in self.streams]
        try:
            self.go_on()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._enough.set()
        self._pool.shutdown()

    def check(self) -> None:
        """Check that no stream has ended, and that those of one prompt have the same text."""
        self.check_running()
        for one, other in zip(self.streams[::2], self.streams[1::2], strict=True):
            length = min(len(one.text), len(other.text))
            assert length > 0
            assert one.text[:length] == other.text[:length]

    def go_on(self, num_events: int = 10) -> None:
        """Wait until each stream has this many events more."""
        wanted = [stream.num_events + num_events for stream in self.streams]

        def came() -> bool:
            self.check_running()
            return all(
                stream.num_events >= number for stream, number in zip(self.streams, wanted, strict=True)
            )

        until(came, 60)

    def check_running(self) -> None:
        """Check that no stream has ended."""
        assert [stream.end for stream in self.streams] == [None] * len(self.streams)

    def _read(self, stream: Stream) -> None:
        try:
            stream.end = self._events(stream)
        except httpx.HTTPError as error:
            stream.end = repr(error)

    def _events(self, stream: Stream) -> str:
        body = {
            "model": MODEL_NAME,
            "prompt": stream.prompt,
            "max_tokens": _MAX_TOKENS,
            "ignore_eos": True,
            "temperature": 0,
        }
        url = f"{self._served.url}/v1/completions"
        with httpx.stream("POST", url, json=body | {"stream": True}, timeout=60, trust_env=False) as response:
            if response.status_code != 200:
                return f"{response.status_code} {response.read()!r}"
            for line in response.iter_lines():
                if self._enough.is_set():
                    return "enough"
                if not line:
                    continue
                event = (
                    json.loads(line.removeprefix("data: "))
                    if line != "data: [DONE]"
                    else {"error": "its end"}
                )
                if "error" in event:
                    return str(event["error"])
                stream.text += event["choices"][0]["text"]
                stream.num_events += 1
        return "cut off"
