"""Log-probabilities of prompt tokens over HTTP and gRPC, against the logits of the whole prompt."""

import itertools
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import torch

from cluster.events import TokenLogprob
from cluster.generation import Generation, admission, limits
from cluster.harmony.encoding import HarmonyEncoding
from cluster.rpc import inference_pb2 as pb
from cluster.rpc import inference_pb2_grpc
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import Gateway, make_encoding, serving
from tests.support.random_engine import RandomEngine, write_random_checkpoint
from workers.engine.llm import LLM

TEXT = "<|start|>user<|message|>Grüße 🎉, the capital of France is <|end|>"
USER = {"role": "user", "content": "The capital of France is?"}
# fp32: the same sums in another order; over gRPC fp32 numbers.
TOLERANCE = {"rel": 0, "abs": 2e-5}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random") / "model"
    return write_random_checkpoint(folder, make_encoding(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    with LLM(checkpoint, dtype="float32", kv_cache_bytes=8 << 20) as llm:
        yield llm


@pytest.fixture
async def scored(checkpoint: Path, encoding: HarmonyEncoding) -> AsyncIterator[Gateway]:
    engine = await RandomEngine(checkpoint).start()
    try:
        async with serving(encoding, [engine]) as gateway:
            yield gateway
    finally:
        await engine.stop()


async def posted(gateway: Gateway, path: str, **body: Any) -> dict[str, Any]:
    answer = await gateway.http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def check_vllm_form(
    llm: LLM, encoding: HarmonyEncoding, ids: list[int], found: list[Any], num_top: int
) -> None:
    expected = llm.logits(ids).log_softmax(-1)
    assert len(found) == len(ids)
    assert found[0] is None
    for position, entry in enumerate(found[1:], start=1):
        row, token = expected[position - 1], str(ids[position])
        assert next(iter(entry)) == token
        best = [str(int(index)) for index in row.topk(num_top).indices] if num_top else []
        assert set(entry) == {token, *best}
        for key, value in entry.items():
            assert value["logprob"] == pytest.approx(float(row[int(key)]), **TOLERANCE)
            assert value["rank"] == (best.index(key) + 1 if key in best else None)
        assert entry[token]["decoded_token"] == encoding.decode(
            [ids[position]], skip_special_tokens=False
        ) or (entry[token]["decoded_token"].startswith("bytes:"))


@pytest.mark.parametrize("num_top", [0, 3])
async def test_they_are_those_of_the_logits(
    scored: Gateway, llm: LLM, encoding: HarmonyEncoding, num_top: int
) -> None:
    """Also where the prompt is in the prefix cache, in a second answer."""
    for _ in range(2):
        chat = await posted(
            scored,
            "/v1/chat/completions",
            messages=[USER],
            prompt_logprobs=num_top,
            max_tokens=4,
            n=2,
            return_token_ids=True,
        )
        check_vllm_form(llm, encoding, chat["prompt_token_ids"], chat["prompt_logprobs"], num_top)
        assert chat["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        prompts = [[5, 6, 7], list(encoding.encode_with_special(TEXT))]
        text = await posted(
            scored, "/v1/completions", prompt=prompts, prompt_logprobs=num_top, max_tokens=2, n=2
        )
        for index, choice in enumerate(text["choices"]):
            check_vllm_form(llm, encoding, prompts[index // 2], choice["prompt_logprobs"], num_top)
    plain = await posted(scored, "/v1/chat/completions", messages=[USER], max_tokens=4)
    assert plain["prompt_logprobs"] is None


@pytest.mark.parametrize("max_tokens", [0, 2])
@pytest.mark.parametrize("as_ids", [False, True])
async def test_an_echo_has_them_as_lm_eval_reads_them(
    scored: Gateway, llm: LLM, encoding: HarmonyEncoding, max_tokens: int, as_ids: bool
) -> None:
    ids = encoding.encode_with_special(TEXT)
    body = {
        "prompt": [list(ids)] if as_ids else [TEXT],
        "echo": True,
        "logprobs": 1,
        "max_tokens": max_tokens,
        "temperature": 0,
        "seed": 1,
        "skip_special_tokens": not as_ids,
    }
    answer = await posted(scored, "/v1/completions", **body)
    (choice,) = answer["choices"]
    found = choice["logprobs"]
    assert choice["text"].startswith(TEXT)
    assert len(found["tokens"]) == len(ids) + max_tokens
    assert answer["usage"]["completion_tokens"] == max_tokens
    expected = llm.logits(ids).log_softmax(-1)
    assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
    for position in range(1, len(ids)):
        row = expected[position - 1]
        logprob, best = found["token_logprobs"][position], found["top_logprobs"][position]
        assert logprob == pytest.approx(float(row[ids[position]]), **TOLERANCE)
        assert max(best.values()) == pytest.approx(float(row.max()), **TOLERANCE)
    for offset, token in zip(found["text_offset"], found["tokens"], strict=True):
        if not token.startswith("bytes:"):
            assert choice["text"][offset:].startswith(token) or max_tokens
    assert found["text_offset"][: len(ids)] == [
        len(encoding.decode(ids[:end], skip_special_tokens=False).rstrip("�")) for end in range(len(ids))
    ]
    stream = await scored.client.completions.create(model="gpt-oss-test", stream=True, **_stream_body(body))
    chunks = [chunk.choices[0] async for chunk in stream]
    assert "".join(chunk.text for chunk in chunks) == choice["text"]
    tokens = itertools.chain.from_iterable(chunk.logprobs.tokens or [] for chunk in chunks if chunk.logprobs)
    assert list(tokens) == found["tokens"]


def _stream_body(body: dict[str, Any]) -> dict[str, Any]:
    own = ("prompt", "echo", "logprobs", "max_tokens", "temperature", "seed")
    return {name: body[name] for name in own} | {
        "extra_body": {name: value for name, value in body.items() if name not in own}
    }


async def test_a_begun_answer_is_scored_too(scored: Gateway, llm: LLM, encoding: HarmonyEncoding) -> None:
    body = {
        "messages": [USER, {"role": "assistant", "content": "It is Paris."}],
        "continue_final_message": True,
        "prompt_logprobs": 0,
        "max_tokens": 1,
        "return_token_ids": True,
    }
    answer = await posted(scored, "/v1/chat/completions", **body)
    ids = answer["prompt_token_ids"]
    assert ids[-len(encoding.encode("It is Paris.")) :] == list(encoding.encode("It is Paris."))
    check_vllm_form(llm, encoding, ids, answer["prompt_logprobs"], 0)
    for more in ({"guided_choice": ["It is Paris."]}, {"harmony_constraint": "headers"}):
        refused = await scored.http.post("/v1/chat/completions", json=body | more)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt_logprobs")


async def test_grpc_has_them(scored: Gateway, llm: LLM) -> None:
    async with grpc.aio.insecure_channel(scored.grpc_address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        request = pb.ChatRequest(
            messages=[pb.Message(role=pb.ROLE_USER, content="Hello")],
            prompt_logprobs=1,
            return_token_ids=True,
            max_tokens=3,
            seed=1,
        )
        whole = await stub.Chat(request)
        (head, *_) = [event.head async for event in stub.ChatStream(request)]
    ids = list(whole.prompt_token_ids)
    expected = llm.logits(ids).log_softmax(-1)
    for found in (whole.prompt_logprobs, head.prompt_logprobs):
        assert [entry.token_id for entry in found] == ids[1:]
        for row, entry in zip(expected[:-1], found, strict=True):
            assert entry.logprob == pytest.approx(float(row[entry.token_id]), **TOLERANCE)
            assert entry.top[0].logprob == pytest.approx(float(torch.max(row)), **TOLERANCE)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ("/v1/chat/completions", {"prompt_logprobs": 21}, "prompt_logprobs"),
        ("/v1/chat/completions", {"prompt_logprobs": -1}, "prompt_logprobs"),
        ("/v1/completions", {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ("/v1/completions", {"echo": True, "logprobs": 1, "n": 2, "stream": True}, "n"),
    ],
)
async def test_what_there_is_not_is_refused(
    gateway: Gateway, path: str, body: dict[str, Any], param: str
) -> None:
    prompt: dict[str, Any] = {"messages": [USER]} if "chat" in path else {"prompt": "Hello"}
    refused = await gateway.http.post(path, json=prompt | body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


async def test_their_number_is_bounded(
    gateway: Gateway, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_PROMPT_SCORES", 12)
    bodies = ({"prompt_logprobs": 3}, {"echo": True, "logprobs": 3}, {"prompt_logprobs": 1, "best_of": 1})
    expected = ((400, "prompt_logprobs"), (400, "logprobs"), (200, None))
    for body, (status, param) in zip(bodies, expected, strict=True):
        answer = await gateway.http.post("/v1/completions", json={"prompt": [[5, 6], [7, 8]], **body})
        assert answer.status_code == status
        assert status == 200 or answer.json()["error"]["param"] == param
    monkeypatch.setattr(admission, "MAX_SCORES", 7)
    body = {"prompt": [[5, 6], [7, 8]], "prompt_logprobs": 1}
    assert (await gateway.http.post("/v1/completions", json=body)).status_code == 429
    del body["prompt_logprobs"]
    assert (await gateway.http.post("/v1/completions", json=body)).status_code == 200
    assert gateway.service._admission.num_scores == 0


async def test_those_of_each_choice_count(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_PROMPT_SCORES", 12)
    body: dict[str, Any] = {"prompt": [5, 6, 7, 8], "echo": True, "logprobs": 2, "max_tokens": 1}
    assert (await gateway.http.post("/v1/completions", json=body)).status_code == 200
    refused = await gateway.http.post("/v1/completions", json=body | {"n": 2})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "logprobs")
    assert "fewer alternatives or choices" in refused.json()["error"]["message"]
    # A chat's answer has them once.
    monkeypatch.setattr(limits, "MAX_PROMPT_SCORES", 1000)
    chat = {"messages": [USER], "prompt_logprobs": 2, "max_tokens": 1, "return_token_ids": True}
    num_tokens = len((await posted(gateway, "/v1/chat/completions", **chat))["prompt_token_ids"])
    monkeypatch.setattr(limits, "MAX_PROMPT_SCORES", 3 * num_tokens)
    await posted(gateway, "/v1/chat/completions", **chat, n=2)


async def test_they_are_converted_once_for_all_choices(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted: list[int] = []
    original = Generation.prompt_logprobs

    def counting(self: Generation, prompt: int = 0, **options: Any) -> Iterator[TokenLogprob]:
        converted.append(prompt)
        return original(self, prompt, **options)

    monkeypatch.setattr(Generation, "prompt_logprobs", counting)
    body = {"prompt": [[5, 6], [7, 8, 9]], "n": 4, "prompt_logprobs": 1, "max_tokens": 1}
    choices = (await posted(gateway, "/v1/completions", **body))["choices"]
    assert converted == [0, 1]
    assert [len(choice["prompt_logprobs"]) for choice in choices] == [2] * 4 + [3] * 4
    converted.clear()
    del body["prompt_logprobs"]
    choices = (await posted(gateway, "/v1/completions", **body, echo=True, logprobs=1))["choices"]
    assert converted == [0, 1]
    assert [len(choice["logprobs"]["tokens"]) for choice in choices] == [3] * 4 + [4] * 4
