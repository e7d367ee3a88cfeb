"""An application that is changed while it is used: what is replaced, what clients notice, and what
becomes of a version that cannot run.

One Ray for all tests, on a host of its own. Engines take 30 ms longer for a step than a tiny model
needs, so that answers are as long as those of a large one.
"""

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.serve.ray_environment import RAY_ENVIRONMENT
from tests.e2e import scripts
from tests.support.deployments import ENGINE, GATEWAY, NUM_CPUS, Deployments, LongStreams, deployments, option
from tests.support.hosts import reason_for_no_hosts
from tests.support.many_streams import counted
from tests.support.served import MODEL_NAME
from tests.support.waiting import until

pytestmark = [pytest.mark.netns, pytest.mark.ray]

STEP_S = 0.03
NUM_STREAMS = 8
HARD_STOP = "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"


@pytest.fixture(scope="module")
def ray(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployments]:
    reason = reason_for_no_hosts()
    if reason is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("deployments")
    with deployments(
        folder, model, step_s=STEP_S, environment={HARD_STOP: RAY_ENVIRONMENT[HARD_STOP]}
    ) as running:
        yield running


@pytest.fixture(scope="module")
def served(ray: Deployments) -> Deployments:
    """Two engines and two gateways serve. What came before: a cluster that is full, for many times
    as long as a start may take."""
    application = ray.application
    application["args"]["engine"]["parallel"] = {"start_timeout_s": 0.1}
    for name in (ENGINE, GATEWAY):
        option(application, name)["num_replicas"] = 2
    ray.take(NUM_CPUS)
    assert ray.deploy(application) is None
    until(lambda: ask(ray).status_code == 503, 60)
    for _ in range(20):
        refused = ask(ray)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_replica")
        assert int(refused.headers["retry-after"]) >= 1
    assert ray.status()["status"] == "DEPLOYING"
    ray.take(0)
    ray.settle(engine=2, gateway=2)
    return ray


def test_a_cluster_that_is_slow_to_come_is_waited_for(served: Deployments) -> None:
    assert "cannot start" not in served.status()["message"]
    assert ask(served).json()["choices"][0]["message"]["content"] == scripts.GREETING_ANSWER


def test_scaling_replaces_nothing_and_cuts_no_stream(served: Deployments) -> None:
    assert f"hard-stop-after {RAY_ENVIRONMENT[HARD_STOP]}s" in served.haproxy_config()
    with LongStreams(served.served, NUM_STREAMS) as streams:
        engines, gateways = served.pids(ENGINE), served.pids(GATEWAY)
        served.scale(ENGINE, 3)
        served.settle(engine=3, gateway=2)
        assert engines < served.pids(ENGINE)
        served.scale(ENGINE, 2)
        until(lambda: running(served, ENGINE) == 2, 30)
        served.scale(GATEWAY, 3)
        until(lambda: running(served, GATEWAY) == 3, 60)
        assert gateways < served.pids(GATEWAY)
        served.scale(GATEWAY, 2)
        until(lambda: running(served, GATEWAY) == 2, 30)
        streams.go_on()
        streams.check()
    served.settle(engine=2, gateway=2)


def test_gateways_take_settings_over_while_they_run(served: Deployments) -> None:
    with LongStreams(served.served, 2) as streams:
        engines, gateways = served.pids(ENGINE), served.pids(GATEWAY)
        for user_config, status in (
            ({"max_in_flight_requests": 4}, 400),
            ({"max_in_flight_request": 4}, 400),
            ({}, 200),
        ):
            application = served.application
            option(application, GATEWAY)["user_config"] = user_config
            assert served.deploy(application) is None
            # Each of some requests to each gateway.
            until(lambda wanted=status: {ask(served, n=5).status_code for _ in range(6)} == {wanted}, 30)  # type: ignore[misc]
        assert "the gateway keeps its previous settings: user_config" in served.logs(GATEWAY)
        streams.go_on()
        streams.check()
        assert (served.pids(ENGINE), served.pids(GATEWAY)) == (engines, gateways)
    served.settle(engine=2, gateway=2)


def test_what_cannot_be_built_leaves_what_runs(served: Deployments, model: Path, tmp_path: Path) -> None:
    cut_off = shutil.copytree(model, tmp_path / "cut-off")
    (weights,) = cut_off.glob("*.safetensors")
    os.truncate(weights, weights.stat().st_size - 1)
    good = served.application
    engines, gateways = served.pids(ENGINE), served.pids(GATEWAY)
    with LongStreams(served.served, 2) as streams:
        for path, said in ((tmp_path / "nowhere", "is not a folder"), (cut_off, str(weights))):
            application = served.application
            application["args"]["engine"]["model_path"] = str(path)
            check_refused(served, application, said)
        application = served.application
        del application["external_scaler_enabled"], option(application, ENGINE)["num_replicas"]
        option(application, ENGINE)["autoscaling_config"] = {
            "min_replicas": 1,
            "max_replicas": 2,
            "downscale_delay_s": 0,
        }
        check_refused(served, application, "deployment engine: Serve's autoscaling does not see the requests")
        streams.go_on()
        streams.check()
    assert (served.pids(ENGINE), served.pids(GATEWAY)) == (engines, gateways)
    assert served.deploy(good) is None
    served.settle(engine=2, gateway=2)
    assert (served.pids(ENGINE), served.pids(GATEWAY)) == (engines, gateways)


def test_another_setting_replaces_all_and_cuts_no_stream(served: Deployments) -> None:
    before = served.pids(ENGINE) | served.pids(GATEWAY)
    with LongStreams(served.served, NUM_STREAMS) as streams:
        application = served.application
        application["args"]["engine"]["scheduler"] = {"max_num_seqs": 32}
        option(application, ENGINE)["max_surge_percent"] = 50
        assert served.deploy(application) is None
        # Those of before drain for as long as their streams run.
        until(
            lambda: replicas(served, ENGINE) == replicas(served, GATEWAY) == {"RUNNING": 2, "STOPPING": 2},
            120,
        )
        streams.go_on()
        streams.check()
        assert len((served.pids(ENGINE) | served.pids(GATEWAY)) - before) == 4
    served.settle(engine=2, gateway=2)
    assert not (served.pids(ENGINE) | served.pids(GATEWAY)) & before


def test_a_gateway_that_dies_ends_its_own_requests_alone(served: Deployments) -> None:
    with LongStreams(served.served, 4) as streams:
        victim = min(served.pids(GATEWAY))
        os.kill(victim, signal.SIGKILL)
        answers = [ask(served) for _ in range(4)]
        assert {answer.status_code for answer in answers} == {200}, "the other gateway takes them"
        until(lambda: any(stream.end for stream in streams.streams), 30)
        left = sum(stream.end is None for stream in streams.streams)
        assert 0 < left < 4
        # The engines are rid of the others' requests, while no client has left.
        until(lambda: counted(served.served, "cantata_engine_running_requests") == left, 10)
        assert sum(stream.end is None for stream in streams.streams) == left
    served.settle(engine=2, gateway=2)


def test_requests_after_the_only_gateway_died_wait_for_the_next(served: Deployments) -> None:
    served.scale(GATEWAY, 1)
    served.settle(engine=2, gateway=1)
    (victim,) = served.pids(GATEWAY)
    os.kill(victim, signal.SIGKILL)
    until(lambda: victim not in served.pids(GATEWAY), 10)
    for answer in (ask(served) for _ in range(4)):
        # HAProxy has its own answer to a request that it had sent to the gateway before it noticed.
        own = answer.status_code == 500 and answer.text == "Internal Server Error"
        assert answer.status_code in (200, 503) or own, answer.text
    until(lambda: ask(served).status_code == 200, 60)
    served.settle(engine=2, gateway=1)


@pytest.mark.slow
@pytest.mark.parametrize(("hard_stop_s", "is_cut"), [(5, True), (60, False)])
def test_how_long_streams_outlive_a_reload(
    model: Path, tmp_path: Path, hard_stop_s: int, is_cut: bool
) -> None:
    """It is this variable that decides it, and a new gateway is enough of a change."""
    with deployments(tmp_path, model, step_s=STEP_S, environment={HARD_STOP: str(hard_stop_s)}) as ray:
        assert ray.deploy(ray.application) is None
        ray.settle(engine=1, gateway=1)
        with LongStreams(ray.served, 2) as streams:
            ray.scale(GATEWAY, 2)
            ray.settle(engine=1, gateway=2)
            reloaded = time.monotonic()
            until(
                lambda: any(stream.end for stream in streams.streams) or time.monotonic() > reloaded + 25, 60
            )
            assert [stream.end is not None for stream in streams.streams] == [is_cut] * 2


@pytest.mark.slow
@pytest.mark.parametrize(("surge", "left"), [(50, 2), (0, 1)])
def test_engines_that_die_while_they_load_stop_the_update(served: Deployments, surge: int, left: int) -> None:
    good = served.application
    old = served.pids(ENGINE)
    application = served.application
    application["args"]["engine"]["scheduler"] = {"max_num_seqs": 16 + surge}
    option(application, ENGINE)["max_surge_percent"] = surge
    with LongStreams(served.served, 4) as streams, killing(served, old):
        assert served.deploy(application) is None
        status = served.wait_for("DEPLOY_FAILED")
        assert "The update is stopped" in status["deployments"][ENGINE]["message"]
        assert running(served, ENGINE) == left
        assert ask(served).status_code == 200
        streams.go_on()
        streams.check()
    assert served.deploy(good) is None
    served.settle(engine=2, gateway=option(good, GATEWAY)["num_replicas"])
    assert len(served.pids(ENGINE) & old) == left


class killing:
    """Kills every engine but these as soon as its process is there, until the block ends."""

    def __init__(self, served: Deployments, spared: set[int]) -> None:
        self._served = served
        self._spared = spared
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._kill)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _kill(self) -> None:
        while not self._over.wait(0.2):
            for pid in self._served.pids(ENGINE) - self._spared:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def check_refused(served: Deployments, application: dict[str, Any], said: str) -> None:
    """Check that the application fails with this sentence, and goes on serving."""
    assert served.deploy(application) is None
    until(lambda: said in served.status()["message"], 60)
    assert served.status()["status"] == "DEPLOY_FAILED"
    assert ask(served).status_code == 200


def running(served: Deployments, deployment: str) -> int:
    """Return the number of replicas that serve; those that stop are not counted."""
    return replicas(served, deployment).get("RUNNING", 0)


def replicas(served: Deployments, deployment: str) -> dict[str, int]:
    """Return the number of the deployment's replicas in each state."""
    found: dict[str, int] = served.status()["deployments"].get(deployment, {}).get("replicas", {})
    return found


def ask(served: Deployments, **fields: object) -> httpx.Response:
    body = {"model": MODEL_NAME, "messages": [{"role": "user", "content": scripts.GREETING}]} | fields
    return httpx.post(f"{served.served.url}/v1/chat/completions", json=body, timeout=60, trust_env=False)
