"""`cantata serve --standalone` from start to stop: an engine that dies, a stop under load, a parent
that vanishes, keys, bad starts."""

import contextlib
import os
import platform
import shutil
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path

import grpc
import httpx
import pytest

from cluster.rpc import inference_pb2 as pb
from cluster.rpc import inference_pb2_grpc
from tests.e2e import scripts
from tests.support.clock_offset import ClockOffset
from tests.support.many_streams import counted, read_many
from tests.support.processes import marked, none_left
from tests.support.served import BIN, MODEL_NAME, Served, standalone
from tests.support.waiting import until
from workers.rpc import engine_pb2, engine_pb2_grpc

GREETING = {"model": MODEL_NAME, "messages": [{"role": "user", "content": scripts.GREETING}]}


def engine_pid(served: Served) -> int:
    (line,) = [line for line in marked(served.mark) if "workers.engine" in line]
    return int(line.split()[0])


def chat(served: Served, **fields: object) -> httpx.Response:
    return httpx.post(
        f"{served.url}/v1/chat/completions", json=GREETING | fields, timeout=60, trust_env=False
    )


def test_an_engine_that_ends_is_replaced(model: Path, tmp_path: Path) -> None:
    """This engine is drained over its own socket, which only this user can reach; killed ones are
    tested below and in test_supervisor."""
    with standalone(tmp_path, model) as served:
        pid = engine_pid(served)
        arguments = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        address = arguments[arguments.index("--address") + 1]
        assert Path(address.removeprefix("unix:")).parent.stat().st_mode & 0o777 == 0o700
        with grpc.insecure_channel(address) as channel:
            assert (
                engine_pb2_grpc.EngineStub(channel)
                .Drain(engine_pb2.DrainRequest(grace_s=0), timeout=30)
                .num_aborted
                == 0
            )
        until(lambda: chat(served).status_code == 503, 10)
        refused = chat(served)
        assert refused.status_code == 503
        assert refused.json()["error"]["message"]
        assert httpx.get(f"{served.url}/ready", trust_env=False).status_code == 503
        assert httpx.get(f"{served.url}/health", trust_env=False).status_code == 200
        until(lambda: chat(served).status_code == 200, 120)
        assert engine_pid(served) != pid
        # The parent vanishes without a word: its children see that and end.
        served.process.kill()
        served.process.wait(10)
        assert none_left(served.mark, 20) == []


def test_a_log_that_cannot_be_written_ends_nothing(model: Path, tmp_path: Path) -> None:
    """A pipe that is full when the server starts and is not read; then, when an engine starts
    again, one without a reader."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, bytes(65536))
    os.set_blocking(writing, True)
    with standalone(tmp_path, model, "--tensor-parallel-size", "2", stderr=writing) as served:
        os.close(writing)
        assert chat(served).status_code == 200
        os.close(reading)
        pid = engine_pid(served)
        os.kill(pid, signal.SIGKILL)
        until(lambda: not any(line.startswith(f"{pid} ") for line in marked(served.mark)), 10)
        until(lambda: chat(served).status_code == 200, 120)
        assert engine_pid(served) != pid
        assert served.stop(signal.SIGTERM) == 0


def test_streams_of_an_engine_that_dies_or_hangs_go_on_at_the_other(model: Path, tmp_path: Path) -> None:
    """Greedy answers are the same as undisturbed ones, whichever engine made which part of them: of
    twelve streams four run on each engine when one is killed and the others wait for their turn, so
    that some are cut in the middle and some have not begun. Then the same with one that hangs."""
    num_streams, num_running = 12, 4
    flags = [
        "--replicas",
        "2",
        "--max-num-seqs",
        str(num_running),
        "--heartbeat-timeout",
        "4",
        "--probe-timeout",
        "1",
    ]
    with standalone(tmp_path, model, *flags) as served:
        undisturbed = read_many(served, num_streams, 2 * num_running)
        assert len(set(undisturbed)) > num_streams / 2
        before = (0.0, 0.0)
        for times, number in enumerate((signal.SIGKILL, signal.SIGSTOP), start=1):
            (victim, *_) = [int(line.split()[0]) for line in marked(served.mark) if "workers.engine" in line]
            kill = partial(os.kill, victim, number)
            assert read_many(served, num_streams, 2 * num_running, kill) == undisturbed
            after = (
                counted(served, "cantata_gateway_resumptions_total"),
                counted(served, 'cantata_gateway_retries_total{error="EngineDead",'),
            )
            resumed, retried = (now - then for now, then in zip(after, before, strict=True))
            assert resumed >= 1
            assert retried >= 1
            assert resumed + retried <= num_streams / 2, "the other engine's streams were not touched"
            until(partial(has_restarted, served, times), 60)
            assert not Path(f"/proc/{victim}").exists()
            before = after


def has_restarted(served: Served, times: int) -> bool:
    """Return whether engines have started again this many times."""
    return served.log.read_text().count(" serves again") == times


def test_a_stop_lets_running_streams_end(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams over HTTP and gRPC end, whatever happens to the checkpoint and the time of day
    meanwhile."""
    clock = ClockOffset(tmp_path)
    for name, value in clock.environment.items():
        monkeypatch.setenv(name, value)
    served_model = tmp_path / "model"
    shutil.copytree(model, served_model)
    num_tokens = 400
    flags = ("--api-key", "right", "--request-timeout", "100")
    with standalone(tmp_path, served_model, *flags) as served:
        os.truncate(served_model / "model.safetensors", 1000)
        (served_model / "config.json").write_text("{}")
        headers = {"authorization": "Bearer right"}
        assert chat(served).status_code == 401
        answer = httpx.post(
            f"{served.url}/v1/chat/completions", json=GREETING, headers=headers, timeout=60, trust_env=False
        )
        assert answer.json()["choices"][0]["message"]["content"] == scripts.GREETING_ANSWER
        shutil.rmtree(served_model)
        body = GREETING | {"stream": True, "ignore_eos": True, "max_tokens": num_tokens}
        message = pb.Message(role=pb.ROLE_USER, content=scripts.GREETING)
        request = pb.ChatRequest(messages=[message], max_tokens=num_tokens, ignore_eos=True)
        with (
            httpx.stream(
                "POST",
                f"{served.url}/v1/chat/completions",
                json=body,
                headers=headers,
                timeout=60,
                trust_env=False,
            ) as stream,
            grpc.insecure_channel(served.grpc, options=[("grpc.enable_http_proxy", 0)]) as channel,
        ):
            stub = inference_pb2_grpc.InferenceStub(channel)
            events = stub.ChatStream(request, metadata=tuple(headers.items()), timeout=60)
            next(events)
            lines = stream.iter_lines()
            first = next(lines)
            clock.set(3600)
            until(lambda: time_of_day(served) > time.time() + 1800, 20)
            with ThreadPoolExecutor(1) as pool:
                stopped = pool.submit(served.stop, signal.SIGTERM)
                until(lambda: "stopping: running requests have" in served.log.read_text(), 20)
                clock.set(-3600)
                rest = [line for line in lines if line]
                assert first.startswith("data: ")
                assert rest[-1] == "data: [DONE]"
                assert not any('"error"' in line for line in rest)
                *_, last = events
                assert last.usage.completion_tokens == num_tokens
                assert stopped.result() == 0
        assert none_left(served.mark, 5) == []
        assert "right" not in served.log.read_text()


def time_of_day(served: Served) -> float:
    """Return the server's time of day, in seconds since 1970."""
    answer = httpx.get(f"{served.url}/health", timeout=60, trust_env=False)
    return parsedate_to_datetime(answer.headers["date"]).timestamp()


def test_a_second_signal_does_not_wait(model: Path, tmp_path: Path) -> None:
    with standalone(tmp_path, model) as served:
        body = GREETING | {"stream": True, "ignore_eos": True, "max_tokens": 16_000}
        with httpx.stream(
            "POST", f"{served.url}/v1/chat/completions", json=body, timeout=60, trust_env=False
        ) as stream:
            next(stream.iter_lines())
            served.process.send_signal(signal.SIGINT)
            until(lambda: "a second signal stops immediately" in served.log.read_text(), 10)
            assert served.stop(timeout_s=15) == 0
        assert none_left(served.mark, 5) == []


def test_a_half_written_checkpoint_is_one_sentence(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    weights = broken / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    result = _serve(broken)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith(("error: ", "cantata: "))]
    assert len(errors) == 1
    assert "model.safetensors" in errors[0]


def test_an_instruction_set_that_is_not_there_is_one_sentence(model: Path) -> None:
    name = "avx2" if platform.machine() in ("aarch64", "arm64") else "neon"
    result = _serve(model, "--cpu-isa", name)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    [error] = [line for line in result.stderr.splitlines() if line.startswith(("error: ", "cantata: "))]
    assert error.startswith(
        f"error: cpu_isa is {name}, which this processor or this build does not have: set it to one of auto, "
    )


@pytest.mark.parametrize("flag", ["--http-port", "--grpc-port"])
def test_a_port_that_is_taken_is_found_out_at_once(model: Path, flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = _serve(model, flag, str(port))
    setting = "listen.http_port" if flag == "--http-port" else "listen.grpc_port"
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        f"Starting to serve {model}",
        f"cantata: cannot listen on 127.0.0.1 port {port}: Address already in use; set {setting} to another",
    ]


def _serve(model: Path, *flags: str) -> "subprocess.CompletedProcess[str]":
    ports = [] if "--http-port" in flags else ["--http-port", "0"]
    ports += [] if "--grpc-port" in flags else ["--grpc-port", "0"]
    return subprocess.run(
        [str(BIN / "cantata"), "serve", "--standalone", "--model", str(model), *ports, *flags],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
