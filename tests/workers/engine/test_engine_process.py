"""`python -m workers.engine` as a supervisor sees it: one line on stdout, progress and errors on
stderr, exit codes."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import pytest

from kernels.cpu import native
from tests.support.tiny_model import TINY, write_tiny_checkpoint
from workers.config import CacheConfig, EngineConfig, SchedulerConfig
from workers.config_json import engine_config_from_json, engine_config_to_json
from workers.engine.__main__ import main
from workers.engine.access import SECRET_VARIABLE
from workers.errors import ConfigError
from workers.exit_codes import crash
from workers.rpc import engine_pb2 as pb
from workers.rpc import engine_pb2_grpc

ROOT = Path(__file__).parents[3]
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 60.0


@dataclass
class Ready:
    """A process that serves."""

    process: subprocess.Popen[str]
    address: str
    metrics_address: str | None

    def stub(self, channel: grpc.Channel) -> engine_pb2_grpc.EngineStub:
        return engine_pb2_grpc.EngineStub(channel)


def spawn(config: str, *flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "workers.engine", "--config", config, *flags],
        cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def wait_ready(process: subprocess.Popen[str]) -> Ready:
    assert process.stdout is not None
    readable, _, _ = select.select([process.stdout], [], [], START_TIMEOUT_S)
    line = process.stdout.readline() if readable else ""
    if not line:
        process.kill()
        pytest.fail(f"the engine did not start: {process.communicate()[1]}")
    event = json.loads(line)
    assert event["event"] == "ready"
    return Ready(process, event["address"], event["metrics_address"])


def config_for(checkpoint: Path) -> EngineConfig:
    return EngineConfig(
        checkpoint, dtype="float32", max_model_len=512, cache=CacheConfig(memory_bytes=4 << 20)
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("models"))


@pytest.fixture
def children() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=10)


def test_serves_and_ends_cleanly_on_sigterm(checkpoint: Path, children: list[subprocess.Popen[str]]) -> None:
    process = spawn(engine_config_to_json(config_for(checkpoint)), "--metrics-port", "0", "--grace-s", "60")
    children.append(process)
    ready = wait_ready(process)
    with grpc.insecure_channel(ready.address) as channel:
        stub = ready.stub(channel)
        info = stub.GetInfo(pb.GetInfoRequest(), timeout=10)
        assert (info.vocab_size, info.max_model_len, info.dtype) == (TINY.vocab_size, 512, "float32")
        sampling = pb.SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
        call = stub.Generate(
            pb.GenerateRequest(request_id="r", prompt_token_ids=[1, 2], sampling=sampling), timeout=60
        )
        responses = [next(call)]
        process.send_signal(signal.SIGTERM)
        responses += list(call)
        assert sum(len(response.token_ids) for response in responses) == 60, (
            "SIGTERM lets running requests end"
        )
        assert responses[-1].finish_reason == pb.FINISH_REASON_LENGTH
    rest, errors = process.communicate(timeout=STOP_TIMEOUT_S)
    assert process.returncode == 0
    assert rest == "", "one line on stdout"
    assert "load weights: " in errors
    for word in ("device", "shards", "kernel attention", "KV cache", "tokens", "warm up", ready.address):
        assert word in errors, word
    assert "Traceback" not in errors


def test_a_second_signal_does_not_wait(checkpoint: Path, children: list[subprocess.Popen[str]]) -> None:
    process = spawn(engine_config_to_json(config_for(checkpoint)), "--metrics-port", "0", "--grace-s", "600")
    children.append(process)
    ready = wait_ready(process)
    text = urllib.request.urlopen(f"http://{ready.metrics_address}/metrics", timeout=10).read().decode()
    assert "cantata_engine_running_requests 0.0" in text
    with grpc.insecure_channel(ready.address) as channel:
        stub = ready.stub(channel)
        sampling = pb.SamplingParams(temperature=0.0, ignore_eos=True)
        call = stub.Generate(
            pb.GenerateRequest(request_id="r", prompt_token_ids=[1, 2], sampling=sampling), timeout=60
        )
        next(call)
        process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + 20
        while stub.GetLoad(pb.GetLoadRequest(), timeout=10).accepting:
            assert time.monotonic() < deadline
        process.send_signal(signal.SIGINT)
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    process.communicate(timeout=STOP_TIMEOUT_S)
    assert process.returncode == 0


def test_an_orphan_ends(checkpoint: Path, children: list[subprocess.Popen[str]]) -> None:
    process = spawn(engine_config_to_json(config_for(checkpoint)), "--parent-pid", str(os.getppid()))
    children.append(process)
    process.communicate(timeout=START_TIMEOUT_S)
    assert process.returncode == 0


def one_sentence(errors: str) -> str:
    """Return the error message; assert that it is the last and only one."""
    assert "Traceback" not in errors
    messages = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1
    assert errors.splitlines()[-1] == messages[0]
    return messages[0]


def test_a_half_written_checkpoint_is_one_sentence_and_exit_code_1(
    checkpoint: Path, tmp_path: Path, children: list[subprocess.Popen[str]]
) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    for file in checkpoint.iterdir():
        data = file.read_bytes()
        (folder / file.name).write_bytes(data[: len(data) // 2] if file.suffix == ".safetensors" else data)
    process = spawn(engine_config_to_json(config_for(folder)))
    children.append(process)
    rest, errors = process.communicate(timeout=START_TIMEOUT_S)
    assert (process.returncode, rest) == (1, "")
    assert str(folder) in one_sentence(errors)


@pytest.mark.parametrize(
    "fault",
    ["no folder", "no config", "not JSON", "a limit of zero", "a taken port", "no such configuration file"],
)
def test_what_cannot_start_is_one_sentence_and_exit_code_1(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.json").write_text(json.dumps({"model_path": "x", "scheduler": {"max_num_seqs": 0}}))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config, address, expected = {
            "no folder": (
                engine_config_to_json(config_for(tmp_path / "nothing")),
                "127.0.0.1:0",
                "nothing is not a folder",
            ),
            "no config": (
                engine_config_to_json(config_for(tmp_path / "empty")),
                "127.0.0.1:0",
                "config.json is missing",
            ),
            "not JSON": ("{", "127.0.0.1:0", "not JSON"),
            "a limit of zero": (
                str(tmp_path / "file.json"),
                "127.0.0.1:0",
                "engine.scheduler.max_num_seqs must be at least 1, got 0",
            ),
            "a taken port": (
                engine_config_to_json(config_for(tmp_path)),
                f"127.0.0.1:{port}",
                f"cannot listen on 127.0.0.1:{port}",
            ),
            "no such configuration file": (
                str(tmp_path / "absent.json"),
                "127.0.0.1:0",
                "absent.json cannot be read",
            ),
        }[fault]
        monkeypatch.setattr(sys, "argv", ["engine", "--config", config, "--address", address])
        monkeypatch.setenv(SECRET_VARIABLE, "a secret of some length")
        assert main() == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert expected in one_sentence(captured.err)


def test_the_configuration_survives_json() -> None:
    config = EngineConfig(
        Path("/models/x"), "float32", "cpu", 4096, CacheConfig(1 << 30, False), SchedulerConfig(7, 8, 9)
    )
    assert engine_config_from_json(engine_config_to_json(config)) == config
    assert engine_config_from_json('{"model_path": "x"}') == EngineConfig(Path("x"))
    assert replace(config, cache=CacheConfig()) != config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "must be a JSON object"),
        ("{}", "model_path is missing"),
        ('{"model_path": 3}', "model_path must be of type Path"),
        ('{"model_path": "x", "sampler": 1}', "unknown field sampler"),
        ('{"model_path": "x", "cache": {"size": 1}}', "unknown field cache.size"),
        ('{"model_path": "x", "cache": 1}', "cache. must be a JSON object"),
        ('{"model_path": "x", "dtype": "float16"}', "dtype must be one of bfloat16, float32"),
        ('{"model_path": "x", "max_model_len": "long"}', "max_model_len must be of type int"),
        ('{"model_path": "x", "max_model_len": true}', "max_model_len must be of type int"),
        ('{"model_path": "x", "cache": {"prefix_caching": 1}}', "cache.prefix_caching must be of type bool"),
        ('{"model_path": "x", "quantize": "int8"}', "quantize must be one of mxfp4"),
        ('{"model_path": "x", "parallel": {"tensor": 17}}', "parallel.tensor must be 1 to 16"),
    ],
)
def test_wrong_configurations_name_the_field(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine_config_from_json(text)


def test_a_trial_of_the_kernels_that_dies_is_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is not an end that another start may mend: a supervisor gives up such an engine."""
    config = engine_config_to_json(config_for(write_tiny_checkpoint(tmp_path)))
    monkeypatch.setattr(sys, "argv", ["engine", "--config", config])
    monkeypatch.setattr(native, "runs", lambda: False)
    assert crash(main()) == signal.SIGILL
    assert "error: this processor cannot run the C++ kernels for" in capsys.readouterr().err
