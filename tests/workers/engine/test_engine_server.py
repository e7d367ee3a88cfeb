"""The gRPC edge over loopback: statuses, cancellation, drain, health and reflection. A fake
executor stands for the model."""

import asyncio
import json
import os
import sys
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
import torch
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from safetensors.torch import save_file

from tests.support.fake_executor import VOCAB, FakeExecutor
from workers.config import EngineConfig, SchedulerConfig
from workers.engine.access import authorization, check_address
from workers.engine.server import SERVICE, EngineServer
from workers.errors import CheckpointError, ConfigError
from workers.private_folder import PrivateFolder
from workers.request import EngineLoad
from workers.rpc import convert, engine_pb2_grpc
from workers.rpc import engine_pb2 as pb

ENGINE_METHODS = [method.name for method in pb.DESCRIPTOR.services_by_name["Engine"].methods]
CONFIG_JSON = {
    "model_type": "gpt_oss", "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 32, "max_position_embeddings": 140_000, "eos_token_id": 999,
    "rope_scaling": {"rope_type": "yarn"},
}  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "fake-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG_JSON))
    save_file(
        {"weight": torch.zeros(1)}, folder / "model.safetensors"
    )  # what the fingerprint reads; the executor reads nothing
    return folder


class Served:
    """A server, its executor, and a stub on a channel to it."""

    def __init__(self, checkpoint: Path, secret: str | None = None, **limits: int) -> None:
        self.executor = FakeExecutor(9000, 9000, max_model_len=140_000)
        self.server = EngineServer(executor_factory=lambda config, model: self.executor, secret=secret)
        self.folder = PrivateFolder()
        self.bind = f"unix:{self.folder.path}/e" if secret is None else "127.0.0.1:0"
        self.config = EngineConfig(checkpoint, scheduler=SchedulerConfig(**limits))

    async def __aenter__(self) -> "Served":
        self.address = await self.server.start(self.config, self.bind)
        options = [
            ("grpc.max_receive_message_length", convert.MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", convert.MAX_MESSAGE_BYTES),
        ]
        self.channel = grpc.aio.insecure_channel(self.address, options=options)
        self.stub = engine_pb2_grpc.EngineStub(self.channel)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.executor.gate.set()
        await self.channel.close()
        await self.server.stop()
        self.folder.close()


@pytest_asyncio.fixture
async def served(checkpoint: Path) -> AsyncIterator[Served]:
    async with Served(checkpoint) as served:
        yield served


def generate(*prompt: int, **sampling: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        request_id="r", prompt_token_ids=prompt or (1,), sampling=pb.SamplingParams(**sampling)
    )


async def status_of(call: Awaitable[object]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


@pytest.mark.parametrize("secret", [None, "a secret of some length"], ids=["socket", "port"])
async def test_messages_that_cannot_be_decoded(
    checkpoint: Path, secret: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """One line and a number each; on a port only for callers that have the secret."""
    methods = [(f"{SERVICE}/{name}", name == "Generate") for name in ENGINE_METHODS]
    methods += [("grpc.health.v1.Health/Check", False), ("grpc.health.v1.Health/Watch", True)]
    caplog.set_level("INFO")
    async with Served(checkpoint, secret) as served:
        for path, streaming in methods:
            caplog.clear()
            make = served.channel.unary_stream if streaming else served.channel.unary_unary
            call = make(f"/{path}")(b"\xff" * 10, metadata=authorization(secret or ""))
            error = await status_of(call.read() if streaming else call)
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, path
            assert "cannot be decoded" in (error.details() or "")
            (record,) = caplog.records
            assert "cannot be decoded" in record.getMessage()
            assert record.exc_info is None
        assert f"cantata_engine_undecodable_messages_total {len(methods)}.0" in served.server.metrics.render()
        if secret is not None:
            stranger = await status_of(served.channel.unary_unary(f"/{SERVICE}/GetInfo")(b"\xff" * 10))
            assert stranger.code() is grpc.StatusCode.UNAUTHENTICATED


async def first(call: grpc.aio.UnaryStreamCall) -> pb.GenerateResponse:
    return await anext(aiter(call))


async def until(condition: Callable[[], bool]) -> None:
    """Wait until the condition holds."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0.002)


async def test_generate_streams_tokens_and_one_finish_reason(served: Served) -> None:
    responses = [
        response async for response in served.stub.Generate(generate(5, 6, max_tokens=20, logprobs=0))
    ]
    assert [token for response in responses for token in response.token_ids] == list(range(7, 27))
    assert [entry.logprob for response in responses for entry in response.logprobs] == [
        -float(token) for token in range(7, 27)
    ]
    assert [response.finish_reason for response in responses[:-1]] == [pb.FINISH_REASON_UNSPECIFIED] * (
        len(responses) - 1
    )
    assert responses[-1].finish_reason == pb.FINISH_REASON_LENGTH


async def test_stop_token_and_resumption_cross_the_wire(served: Served) -> None:
    message = generate(5, max_tokens=20, stop_token_ids=[9])
    message.output_token_ids.extend([6, 7])
    responses = [response async for response in served.stub.Generate(message)]
    assert [token for response in responses for token in response.token_ids] == [8, 9]
    assert responses[-1].finish_reason == pb.FINISH_REASON_STOP
    assert responses[-1].stop_token_id == 9


async def test_the_longest_prompt_passes(served: Served) -> None:
    prompt = [token % VOCAB for token in range(131_072)]
    responses = [response async for response in served.stub.Generate(generate(*prompt, max_tokens=1))]
    assert list(responses[-1].token_ids) == [(prompt[-1] + 1) % VOCAB]


@pytest.mark.parametrize(
    ("message", "param"),
    [
        (pb.GenerateRequest(request_id="r"), "prompt"),
        (generate(VOCAB), "prompt"),
        (generate(temperature=float("nan")), "temperature"),
        (generate(max_tokens=0), "max_tokens"),
        (generate(logprobs=21), "logprobs"),
        (generate(max_tokens=140_000), "max_tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_bad_requests_name_their_field(served: Served, message: pb.GenerateRequest, param: str) -> None:
    error = await status_of(served.stub.Generate(message).read())
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert dict(error.trailing_metadata())["param"] == param
    assert param in error.details()
    assert served.executor.plans == []


async def test_a_full_inbox_says_when_to_come_back(checkpoint: Path) -> None:
    async with Served(checkpoint, max_num_seqs=1, max_waiting_requests=1) as served:
        served.executor.gate.clear()
        running = served.stub.Generate(generate(max_tokens=2))
        await until(served.executor.entered.is_set)
        waiting = served.stub.Generate(generate(max_tokens=2))
        await until(lambda: served.server.engine.load().num_waiting == 1)
        error = await status_of(served.stub.Generate(generate(max_tokens=2)).read())
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert float(dict(error.trailing_metadata())["retry-after-s"]) > 0
        served.executor.gate.set()
        for call in (running, waiting):
            assert [response async for response in call][-1].finish_reason == pb.FINISH_REASON_LENGTH


async def test_a_client_that_leaves_is_aborted(served: Served) -> None:
    served.executor.before_step = lambda plan: time.sleep(0.005)
    call = served.stub.Generate(generate(1, max_tokens=100_000, ignore_eos=True))
    await first(call)
    assert served.server.engine.load().num_running == 1
    call.cancel()
    await until(lambda: served.server.engine.load().num_running == 0)
    assert 'requests_total{finish_reason="abort"} 1.0' in served.server.metrics.render()


async def test_a_client_whose_connection_breaks_is_aborted(served: Served) -> None:
    served.executor.before_step = lambda plan: time.sleep(0.005)
    channel = grpc.aio.insecure_channel(served.address)
    await first(
        engine_pb2_grpc.EngineStub(channel).Generate(generate(1, max_tokens=100_000, ignore_eos=True))
    )
    await channel.close()
    await until(lambda: served.server.engine.load().num_running == 0)
    assert 'requests_total{finish_reason="abort"} 1.0' in served.server.metrics.render()


async def test_the_calls_deadline_is_the_requests(served: Served) -> None:
    served.executor.before_step = lambda plan: time.sleep(0.005)
    call = served.stub.Generate(generate(1, max_tokens=100_000, ignore_eos=True), timeout=0.3)
    error = await status_of(_drained(call))
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: served.server.engine.load().num_running == 0)


async def test_a_reader_that_does_not_read_gets_many_tokens_a_message(served: Served) -> None:
    # 20 alternatives make messages of 200 bytes, and without its growing the connection's window is
    # 64 KB: a few hundred messages fill it, the other tokens wait in the stream.
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_536)]
    channel = grpc.aio.insecure_channel(served.address, options=options)
    call = engine_pb2_grpc.EngineStub(channel).Generate(
        generate(1, max_tokens=4000, ignore_eos=True, logprobs=20)
    )
    sizes = [len((await first(call)).token_ids)]
    await until(lambda: served.server.engine.load().num_running == 0)
    sizes += [len(response.token_ids) async for response in call]
    assert sum(sizes) == 4000
    assert max(sizes) > 1000
    await channel.close()


async def test_a_dead_engine_is_unavailable_and_not_serving(served: Served) -> None:
    served.executor.fail_at_step = 5
    call = served.stub.Generate(generate(1, max_tokens=100, ignore_eos=True))
    tokens: list[int] = []

    async def read() -> None:
        async for response in call:
            tokens.extend(response.token_ids)
            assert response.finish_reason == pb.FINISH_REASON_UNSPECIFIED

    error = await status_of(read())
    assert error.code() == grpc.StatusCode.UNAVAILABLE
    assert dict(error.trailing_metadata())["error-class"] == "EngineDead"
    assert tokens == [2, 3, 4, 5, 6], "what was sampled before the failure is delivered"
    await asyncio.wait_for(served.server.ended.wait(), 5)
    error = await status_of(served.stub.Generate(generate(1)).read())
    assert error.code() == grpc.StatusCode.UNAVAILABLE
    assert await _health(served, "") == health_pb2.HealthCheckResponse.NOT_SERVING
    assert not (await served.stub.GetLoad(pb.GetLoadRequest())).accepting


async def test_an_unexpected_failure_is_internal_and_says_nothing(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: object) -> None:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(served.server.engine, "submit", explode)
    error = await status_of(served.stub.Generate(generate(1)).read())
    assert error.code() == grpc.StatusCode.INTERNAL
    assert "secret" not in error.details()


async def test_drain_over_rpc(served: Served) -> None:
    served.executor.before_step = lambda plan: time.sleep(0.005)
    call = served.stub.Generate(generate(1, max_tokens=100_000, ignore_eos=True))
    await first(call)
    drain = served.stub.Drain(pb.DrainRequest(grace_s=0.3))
    await until(lambda: not served.server.engine.load().accepting)
    error = await status_of(served.stub.Generate(generate(1)).read())
    assert error.code() == grpc.StatusCode.UNAVAILABLE
    assert await _health(served, SERVICE) == health_pb2.HealthCheckResponse.NOT_SERVING
    assert (await drain).num_aborted == 1
    last = [response async for response in call][-1]
    assert last.finish_reason == pb.FINISH_REASON_ABORT
    assert "grace period" in last.error
    assert served.server.ended.is_set(), "its process is to end, and to be replaced"


async def test_callers_of_drain_do_not_hold_up_a_shutdown(served: Served) -> None:
    served.executor.before_step = lambda plan: time.sleep(0.005)
    call = served.stub.Generate(generate(1, max_tokens=100_000, ignore_eos=True))
    await first(call)
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
    drains = [asyncio.ensure_future(served.stub.Drain(pb.DrainRequest(grace_s=3600.0))) for _ in range(4)]
    await until(lambda: not served.server.engine.load().accepting)
    async with asyncio.timeout(20):
        assert await served.server.drain(0.1) == 1
        await asyncio.gather(*drains)
    assert [response async for response in call][-1].finish_reason == pb.FINISH_REASON_ABORT


async def test_a_stop_needs_no_new_thread(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be no memory for one any more."""

    def no_memory(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_memory)
    assert await served.server.drain(0.1) == 0
    await served.server.stop()


async def test_drain_refuses_a_wrong_grace_period(served: Served) -> None:
    for grace_s in (-1.0, float("nan"), float("inf")):
        error = await status_of(served.stub.Drain(pb.DrainRequest(grace_s=grace_s)))
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert dict(error.trailing_metadata())["param"] == "grace_s"
    assert served.server.engine.load().accepting


async def test_stop_ends_streams_with_unavailable(served: Served) -> None:
    served.executor.before_step = lambda plan: time.sleep(0.005)
    call = served.stub.Generate(generate(1, max_tokens=100_000, ignore_eos=True))
    await first(call)
    reading = asyncio.create_task(_drained(call))
    await served.server.stop()
    error = await status_of(reading)
    assert error.code() == grpc.StatusCode.UNAVAILABLE


async def test_info_load_and_metrics(served: Served) -> None:
    info = convert.info_from_wire(await served.stub.GetInfo(pb.GetInfoRequest()))
    assert (info.model_name, info.vocab_size, info.max_model_len, info.block_size) == (
        "fake-model",
        VOCAB,
        140_000,
        16,
    )
    assert info.kv_capacity_tokens == 8999 * 16
    assert info.model_fingerprint
    load = convert.load_from_wire(await served.stub.GetLoad(pb.GetLoadRequest()))
    assert load == EngineLoad(0, 0, 0.0, True)
    _ = [response async for response in served.stub.Generate(generate(1, max_tokens=3))]
    text = (await served.stub.GetMetrics(pb.GetMetricsRequest())).text
    assert "cantata_engine_output_tokens_total 3.0" in text


async def test_health_and_reflection(served: Served) -> None:
    assert await _health(served, "") == health_pb2.HealthCheckResponse.SERVING
    assert await _health(served, SERVICE) == health_pb2.HealthCheckResponse.SERVING

    def methods() -> set[str]:
        with grpc.insecure_channel(served.address) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            assert SERVICE in database.get_services()
            service = DescriptorPool(database).FindServiceByName(SERVICE)
            return {method.name for method in service.methods}

    assert await asyncio.to_thread(methods) == {"Generate", "GetInfo", "GetLoad", "GetMetrics", "Drain"}


SECRET = "a secret of some length"


def _calls(
    served: Served, metadata: tuple[tuple[str, str], ...]
) -> dict[str, Callable[[], Awaitable[object]]]:
    """Return every kind of call, by name."""
    stub, health = served.stub, health_pb2_grpc.HealthStub(served.channel)
    reflection = reflection_pb2_grpc.ServerReflectionStub(served.channel)

    async def reflect() -> object:
        call = reflection.ServerReflectionInfo(metadata=metadata)
        # A call is refused before its messages are read. grpc.aio reports INTERNAL instead of the
        # status if the call ends while a message is sent, so none is where a refusal is expected.
        if metadata == authorization(SECRET):
            await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            await call.done_writing()
        return await call.read()

    return {
        "Generate": lambda: stub.Generate(generate(1, max_tokens=1), metadata=metadata).read(),
        "GetInfo": lambda: stub.GetInfo(pb.GetInfoRequest(), metadata=metadata),
        "GetLoad": lambda: stub.GetLoad(pb.GetLoadRequest(), metadata=metadata),
        "GetMetrics": lambda: stub.GetMetrics(pb.GetMetricsRequest(), metadata=metadata),
        "Watch": lambda: health.Watch(health_pb2.HealthCheckRequest(), metadata=metadata).read(),
        "Reflection": reflect,
        "Drain": lambda: stub.Drain(pb.DrainRequest(grace_s=0.0), metadata=metadata),
    }


async def test_on_tcp_a_call_needs_the_engine_s_secret(checkpoint: Path) -> None:
    async with Served(checkpoint, SECRET) as served:
        wrongs = [
            authorization(secret) for secret in ("another secret of some length", SECRET[:-1], f"{SECRET}s")
        ]
        for wrong in ((), *wrongs, (("authorization", SECRET),)):
            for name, call in _calls(served, wrong).items():
                assert (await status_of(call())).code() == grpc.StatusCode.UNAUTHENTICATED, name
        assert served.server.engine.load().accepting, "it has not been drained"
        assert served.executor.plans == []
        assert await _health(served, SERVICE) == health_pb2.HealthCheckResponse.SERVING, (
            "probes cannot send a secret"
        )
        for name, call in _calls(served, authorization(SECRET)).items():
            assert await call() is not None, name


@pytest.mark.parametrize("secret", [None, "", "s" * 15])
async def test_on_tcp_there_is_no_engine_without_a_secret(checkpoint: Path, secret: str | None) -> None:
    with pytest.raises(ConfigError, match="needs a secret of at least 16 characters"):
        await EngineServer(secret=secret).start(EngineConfig(checkpoint), "127.0.0.1:0")
    check_address("127.0.0.1:0", "s" * 16)


async def test_only_its_user_reaches_a_unix_socket(served: Served) -> None:
    path = served.address.removeprefix("unix:")
    assert [os.stat(name).st_mode & 0o777 for name in (path, os.path.dirname(path))] == [0o600, 0o700]
    if os.geteuid() == 0:
        other = (
            "import os, socket, sys; os.setgid(65534); os.setuid(65534); "
            "socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
        )
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", other, path, stderr=asyncio.subprocess.PIPE
        )
        assert b"Permission denied" in (await process.communicate())[1]


async def test_a_socket_of_a_server_that_lives_is_not_taken(served: Served) -> None:
    with pytest.raises(ConfigError, match="another server uses it"):
        await EngineServer().start(served.config, served.address)
    assert (await served.stub.GetLoad(pb.GetLoadRequest())).accepting
    with pytest.raises(ConfigError, match="longer than 107 bytes"):
        await EngineServer().start(served.config, f"unix:/tmp/{'x' * 110}")


async def test_a_request_without_a_seed_gets_one(served: Served) -> None:
    calls = [served.stub.Generate(generate(1, max_tokens=1)) for _ in range(2)]
    for call in calls:
        await _drained(call)
    seeds = {start.sampling.seed for plan in served.executor.plans for start in plan.starts}
    assert len(seeds) == 2
    assert None not in seeds


async def test_a_taken_port_and_a_missing_checkpoint_fail_with_one_sentence(
    served: Served, tmp_path: Path
) -> None:
    server = EngineServer(executor_factory=lambda config, model: FakeExecutor(), secret=SECRET)
    with pytest.raises(ConfigError, match="cannot listen on"):
        await server.start(served.config, served.address)
    with pytest.raises(CheckpointError, match="is not a folder"):
        await server.start(EngineConfig(tmp_path / "nothing"), "127.0.0.1:0")
    await server.stop()


async def test_the_scrape_port_is_served_and_closed(checkpoint: Path) -> None:
    server = EngineServer(
        executor_factory=lambda config, model: FakeExecutor(9000, 9000, max_model_len=140_000), secret=SECRET
    )
    await server.start(EngineConfig(checkpoint), "127.0.0.1:0", metrics_port=0)
    address = server.metrics_address
    text = await asyncio.to_thread(
        lambda: urllib.request.urlopen(f"http://{address}/metrics", timeout=5).read().decode()
    )
    assert "cantata_engine_waiting_requests 0.0" in text
    await server.stop()
    assert server.metrics_address is None


async def _drained(call: grpc.aio.UnaryStreamCall) -> None:
    async for _ in call:
        pass


async def _health(served: Served, service: str) -> int:
    stub = health_pb2_grpc.HealthStub(served.channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status
