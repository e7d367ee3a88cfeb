"""A replica whose two ranks are on two nodes, and the link between them is cut.

Real `ray start` nodes on two hosts that are namespaces of this machine, a real `serve run`. Ray
itself takes a minute to give a node up; what has to notice is the engine's own watch over its
steps.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Semaphore
from typing import Any

import httpx
import pytest

from tests.e2e import scripts
from tests.e2e.one_rank import PROMPTS, Answer, answers_of_one_rank, check_answers, completion
from tests.support.hosts import DISK, SHARED_MEMORY, Host, Network, network, reason_for_no_hosts
from tests.support.processes import marked, new_mark
from tests.support.ray_nodes import engine_log, ray_nodes, serve_run_on
from tests.support.served import MODEL_NAME, Served
from tests.support.waiting import until

pytestmark = [pytest.mark.netns, pytest.mark.ray]

STEP_TIMEOUT_S = 3.0
NUM_STREAMS = 4
PLACEMENT = [{"engine": 1, "rank": 1}, {"engine": 0, "rank": 1}]
"""Placement of the ranks: one on the head, one on the other node."""
WATCHDOG = (
    f"has no result after {STEP_TIMEOUT_S:g} s (engine.parallel.step_timeout_s): a rank hangs, "
    "or the network between ranks is down"
)


@dataclass(frozen=True)
class TwoNodes:
    """A running cluster with one replica of two ranks."""

    network: Network
    served: Served

    @property
    def head(self) -> Host:
        return self.network.hosts[0]

    @property
    def worker(self) -> Host:
        return self.network.hosts[1]

    def replica(self, host: Host) -> dict[str, list[int]]:
        """Return the process ids of engines and ranks on that host."""
        found: dict[str, list[int]] = {"engine": [], "rank": []}
        for process in marked(self.served.mark):
            pid = int(process.split()[0])
            for kind, name in (("engine", "ServeReplica:cantata:engine"), ("rank", "_RankActor")):
                if name in process and is_on(host, pid):
                    found[kind].append(pid)
        return found

    def pids(self, *hosts: Host) -> set[int]:
        """Return the PIDs of engines and ranks together, on these hosts or on all."""
        return {
            pid
            for host in hosts or self.network.hosts
            for pids in self.replica(host).values()
            for pid in pids
        }


@pytest.fixture(scope="module")
def two_nodes(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    reason = reason_for_no_hosts()
    if reason is not None:
        pytest.skip(reason)
    folder, mark = tmp_path_factory.mktemp("two-nodes"), new_mark()
    parallel = {"tensor": 2, "step_timeout_s": STEP_TIMEOUT_S, "start_timeout_s": 60}
    with ExitStack() as stack:
        net = stack.enter_context(network(2))
        stack.enter_context(ray_nodes(net.hosts, folder, mark))
        served = stack.enter_context(serve_run_on(net.hosts[0], folder, model, mark, parallel=parallel))
        yield TwoNodes(net, served)


@pytest.fixture(scope="module")
def expected(model: Path) -> list[Answer]:
    return answers_of_one_rank(model)


def test_ranks_on_two_nodes_answer_as_one(two_nodes: TwoNodes, expected: list[Answer]) -> None:
    # The engine runs beside rank 0, the one that answers.
    assert [
        {kind: len(pids) for kind, pids in two_nodes.replica(host).items()}
        for host in two_nodes.network.hosts
    ] == PLACEMENT
    assert greeting(two_nodes.served) == scripts.GREETING_ANSWER
    check_answers(two_nodes.served, expected)


def test_a_cut_link_ends_every_request_once_and_the_replica_comes_back(
    two_nodes: TwoNodes, expected: list[Answer]
) -> None:
    served, head, worker = two_nodes.served, two_nodes.head, two_nodes.worker
    near, far = two_nodes.pids(head), two_nodes.pids(worker)
    began = [Semaphore(0) for _ in range(NUM_STREAMS)]
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        streams = [pool.submit(read_stream, served, number, began[number]) for number in range(NUM_STREAMS)]
        for events in began:  # all of them run
            for _ in range(10):
                assert events.acquire(timeout=60)
        two_nodes.network.cut(worker)
        try:
            for stream in streams:
                check_cut_off(stream.result())
            assert WATCHDOG in engine_log(head)
            until(lambda: not near & two_nodes.pids(head), 30)
            refused = httpx.post(
                f"{served.url}/v1/completions", json=completion(PROMPTS[0]), timeout=30, trust_env=False
            )
            assert refused.status_code == 503
        finally:
            two_nodes.network.mend(worker)
    until(lambda: not far & two_nodes.pids(worker), 60)
    until(lambda: is_ready(served), 120)
    assert not (near | far) & two_nodes.pids()
    assert [
        {kind: len(pids) for kind, pids in two_nodes.replica(host).items()}
        for host in two_nodes.network.hosts
    ] == PLACEMENT
    assert greeting(served) == scripts.GREETING_ANSWER
    check_answers(served, expected)
    for host in two_nodes.network.hosts:
        assert [file for file in host.files(DISK) if "ray" not in file.parts] == []
        assert host.files(SHARED_MEMORY) == []


def test_it_stops_cleanly_and_leaves_nothing(two_nodes: TwoNodes) -> None:
    """The last test: it ends the replica that the others use."""
    assert two_nodes.served.stop() == 0
    until(lambda: not two_nodes.pids(), 30)
    assert scripts.GREETING not in two_nodes.served.log.read_text(errors="replace")


def check_cut_off(events: list[dict[str, Any]]) -> None:
    """Check that a stream has tokens, then one error, then the end."""
    *tokens, error, end = events
    assert end == {}
    assert error["error"]["code"] == "engine_unavailable"
    assert len(tokens) >= 1
    assert {choice["finish_reason"] for event in tokens for choice in event["choices"]} == {None}


def greeting(served: Served) -> str:
    """Return the answer to the greeting, which is the model's scripted one if all ranks work."""
    body = {"model": MODEL_NAME, "messages": [{"role": "user", "content": scripts.GREETING}]}
    answer = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=60, trust_env=False)
    return str(answer.json()["choices"][0]["message"]["content"])


def read_stream(served: Served, number: int, began: Semaphore) -> list[dict[str, Any]]:
    """Return the events of a stream that would go on for long; {} stands for its end event."""
    body = completion(PROMPTS[number % len(PROMPTS)], max_tokens=16_000, stream=True)
    events: list[dict[str, Any]] = []
    # A read times out if nothing comes for so long: an end that does not come fails the test.
    with httpx.stream(
        "POST", f"{served.url}/v1/completions", json=body, timeout=10 * STEP_TIMEOUT_S, trust_env=False
    ) as response:
        for line in response.iter_lines():
            if line:
                text = line.removeprefix("data: ")
                events.append({} if text == "[DONE]" else json.loads(text))
                began.release()
    return events


def is_on(host: Host, pid: int) -> bool:
    with contextlib.suppress(OSError):  # gone
        return os.readlink(f"/proc/{pid}/ns/net") == os.readlink(f"/proc/{host.pid}/ns/net")
    return False


def is_ready(served: Served) -> bool:
    try:
        return httpx.get(f"{served.url}/ready", timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False
