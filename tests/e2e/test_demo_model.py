"""The demo model that `make serve` serves: its answers over every API, and its folder."""

import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.harmony.encoding import HarmonyEncoding
from cluster.harmony.message import Message, MessageEnd
from cluster.harmony.parse import HarmonyParser
from cluster.harmony.render import Conversation, render
from cluster.rpc import inference_pb2 as pb
from cluster.rpc import inference_pb2_grpc
from tests.support.gateway import Gateway, serving
from tests.support.random_engine import RandomEngine
from workers.engine.llm import LLM, SamplingParams
from workers.errors import CheckpointError

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "deploy/demo"
MAX_BYTES = 8_000_000
SUM = "What is 47 + 38?"
SUM_ANSWER = "47 + 38 = 85"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Gets the weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "city": {"type": "string"}},
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def encoding() -> HarmonyEncoding:
    return HarmonyEncoding.load(DEMO)


@pytest.fixture
async def gateway(encoding: HarmonyEncoding) -> AsyncIterator[Gateway]:
    engine = await RandomEngine(DEMO).start()
    try:
        async with serving(encoding, [engine], model_name="demo") as gateway:
            yield gateway
    finally:
        await engine.stop()


async def message(gateway: Gateway, content: str | list[dict[str, Any]], **body: Any) -> dict[str, Any]:
    """Return the message that answers a chat, greedily."""
    messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
    answer = await gateway.http.post(
        "/v1/chat/completions", json={"model": "demo", "messages": messages, "temperature": 0, **body}
    )
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    assert choice["finish_reason"] in ("stop", "tool_calls")
    return dict(choice["message"])


async def test_answers_over_http(gateway: Gateway) -> None:
    """One engine for all that chats can ask: its start is most of the test's time."""
    for constraint in ("off", "headers"):
        answer = await message(gateway, SUM, harmony_constraint=constraint)
        assert answer["content"] == SUM_ANSWER
        assert "7+8=15" in answer["reasoning"]
    assert "Cantata" in (await message(gateway, "What is Cantata?"))["content"]
    assert (await message(gateway, "Hello!"))["content"].startswith("Hello!")
    low = await message(gateway, SUM, reasoning_effort="low")
    high = await message(gateway, SUM, reasoning_effort="high")
    assert len(low["reasoning"]) < len(answer["reasoning"]) < len(high["reasoning"])
    await check_a_call_and_its_result(gateway)
    await check_a_name_is_remembered(gateway)
    filled = await message(
        gateway,
        "Anna is 31 years old and lives in Paris.",
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}},
    )
    assert json.loads(filled["content"]) == {"name": "Anna", "age": 31, "city": "Paris"}
    await check_the_stream(gateway)
    await check_responses(gateway)
    await check_messages(gateway)
    await check_grpc(gateway)


async def check_a_call_and_its_result(gateway: Gateway) -> None:
    question = {"role": "user", "content": "What is the weather in Paris?"}
    called = await message(gateway, [question], tools=[WEATHER])
    (call,) = called["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}
    result = {"role": "tool", "tool_call_id": call["id"], "content": '{"temperature":21,"sky":"clear"}'}
    told = await message(gateway, [question, called, result], tools=[WEATHER])
    assert "21" in told["content"]
    assert "clear" in told["content"]


async def check_a_name_is_remembered(gateway: Gateway) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "My name is Anna."}]
    messages.append(await message(gateway, messages))
    messages.append({"role": "user", "content": "What is my name?"})
    assert (await message(gateway, messages))["content"] == "Your name is Anna."


async def check_the_stream(gateway: Gateway) -> None:
    stream = await gateway.client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": SUM}], temperature=0, stream=True
    )
    texts = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
    assert "".join(texts) == SUM_ANSWER
    assert sum(bool(text) for text in texts) > 1


async def check_responses(gateway: Gateway) -> None:
    answer = await gateway.client.responses.create(model="demo", input=SUM, temperature=0)
    assert answer.output_text == SUM_ANSWER


async def check_messages(gateway: Gateway) -> None:
    body = {"model": "demo", "max_tokens": 200, "messages": [{"role": "user", "content": SUM}]}
    answer = await gateway.http.post("/v1/messages", json={**body, "temperature": 0})
    assert answer.status_code == 200, answer.text
    assert answer.json()["content"][-1] == {"type": "text", "text": SUM_ANSWER, "citations": None}


async def check_grpc(gateway: Gateway) -> None:
    request = pb.ChatRequest(messages=[pb.Message(role=pb.ROLE_USER, content=SUM)], temperature=0.0)
    async with grpc.aio.insecure_channel(gateway.grpc_address) as channel:
        answer = await inference_pb2_grpc.InferenceStub(channel).Chat(request, timeout=60)
    assert answer.choices[0].message.content == SUM_ANSWER


def test_answers_of_the_offline_engine(encoding: HarmonyEncoding) -> None:
    prompt = render(Conversation((Message("user", SUM),)), encoding)
    with LLM(DEMO, kv_cache_bytes=1 << 24) as llm:
        (output,) = llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=200), use_tqdm=False)
    parser = HarmonyParser(encoding)
    events = [event for token_id in output.outputs[0].token_ids for event in parser.push(token_id)]
    (*_, last) = [event.message for event in events if isinstance(event, MessageEnd)]
    assert last.content == SUM_ANSWER


def test_the_folder_is_small_and_complete() -> None:
    files = {path.name: path.stat().st_size for path in DEMO.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "README.md"} <= files.keys()
    assert sum(files.values()) <= MAX_BYTES


@pytest.mark.parametrize("change", ["cut off", "a pointer instead of the file"])
def test_a_folder_that_was_changed_is_refused_by_name(tmp_path: Path, change: str) -> None:
    shutil.copytree(DEMO, tmp_path / "demo")
    weights = tmp_path / "demo/model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(
        whole[: len(whole) // 2]
        if change == "cut off"
        else b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    )
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        LLM(tmp_path / "demo", kv_cache_bytes=1 << 24)
