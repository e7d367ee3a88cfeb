"""A Ray cluster of several nodes, each on a host of its own (tests/support/hosts.py), started with
`ray start` as by an operator, and `serve run` on the first of them."""

import contextlib
import json
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import yaml

from tests.support.hosts import DISK, Host
from tests.support.netns import Relay
from tests.support.processes import kill_marked
from tests.support.served import (
    BIN,
    RAY_ENVIRONMENT,
    ROOT,
    Served,
    serve_config,
    started,
    wait_for,
    wait_until_ready,
)

GCS_PORT = 6379
HEAD_ONLY = "head_only"
"""Name of a resource that only the first node has, so that a Serve file can keep something
there."""
CPUS_PER_NODE = 1
_STOP_S = 20.0

# Nodes have addresses of their own here, and are not kept on loopback.
NODE_ENVIRONMENT = {
    name: value for name, value in RAY_ENVIRONMENT.items() if name != "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
} | {
    # On a slow machine a link may stay cut for longer than Ray would wait for a node.
    "RAY_health_check_failure_threshold": "50",
    "RAY_TMPDIR": DISK,
    "TMPDIR": DISK,
    "PYTHONPATH": str(ROOT),
}


@contextmanager
def ray_nodes(
    hosts: tuple[Host, ...],
    folder: Path,
    mark: dict[str, str],
    *,
    num_cpus: int = CPUS_PER_NODE,
    environment: Mapping[str, str] | None = None,
) -> Iterator[None]:
    """Yield a head on the first host and a node that joins it on each of the others; at the end all
    processes with the mark are ended.

    Args:
        num_cpus: number of CPUs that each node reports.
        environment: added to each node's.
    """
    with ExitStack() as stack:
        stack.callback(kill_marked, mark)
        for host in hosts:
            flags = [
                "--include-log-monitor=false",
                "--object-store-memory=80000000",
                f"--num-cpus={num_cpus}",
            ]
            if host is hosts[0]:
                flags += [
                    "--head",
                    f"--port={GCS_PORT}",
                    "--include-dashboard=false",
                    f"--resources={json.dumps({HEAD_ONLY: 1})}",
                ]
            else:
                flags += [f"--address={hosts[0].address}:{GCS_PORT}"]
            command = host.command(
                [str(BIN / "ray"), "start", "--block", f"--node-ip-address={host.address}", *flags]
            )
            node = stack.enter_context(
                started(
                    f"ray node {host.number}",
                    command,
                    folder,
                    NODE_ENVIRONMENT | dict(environment or {}),
                    mark,
                )
            )
            stack.callback(_stop, node)
            wait_for(node, "Ray runtime started")
        yield


@contextmanager
def serve_run_on(
    host: Host, folder: Path, model: Path, mark: dict[str, str], *, parallel: Mapping[str, float]
) -> Iterator[Served]:
    """Start `serve run` on that host with a copy of deploy/local.yaml for several nodes, in
    float32.

    A rank wants all CPUs of a node, so that no two can share one. The gateway, the engine and its
    rank 0 stay on the head.
    """
    ports = 8000, 9000
    config = serve_config(model, ports, {"dtype": "float32", "parallel": dict(parallel)}) | {
        "proxy_location": "HeadOnly"
    }
    (application,) = config["applications"]
    del application["args"]["engine_host"]
    bundles = [{"CPU": CPUS_PER_NODE} for _ in range(int(parallel["tensor"]))]
    application["deployments"] = [
        {"name": "gateway", "ray_actor_options": {"num_cpus": 0, "resources": {HEAD_ONLY: 0.01}}},
        {"name": "engine", "placement_group_bundles": [bundles[0] | {HEAD_ONLY: 0.01}, *bundles[1:]]},
    ]
    file = folder / "several-nodes.yaml"
    file.write_text(yaml.safe_dump(config))
    command = host.command([str(BIN / "serve"), "run", str(file)])
    environment = NODE_ENVIRONMENT | {"RAY_ADDRESS": f"{host.address}:{GCS_PORT}"}
    with started("serve run", command, folder, environment, mark) as served, ExitStack() as stack:
        http, grpc = (stack.enter_context(Relay(host.pid, port)).port for port in ports)
        served.http, served.grpc = f"127.0.0.1:{http}", f"127.0.0.1:{grpc}"
        wait_until_ready(served)
        yield served


def _stop(node: Served) -> None:
    """End `ray start --block` as an operator does."""
    if node.process.poll() is None:
        node.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            node.process.wait(_STOP_S)


def engine_log(host: Host) -> str:
    """Return the logs of the engines on this host."""
    disk = Path(f"/proc/{host.pid}/root{DISK}")
    return "".join(
        file.read_text(errors="replace")
        for file in sorted(disk.glob("ray/session_2*/logs/serve/replica_*engine*.log"))
    )
