"""`serve deploy` and `serve status` in one process that stays: each of these commands takes seconds
to start.

Reads a line of JSON for each command from stdin and answers with one: {"deploy": CONFIG} → {},
{"status": true} → {application: …}, {"take": NUMBER} → {} when an actor has this many of the
cluster's CPUs (0: no longer). {"error": …} for a config that Serve refuses.
"""

import json
import os
import sys
from typing import Any

import ray
from ray import serve
from ray.serve._private.api import serve_start
from ray.serve.config import gRPCOptions
from ray.serve.schema import ServeDeploySchema


def deploy(content: dict[str, Any]) -> dict[str, Any]:
    config = ServeDeploySchema.model_validate(content)
    client = serve_start(
        http_options=config.http_options.model_dump(),
        proxy_location=config.proxy_location,
        grpc_options=gRPCOptions(**config.grpc_options.model_dump()),
        controller_options=config.controller_options,
    )
    client.deploy_apps(config, _blocking=False)
    return {}


class Taker:
    """An actor that holds CPUs."""

    def here(self) -> bool:
        return True


taken: list[Any] = []


def take(num_cpus: int) -> dict[str, Any]:
    while taken:
        ray.kill(taken.pop())
    if num_cpus:
        taken.append(ray.remote(Taker).options(num_cpus=num_cpus).remote())
        ray.get(taken[0].here.remote(), timeout=60)
    return {}


def answer(command: dict[str, Any]) -> dict[str, Any]:
    if "deploy" in command:
        return deploy(command["deploy"])
    return take(command["take"]) if "take" in command else status()


def status() -> dict[str, Any]:
    return {
        name: {
            "status": application.status,
            "message": application.message,
            "deployments": {
                name: {
                    "status": deployment.status,
                    "message": deployment.message,
                    "replicas": deployment.replica_states,
                }
                for name, deployment in application.deployments.items()
            },
        }
        for name, application in serve.status().applications.items()
    }


def main() -> None:
    # Ray prints to stdout as well.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    ray.init(address="auto", namespace="serve", log_to_driver=False)
    print(json.dumps({"connected": True}), file=answers, flush=True)
    for line in sys.stdin:
        try:
            said = answer(json.loads(line))
        except Exception as error:
            said = {"error": str(error)}
        print(json.dumps(said), file=answers, flush=True)


if __name__ == "__main__":
    main()
