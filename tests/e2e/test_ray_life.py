"""The other ways to start on Ray: `cantata serve` with a Ray of its own, and `serve run` on a Ray
without preparation."""

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import grpc
import httpx
import pytest
import torch

from cluster.rpc import inference_pb2 as pb
from cluster.rpc import inference_pb2_grpc
from tests.e2e import scripts
from tests.e2e.one_rank import answers_of_one_rank, check_answers
from tests.support.many_streams import counted, read_many
from tests.support.processes import marked, none_left
from tests.support.served import (
    BIN,
    FAST_INGRESS,
    MODEL_NAME,
    Served,
    cantata_serve,
    isolated_if_possible,
    serve_run,
    started,
)
from tests.support.waiting import until
from workers.cores import cores_of_rank, usable_cores

pytestmark = pytest.mark.ray
TWO_CORES = pytest.mark.skipif(usable_cores() < 2, reason="needs two cores: each rank on Ray claims one")


@TWO_CORES
def test_cantata_serve_from_start_to_ctrl_c(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two ranks, experts split between them.
    monkeypatch.setenv("CANTATA_GATEWAY_DRAIN_TIMEOUT_S", "2")
    with cantata_serve(tmp_path, model, "--api-key", "right", "--tensor-parallel-size", "2") as served:
        body = {"model": MODEL_NAME, "messages": [{"role": "user", "content": scripts.GREETING}]}
        url = f"{served.url}/v1/chat/completions"
        headers = {"authorization": "Bearer right"}
        answer = httpx.post(url, json=body, headers=headers, timeout=60, trust_env=False)
        assert answer.json()["choices"][0]["message"]["content"] == scripts.GREETING_ANSWER
        check_one_id(answer)
        assert httpx.post(url, json=body, timeout=60, trust_env=False).status_code == 401
        with httpx.stream(
            "POST", url, json=body | {"stream": True}, headers=headers, timeout=60, trust_env=False
        ) as stream:
            assert [line for line in stream.iter_lines() if line][-1] == "data: [DONE]"

        with grpc.insecure_channel(served.grpc, options=[("grpc.enable_http_proxy", 0)]) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            request = pb.ChatRequest(messages=[pb.Message(role=pb.ROLE_USER, content=scripts.GREETING)])
            metadata = (("authorization", "Bearer right"),)
            events = list(stub.ChatStream(request, metadata=metadata, timeout=60))
            assert "".join(event.text.text for event in events) == scripts.GREETING_ANSWER
            for wrong in (pb.ChatRequest(), request):
                with pytest.raises(grpc.RpcError) as refused:
                    list(
                        stub.ChatStream(wrong, metadata=metadata if wrong is not request else (), timeout=60)
                    )
                expected = (
                    grpc.StatusCode.UNAUTHENTICATED if wrong is request else grpc.StatusCode.INVALID_ARGUMENT
                )
                assert refused.value.code() == expected

        assert any("haproxy" in process for process in marked(served.mark))
        # Ctrl-C in a terminal goes to the whole process group.
        check_streams_end(served, lambda: os.killpg(served.process.pid, signal.SIGINT), "right")
        assert served.process.wait(90) == 0
        assert none_left(served.mark, 15) == []
        log = served.log.read_text(errors="replace")
        assert "Cantata serves:" in log
        assert "running requests have 2 s to finish, then they end with an error" in log
        assert "retries remaining" not in log
        assert "slower ingress" not in log
        assert "Traceback" not in log
        assert "right" not in log
        assert scripts.GREETING not in log


@TWO_CORES
def test_a_bare_serve_run_works_and_says_what_to_set(model: Path, tmp_path: Path) -> None:
    # Two ranks, each with a part of every expert.
    # Ray's processes have been told another number of threads, as `ray up` does.
    keys = {"CANTATA_GATEWAY__API_KEYS": "right, other"}
    keys |= {"OMP_NUM_THREADS": "7", "OMP_WAIT_POLICY": "ACTIVE"}
    headers = {"authorization": "Bearer right"}
    engine = {"dtype": "float32", "parallel": {"tensor": 2, "expert": 1}}
    with serve_run(tmp_path, model, engine=engine, environment=keys) as served:
        body = {"model": MODEL_NAME, "messages": [{"role": "user", "content": scripts.GREETING}]}
        url = f"{served.url}/v1/chat/completions"
        first = httpx.post(url, json=body, headers=headers, timeout=60, trust_env=False)
        check_one_id(first)
        answer_before = answer_of(first)
        assert answer_before == scripts.GREETING_ANSWER
        check_threads(served)
        check_answers(served, answers_of_one_rank(model), headers)
        assert httpx.post(url, json=body, timeout=60, trust_env=False).status_code == 401
        with httpx.stream(
            "POST", url, json=body | {"stream": True}, headers=headers, timeout=60, trust_env=False
        ) as stream:
            assert [line for line in stream.iter_lines() if line][-1] == "data: [DONE]"
        with grpc.insecure_channel(served.grpc, options=[("grpc.enable_http_proxy", 0)]) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            metadata = (("authorization", "Bearer right"),)
            answer = stub.Chat(
                pb.ChatRequest(messages=[pb.Message(role=pb.ROLE_USER, content=scripts.GREETING)]),
                metadata=metadata,
                timeout=60,
            )
            assert answer.choices[0].message.content == scripts.GREETING_ANSWER
            with pytest.raises(grpc.RpcError) as refused:
                stub.Chat(pb.ChatRequest(), metadata=metadata, timeout=60)
            assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        check_start_up_is_said(served)
        _kill_a_rank_and_wait_for_the_next_replica(served)
        assert (
            answer_of(httpx.post(url, json=body, headers=headers, timeout=60, trust_env=False))
            == answer_before
        )
        assert "set RAY_SERVE_ENABLE_HA_PROXY=1 RAY_SERVE_THROUGHPUT_OPTIMIZED=1" in served.log.read_text(
            errors="replace"
        )
        _a_stopped_rank_ends_with_its_engine(served)
        assert served.stop() == 0
        assert none_left(served.mark, 15) == []


def test_more_ranks_than_this_machine_has_room_for(model: Path, tmp_path: Path) -> None:
    replicas = max(usable_cores(), torch.cuda.device_count()) + 1
    # On GPUs: engines on a CPU would share what there is.
    flags = [
        "--model",
        str(model),
        "--tensor-parallel-size",
        "2",
        "--replicas",
        str(replicas),
        "--device",
        "cuda",
        "--threads",
        "1",
    ]
    with started(
        "too large",
        isolated_if_possible([str(BIN / "cantata"), "serve", *flags]),
        tmp_path,
        {"HOME": str(tmp_path)},
    ) as served:
        assert served.process.wait(120) == 1
        assert none_left(served.mark, 15) == []
    log = served.log.read_text(errors="replace")
    wanted = f"{replicas} replicas of 2 ranks need {2 * replicas} CPUs and {2 * replicas} GPUs"
    assert f"{wanted}; {usable_cores()} of {usable_cores()} CPU" in log
    assert "Traceback" not in log


@TWO_CORES
@pytest.mark.slow
def test_streams_of_a_killed_replica_go_on_at_the_other(model: Path, tmp_path: Path) -> None:
    """The case is that of test_standalone_life without Ray: twelve streams, four run on each of two
    replicas, one of which is killed."""
    with serve_run(
        tmp_path, model, environment=FAST_INGRESS, replicas=2, engine={"scheduler": {"max_num_seqs": 4}}
    ) as served:
        until(lambda: num_up(served) == 2, 60)
        undisturbed = read_many(served, 12, 8)
        (victim, *_) = pids_of(served, "ServeReplica:cantata:engine")
        assert read_many(served, 12, 8, lambda: os.kill(victim, signal.SIGKILL)) == undisturbed
        resumed = counted(served, "cantata_gateway_resumptions_total")
        retried = counted(served, 'cantata_gateway_retries_total{error="EngineDead",')
        assert resumed >= 1
        assert retried >= 1
        assert resumed + retried <= 6, "the other replica's streams were not touched"
        until(lambda: num_up(served) == 2, 90)
        assert read_many(served, 12, 8) == undisturbed
        assert served.stop() == 0
        assert none_left(served.mark, 15) == []


def check_streams_end(served: Served, stop: Callable[[], None], key: str) -> None:
    """Check that streams over HTTP and gRPC that outlast a stop end with an error that their
    clients see."""
    body = {"model": MODEL_NAME, "prompt": "1 is", "stream": True, "ignore_eos": True, "max_tokens": 16_000}
    headers = {"authorization": f"Bearer {key}"}
    message = pb.Message(role=pb.ROLE_USER, content=scripts.GREETING)
    request = pb.ChatRequest(messages=[message], ignore_eos=True, max_tokens=16_000)
    url = f"{served.url}/v1/completions"
    with (
        httpx.stream("POST", url, json=body, headers=headers, timeout=60, trust_env=False) as stream,
        grpc.insecure_channel(served.grpc, options=[("grpc.enable_http_proxy", 0)]) as channel,
    ):
        stub = inference_pb2_grpc.InferenceStub(channel)
        events = stub.ChatStream(request, metadata=tuple(headers.items()), timeout=60)
        next(events)
        lines = filter(None, stream.iter_lines())
        assert next(lines).startswith("data: ")
        stop()
        *_, error, last = lines
        assert last == "data: [DONE]"
        assert '"code":"engine_unavailable"' in error
        with pytest.raises(grpc.RpcError) as ended:
            list(events)
        assert ended.value.code() == grpc.StatusCode.UNAVAILABLE


def num_up(served: Served) -> float:
    """Return the number of engines that answer the metrics page."""
    return counted(served, 'cantata_process_up{gateway="",process="engine"')


def check_start_up_is_said(served: Served) -> None:
    """Check the engine's table in the log, and the addresses of the gateway."""
    address = r"[\d.]+:\d+"
    said = rf"This gateway serves {MODEL_NAME}, .*: HTTP http://{address}/v1, gRPC {address}"
    until(lambda: re.search(said, served.log.read_text(errors="replace")) is not None, 30)
    log = served.log.read_text(errors="replace")
    assert re.search(r"shards +2 ranks, weights ", log)
    assert "ExecutorInfo(" not in log


def check_one_id(response: httpx.Response) -> None:
    """Serve names the request, and the gateway takes its name."""
    (id,) = response.headers.get_list("x-request-id")
    assert response.json()["id"] == f"chatcmpl-{id}"


def answer_of(response: httpx.Response) -> object:
    return response.json()["choices"][0]["message"]["content"]


def check_threads(served: Served) -> None:
    """Check the threads of an engine whose two ranks have a CPU each: one compute thread, on a core
    that is the rank's own where there are two in all."""
    engine, ranks = pids_of(served, "ServeReplica:cantata:engine"), pids_of(served, "_RankActor")
    assert (len(engine), len(ranks)) == (1, 2)
    for pid in (*engine, *ranks):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        assert sorted(name for name in variables if name.startswith(b"OMP_")) == [
            b"OMP_NUM_THREADS=1",
            b"OMP_WAIT_POLICY=PASSIVE",
        ]
    own = [cores_of_rank(number, 2, 1) or sorted(os.sched_getaffinity(0)) for number in range(2)]
    assert sorted(sorted(os.sched_getaffinity(pid)) for pid in ranks) == sorted(own)


def ranks_of(served: Served) -> list[int]:
    return pids_of(served, "_RankActor")


def pids_of(served: Served, name: str) -> list[int]:
    return [int(process.split()[0]) for process in marked(served.mark) if name in process]


def _kill_a_rank_and_wait_for_the_next_replica(served: Served) -> None:
    """Check that the whole replica goes with its rank, and that Serve starts another one, with
    ranks of its own."""
    before = ranks_of(served)
    assert len(before) == 2
    os.kill(before[1], signal.SIGKILL)
    until(lambda: not set(before) & set(ranks_of(served)), 20)
    until(lambda: len(ranks_of(served)) == 2 and is_ready(served), 90)


def _a_stopped_rank_ends_with_its_engine(served: Served) -> None:
    """Check that Ray kills a stopped rank: it does not notice its engine's death, and would keep
    its GPU."""
    before = ranks_of(served)
    (engine,) = pids_of(served, "ServeReplica:cantata:engine")
    os.kill(before[1], signal.SIGSTOP)
    os.kill(engine, signal.SIGKILL)
    until(lambda: not set(before) & set(ranks_of(served)), 60)


def is_ready(served: Served) -> bool:
    try:
        return httpx.get(f"{served.url}/ready", timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False
