"""The public gRPC API with generated stubs and through reflection: the same answers, errors as
statuses with metadata."""

import asyncio
import re
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from google.protobuf import descriptor_pool, json_format, message_factory
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from cluster.config import GatewayConfig
from cluster.frontend.errors import TABLE
from cluster.harmony.encoding import HarmonyEncoding
from cluster.rpc import inference_pb2 as pb
from cluster.rpc import inference_pb2_grpc
from tests.support.fake_engine import FakeEngine, Script
from tests.support.gateway import Gateway, serving, turn
from workers import errors

Stub = inference_pb2_grpc.InferenceStub
HELLO = pb.Message(role=pb.ROLE_USER, content="Hello")
SERVICE = "cantata.inference.v1.Inference"


async def test_a_whole_answer(stub: Stub, engine: FakeEngine, encoding: HarmonyEncoding) -> None:
    engine.answer = lambda request: Script(
        turn(encoding, reasoning="Hm.", text="Hello 🎉", call=("f", '{"a":1}')), num_cached_tokens=16
    )
    tool = pb.Tool(name="f", description="A tool.")
    tool.parameters.update({"type": "object", "properties": {"a": {"type": "integer"}}})
    request = pb.ChatRequest(
        model="gpt-oss-test",
        messages=[pb.Message(role=pb.ROLE_SYSTEM, content="Be brief."), HELLO],
        tools=[tool],
        reasoning_effort=pb.REASONING_EFFORT_HIGH,
        temperature=0.0,
        seed=4,
        n=2,
        top_logprobs=2,
        logit_bias={5: -1.5},
    )
    response = await stub.Chat(request)
    assert response.id.startswith("chatcmpl-")
    assert [choice.index for choice in response.choices] == [0, 1]
    for choice in response.choices:
        assert choice.message.content == "Hello 🎉"
        assert choice.message.reasoning == "Hm."
        assert [(call.name, call.arguments) for call in choice.message.tool_calls] == [("f", '{"a":1}')]
        assert choice.message.tool_calls[0].id.startswith("call_")
        assert choice.finish_reason == pb.FINISH_REASON_TOOL_CALLS
        assert b"".join(entry.token for entry in choice.logprobs).decode() == "Hello 🎉"
        assert all(len(entry.top) == 2 for entry in choice.logprobs)
    assert response.usage.prompt_tokens == len(engine.requests[0].prompt_token_ids)
    assert response.usage.cached_tokens == 16
    assert response.usage.reasoning_tokens == 2 * len(encoding.encode("Hm."))
    sampling = engine.requests[0].sampling
    assert (sampling.temperature, sampling.logit_bias) == (0.0, ((5, -1.5),))
    prompt = encoding.decode(engine.requests[0].prompt_token_ids)
    assert "Reasoning: high" in prompt
    assert "Be brief." in prompt


async def test_a_stream_ends_with_finish_and_usage(
    stub: Stub, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    engine.answer = lambda request: Script(
        turn(encoding, reasoning="Hm.", text="Hello 🎉", call=("f", '{"a":1}'))
    )
    events = [
        event async for event in stub.ChatStream(pb.ChatRequest(messages=[HELLO], tools=[pb.Tool(name="f")]))
    ]
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[-2:] == ["finish", "usage"]
    assert kinds.index("reasoning") < kinds.index("text") < kinds.index("tool_call")
    assert "".join(event.text.text for event in events) == "Hello 🎉"
    assert "".join(event.reasoning.text for event in events) == "Hm."
    assert "".join(event.tool_call.arguments for event in events) == '{"a":1}'
    assert events[-2].finish.reason == pb.FINISH_REASON_TOOL_CALLS


async def test_both_apis_make_the_same_prompt(gateway: Gateway, stub: Stub, engine: FakeEngine) -> None:
    schema = {
        "type": "object",
        "properties": {
            "a": {"type": "string", "enum": ["x", "y"]},
            "b": {"type": "integer", "default": 3, "description": "A number."},
            "c": {"type": "array", "items": {"type": "number"}, "default": [1.5, 2, None, True]},
        },
        "required": ["a"],
    }
    http = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello"},
            {
                "role": "assistant",
                "reasoning": "Hm.",
                "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": "c", "content": "3"},
        ],
        "tools": [
            {"type": "function", "function": {"name": "f", "description": "A tool.", "parameters": schema}}
        ],
        "reasoning_effort": "low",
    }
    assert (await gateway.http.post("/v1/chat/completions", json=http)).status_code == 200
    tool = pb.Tool(name="f", description="A tool.")
    tool.parameters.update(schema)
    await stub.Chat(
        pb.ChatRequest(
            messages=[
                pb.Message(role=pb.ROLE_SYSTEM, content="Be brief."),
                HELLO,
                pb.Message(
                    role=pb.ROLE_ASSISTANT,
                    reasoning="Hm.",
                    tool_calls=[pb.ToolCall(id="c", name="f", arguments="{}")],
                ),
                pb.Message(role=pb.ROLE_TOOL, tool_call_id="c", content="3"),
            ],
            tools=[tool],
            reasoning_effort=pb.REASONING_EFFORT_LOW,
        )
    )
    first, second = engine.requests
    assert first.prompt_token_ids == second.prompt_token_ids


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (pb.ChatRequest(), "messages"),
        (pb.ChatRequest(messages=[pb.Message(content="x")]), "messages[0].role"),
        (pb.ChatRequest(messages=[pb.Message(role=99, content="x")]), "messages[0].role"),  # type: ignore[arg-type]
        (pb.ChatRequest(messages=[pb.Message(role=pb.ROLE_TOOL, content="x")]), "messages[0].tool_call_id"),
        (pb.ChatRequest(messages=[HELLO], temperature=float("nan")), "temperature"),
        (pb.ChatRequest(messages=[HELLO], temperature=float("inf")), "temperature"),
        (pb.ChatRequest(messages=[HELLO], repetition_penalty=float("nan")), "repetition_penalty"),
        (pb.ChatRequest(messages=[HELLO], logit_bias={5: float("nan")}), "logit_bias"),
        (pb.ChatRequest(messages=[HELLO], max_tokens=0), "max_tokens"),
        (pb.ChatRequest(messages=[HELLO], n=0), "n"),
        (pb.ChatRequest(messages=[HELLO], top_logprobs=21), "top_logprobs"),
        (pb.ChatRequest(messages=[HELLO], stop=["x"] * 2000), "stop"),
        (pb.ChatRequest(messages=[HELLO], reasoning_effort=9), "reasoning_effort"),  # type: ignore[arg-type]
        (pb.ChatRequest(messages=[HELLO], tools=[pb.Tool(name="a b")]), "tools[0].function.name"),
        (pb.ChatRequest(messages=[HELLO], max_tokens=10**6), "max_tokens"),
    ],
)
async def test_wrong_requests_are_invalid_argument_with_the_field(
    stub: Stub, request_: pb.ChatRequest, param: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as whole:
        await stub.Chat(request_)
    with pytest.raises(grpc.aio.AioRpcError) as streamed:
        await stub.ChatStream(request_).read()
    for caught in (whole, streamed):
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert caught.value.details()
        assert dict(caught.value.trailing_metadata())["param"] == param


@pytest.mark.parametrize(
    "kind", [kind for kind in TABLE if kind.__module__ == "workers.errors" and kind is not errors.Cancelled]
)
async def test_every_error_of_an_engine_has_its_status(
    stub: Stub, engine: FakeEngine, kind: type[errors.CantataError]
) -> None:
    error = kind("A sentence.")
    engine.answer = lambda request: Script(refusal=error)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Chat(pb.ChatRequest(messages=[HELLO]))
    assert caught.value.code().name == error.status
    if isinstance(error, errors.Overloaded):
        assert float(dict(caught.value.trailing_metadata())["retry-after-s"]) == error.retry_after_s


async def test_a_schema_with_a_number_that_is_not_finite(stub: Stub) -> None:
    tool = pb.Tool(name="f")
    tool.parameters.fields["minProperties"].number_value = float("nan")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Chat(pb.ChatRequest(messages=[HELLO], tools=[tool]))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert dict(caught.value.trailing_metadata())["param"] == "tools[0].function.parameters"


async def test_names_in_errors_are_those_that_a_client_writes(stub: Stub) -> None:
    for request, kind in (
        (pb.ChatRequest(messages=[pb.Message(content="Hello")]), pb.Role),
        (pb.ChatRequest(messages=[HELLO], reasoning_effort=9), pb.ReasoningEffort),  # type: ignore[arg-type]
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Chat(request)
        names = re.findall("[A-Z]+_[A-Z_]+", caught.value.details() or "")
        assert names == [name for name, _ in kind.items() if not name.endswith("UNSPECIFIED")]


async def test_the_request_in_the_documentation_works(stub: Stub) -> None:
    text = (Path(__file__).parents[3] / "docs" / "api.md").read_text(encoding="utf-8")
    found = re.search(r"grpcurl -plaintext -d '([^']+)' \\\n +\S+:9000 (\S+)/Chat\n", text)
    assert found is not None
    assert found[2] == SERVICE
    assert (await stub.Chat(json_format.Parse(found[1], pb.ChatRequest()))).choices[0].message.content


async def test_other_models_are_not_found(stub: Stub) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Chat(pb.ChatRequest(model="other", messages=[HELLO]))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert dict(caught.value.trailing_metadata())["param"] == "model"
    models = await stub.ListModels(pb.ListModelsRequest())
    assert [(model.id, model.max_model_len) for model in models.models] == [("gpt-oss-test", 1024)]


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_a_client_that_knows_only_the_address(gateway: Gateway, version: str) -> None:
    """Finds the service by reflection, builds its messages from the descriptors, and calls it."""
    async with grpc.aio.insecure_channel(gateway.grpc_address) as channel:
        service = f"grpc.reflection.{version}.ServerReflection"
        call = channel.stream_stream(
            f"/{service}/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )()

        async def ask(**fields: str) -> reflection_pb2.ServerReflectionResponse:
            await call.write(reflection_pb2.ServerReflectionRequest(**fields))
            return await call.read()

        services = {service.name for service in (await ask(list_services="")).list_services_response.service}
        assert {SERVICE, "grpc.health.v1.Health", service} <= services
        for name in services:
            described = (await ask(file_containing_symbol=name)).file_descriptor_response
            files = [FileDescriptorProto.FromString(data) for data in described.file_descriptor_proto]
            assert name in {f"{file.package}.{found.name}" for file in files for found in file.service}
        pool = descriptor_pool.DescriptorPool()
        pending = (await ask(file_containing_symbol=SERVICE)).file_descriptor_response.file_descriptor_proto
        files = [FileDescriptorProto.FromString(data) for data in pending]
        for name in sorted({dependency for file in files for dependency in file.dependency}):
            for data in (await ask(file_by_filename=name)).file_descriptor_response.file_descriptor_proto:
                pool.AddSerializedFile(data)
        for file in files:
            if file.name not in {"google/protobuf/struct.proto"}:
                pool.Add(file)  # type: ignore[no-untyped-call]
        await call.done_writing()
        method = pool.FindServiceByName(SERVICE).FindMethodByName("Chat")
        request_class = message_factory.GetMessageClass(method.input_type)
        response_class = message_factory.GetMessageClass(method.output_type)
        chat = channel.unary_unary(
            f"/{SERVICE}/Chat",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=response_class.FromString,
        )
        answer = await chat(
            json_format.ParseDict({"messages": [{"role": "ROLE_USER", "content": "Hello"}]}, request_class())
        )
        assert (
            json_format.MessageToDict(answer)["choices"][0]["message"]["content"] == "Hello there, wörld 🎉!"
        )


async def test_health_follows_the_replicas(gateway: Gateway, engine: FakeEngine) -> None:
    async with grpc.aio.insecure_channel(gateway.grpc_address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        assert (
            await stub.Check(health_pb2.HealthCheckRequest())
        ).status == health_pb2.HealthCheckResponse.SERVING
        async with asyncio.timeout(60):
            watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
            status = (await watch.read()).status
            # before the first look at the replicas
            if status != health_pb2.HealthCheckResponse.SERVING:
                status = (await watch.read()).status
            assert status == health_pb2.HealthCheckResponse.SERVING
            engine.accepting = False
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            watch.cancel()


async def test_thirty_two_streams_at_once(stub: Stub, engine: FakeEngine, encoding: HarmonyEncoding) -> None:
    gate = asyncio.Event()
    engine.answer = lambda request: Script(
        turn(encoding, text=f"Answer {request.sampling.seed}."), gate=gate, gate_after=4
    )

    async def one(seed: int) -> str:
        return "".join(
            [event.text.text async for event in stub.ChatStream(pb.ChatRequest(messages=[HELLO], seed=seed))]
        )

    streams = [asyncio.create_task(one(seed)) for seed in range(32)]
    async with asyncio.timeout(20):
        await engine.arrived(32)
        gate.set()
        assert await asyncio.gather(*streams) == [f"Answer {seed}." for seed in range(32)]


async def test_api_keys(encoding: HarmonyEncoding, engine: FakeEngine) -> None:
    async with (
        serving(encoding, [engine], config=GatewayConfig(api_keys=("first",))) as gateway,
        grpc.aio.insecure_channel(gateway.grpc_address) as channel,
    ):
        stub = Stub(channel)
        request = pb.ChatRequest(messages=[HELLO])
        assert (await stub.Chat(request, metadata=(("authorization", "Bearer first"),))).choices
        for metadata, said in (
            ((), "Send an API key"),
            ((("authorization", "Bearer other"),), "Incorrect API key provided."),
            ((("authorization", "Bearer firs"),), "Incorrect API key provided."),
            ((("authorization", "Bearer firstly"),), "Incorrect API key provided."),
            ((("authorization", "first"),), "Send an API key"),
            ((("authorization", "Bearer"),), "Send an API key"),
            ((("authorization", "Bearer "),), "Send an API key"),
            ((("x-authorization", "Bearer first"),), "Send an API key"),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Chat(request, metadata=metadata)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert said in (caught.value.details() or "")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ChatStream(request, metadata=metadata).read()
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan")])
async def test_a_schema_with_a_number_that_json_does_not_have(gateway: Gateway, number: float) -> None:
    tool = pb.Tool(name="g")
    tool.parameters.update({"type": "object", "properties": {"a": {"enum": [1, number]}}})
    request = pb.ChatRequest(messages=[HELLO], tools=[pb.Tool(name="f"), tool])
    async with grpc.aio.insecure_channel(gateway.grpc_address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await inference_pb2_grpc.InferenceStub(channel).Chat(request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "tools[1].function.parameters has a number" in (caught.value.details() or "")


def message_of_bad_utf8() -> bytes:
    return (
        pb.ChatRequest(messages=[pb.Message(role=pb.ROLE_USER, content="abc")])
        .SerializeToString()
        .replace(b"abc", b"\xff\xfe\xfd")
    )


def field(number: int, data: bytes) -> bytes:
    length = bytes([len(data)]) if len(data) < 128 else bytes([len(data) & 127 | 128, len(data) >> 7])
    return bytes([number << 3 | 2]) + length + data


def message_with_a_deep_struct() -> bytes:
    """Written by hand: protobuf does not serialize it either."""
    struct = b""
    for _ in range(90):
        # fields { "a": struct_value }
        struct = field(1, field(1, b"a") + field(2, field(5, struct)))
    return field(pb.ChatRequest.TOOLS_FIELD_NUMBER, field(pb.Tool.PARAMETERS_FIELD_NUMBER, struct))


UNDECODABLE = {
    "not-utf-8": message_of_bad_utf8(),
    "truncated": pb.ChatRequest(messages=[HELLO]).SerializeToString()[:-2],
    "deep": message_with_a_deep_struct(),
    "noise": b"\xff" * 40,
}


def raw(channel: grpc.aio.Channel, path: str, *, streaming: bool = False) -> Any:
    return (channel.unary_stream if streaming else channel.unary_unary)(path)


@pytest.mark.parametrize("data", UNDECODABLE.values(), ids=UNDECODABLE)
async def test_messages_that_cannot_be_decoded(
    gateway: Gateway, engine: FakeEngine, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    methods = [(f"{SERVICE}/Chat", False), (f"{SERVICE}/ChatStream", True)]
    if data in (
        UNDECODABLE["truncated"],
        UNDECODABLE["noise"],
    ):  # the others have fields that these methods do not know
        methods += [
            (f"{SERVICE}/ListModels", False),
            ("grpc.health.v1.Health/Check", False),
            ("grpc.health.v1.Health/Watch", True),
        ]
    async with grpc.aio.insecure_channel(gateway.grpc_address) as channel:
        for path, streaming in methods:
            caplog.clear()
            call = raw(channel, f"/{path}", streaming=streaming)(data)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await (call.read() if streaming else call)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, path
            assert "cannot be decoded" in (caught.value.details() or "")
            (record,) = caplog.records
            assert "cannot be decoded" in record.getMessage()
            assert record.exc_info is None
    registry = gateway.service.metrics.registry
    for path, _ in methods:
        service, _, method = path.rpartition("/")
        labels = {"endpoint": f"{service.rpartition('.')[2]}/{method}", "status": "INVALID_ARGUMENT"}
        assert registry.get_sample_value("cantata_gateway_requests_total", labels) == 1
    assert engine.requests == []


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_a_reflection_request_that_cannot_be_decoded(gateway: Gateway, version: str) -> None:
    async with grpc.aio.insecure_channel(gateway.grpc_address) as channel:
        call = channel.stream_stream(f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo")()
        await call.write(b"\xff" * 10)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_the_key_is_asked_for_before_the_message_is_read(
    encoding: HarmonyEncoding, engine: FakeEngine
) -> None:
    async with (
        serving(encoding, [engine], config=GatewayConfig(api_keys=("first",))) as gateway,
        grpc.aio.insecure_channel(gateway.grpc_address) as channel,
    ):
        for path, streaming in (
            (f"/{SERVICE}/Chat", False),
            (f"/{SERVICE}/ChatStream", True),
            (f"/{SERVICE}/ListModels", False),
        ):
            call = raw(channel, path, streaming=streaming)(b"\xff" * 40)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await (call.read() if streaming else call)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            call = raw(channel, path, streaming=streaming)(
                b"\xff" * 40, metadata=(("authorization", "Bearer first"),)
            )
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await (call.read() if streaming else call)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
