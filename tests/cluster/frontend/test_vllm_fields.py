"""Fields and routes that vLLM adds to OpenAI's API."""

import asyncio
import threading
from typing import Any

import pytest

from cluster.config import GatewayConfig
from cluster.generation import prompts
from cluster.harmony.encoding import HarmonyEncoding
from tests.support.fake_engine import FakeEngine, Script
from tests.support.gateway import Gateway, serving, turn

USER = {"role": "user", "content": "Hello"}
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


async def post(gateway: Gateway, path: str, **fields: Any) -> dict[str, Any]:
    text = {"messages": [USER]} if path == CHAT else {"prompt": "x"}
    response = await gateway.http.post(path, json={**text, **fields})
    assert response.status_code == 200, response.text
    assert "x-cantata-ignored-fields" not in response.headers
    answer: dict[str, Any] = response.json()
    return answer


async def refusal(gateway: Gateway, path: str, **fields: Any) -> tuple[int, str, str]:
    text = {"messages": [USER]} if path == CHAT else {"prompt": "x"}
    response = await gateway.http.post(path, json={**text, **fields})
    error = response.json()["error"]
    return response.status_code, error["param"], error["code"]


async def test_tokens_of_logprobs_as_ids(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    ids = encoding.encode("Hello there")
    engine.answer = lambda request: Script(turn(encoding, text="Hello there"))
    fields = {"logprobs": True, "top_logprobs": 1, "return_tokens_as_token_ids": True}
    named = [f"token_id:{token_id}" for token_id in ids]
    content = (await post(gateway, CHAT, **fields))["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == named
    assert [entry["top_logprobs"][0]["token"] for entry in content] == named
    assert bytes(byte for entry in content for byte in entry["bytes"]) == b"Hello there"
    response = await gateway.http.post(CHAT, json={"messages": [USER], "stream": True, **fields})
    assert all(f'"token":"{name}"' in response.text for name in named)
    engine.answer = lambda request: Script(ids)
    logprobs = (await post(gateway, COMPLETIONS, logprobs=1, return_tokens_as_token_ids=True))["choices"][0][
        "logprobs"
    ]
    assert logprobs["tokens"] == named
    assert [list(top) for top in logprobs["top_logprobs"]] == [[name] for name in named]
    plain = (await post(gateway, COMPLETIONS, logprobs=0))["choices"][0]["logprobs"]
    assert "".join(plain["tokens"]) == "Hello there"


async def test_whole_answers_have_null_where_ids_were_not_requested(gateway: Gateway) -> None:
    answer = await post(gateway, CHAT)
    assert answer["prompt_token_ids"] is answer["choices"][0]["token_ids"] is None
    choice = (await post(gateway, COMPLETIONS))["choices"][0]
    assert choice["prompt_token_ids"] is choice["token_ids"] is None
    choice = (await post(gateway, COMPLETIONS, prompt=[5, 6], return_token_ids=True))["choices"][0]
    assert choice["prompt_token_ids"] == [5, 6]
    assert choice["token_ids"]


async def test_prompts_are_truncated_on_request(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    ids = list(range(10, 40))

    async def prompt(path: str = COMPLETIONS, **fields: Any) -> list[int]:
        await post(gateway, path, **fields)
        return list(engine.requests[-1].prompt_token_ids)

    assert await prompt(prompt=ids, truncate_prompt_tokens=7) == ids[-7:]
    assert await prompt(prompt=ids, truncate_prompt_tokens=7, truncation_side="left") == ids[-7:]
    assert await prompt(prompt=ids, truncate_prompt_tokens=7, truncation_side="right") == ids[:7]
    assert await prompt(prompt=ids, truncate_prompt_tokens=30) == ids
    assert await prompt(prompt=ids, truncate_prompt_tokens=1) == ids[-1:]
    assert await prompt(prompt=ids) == ids
    context = engine.max_model_len
    for longer in ([5] * (context - 3) + ids, [5] * (8 * context)):
        kept = await prompt(prompt=longer, truncate_prompt_tokens=-1, max_tokens=20)
        assert kept == longer[-(context - 20) :]
        assert len(await prompt(prompt=longer, truncate_prompt_tokens=-1, max_tokens=1)) == context - 1
    text = "word " * (2 * context)
    assert await prompt(prompt=text, truncate_prompt_tokens=9) == encoding.encode(text)[-9:]
    whole = (await gateway.http.post("/tokenize", json={"messages": [USER]})).json()["tokens"]
    assert await prompt(CHAT, truncate_prompt_tokens=11) == whole[-11:]
    chat = await prompt(CHAT, messages=[{"role": "user", "content": text}], truncate_prompt_tokens=-1)
    assert len(chat) == context - 1
    assert chat[-3:] == whole[-3:]
    echoed = await post(gateway, COMPLETIONS, prompt="a b c d", truncate_prompt_tokens=1, echo=True)
    assert not echoed["choices"][0]["text"].startswith("a")


async def test_what_cannot_be_truncated_is_refused(gateway: Gateway, engine: FakeEngine) -> None:
    for path in (CHAT, COMPLETIONS):
        for wrong in (0, -2, 2**31):
            assert await refusal(gateway, path, truncate_prompt_tokens=wrong) == (
                400,
                "truncate_prompt_tokens",
                None,
            )
        assert await refusal(gateway, path, truncate_prompt_tokens=1, truncation_side="middle") == (
            400,
            "truncation_side",
            None,
        )
    context = engine.max_model_len
    too_long = ([5] * (8 * context + 1), "word " * (40 * context), "x" * 10_000_000)
    for prompt in too_long:
        status, param, code = await refusal(gateway, COMPLETIONS, prompt=prompt, truncate_prompt_tokens=5)
        assert (status, param, code) == (400, "prompt", "context_length_exceeded")
    message = {"role": "user", "content": "word " * (40 * context)}
    status, param, code = await refusal(gateway, CHAT, messages=[message], truncate_prompt_tokens=5)
    assert (status, param, code) == (400, "messages", "context_length_exceeded")
    assert not engine.requests


async def test_the_cache_salt_reaches_the_engine(gateway: Gateway, engine: FakeEngine) -> None:
    for path in (CHAT, COMPLETIONS):
        await post(gateway, path, cache_salt="secret", n=2)
        assert [request.cache_salt for request in engine.requests[-2:]] == ["secret", "secret"]
        await post(gateway, path)
        assert engine.requests[-1].cache_salt is None
        for wrong in ("", "x" * 257):
            assert await refusal(gateway, path, cache_salt=wrong) == (400, "cache_salt", None)


async def test_a_chat_is_tokenized_without_the_beginning_of_an_answer(
    gateway: Gateway, encoding: HarmonyEncoding
) -> None:
    bodies = [{"messages": [USER]} | more for more in ({}, {"add_generation_prompt": True})]
    bodies.append({"messages": [USER], "add_generation_prompt": False})
    default, begun, ended = [
        (await gateway.http.post("/tokenize", json=body)).json()["tokens"] for body in bodies
    ]
    assert default == begun == ended + encoding.encode_with_special("<|start|>assistant")


async def test_the_model_has_a_root(gateway: Gateway) -> None:
    (model,) = (await gateway.http.get("/v1/models")).json()["data"]
    assert (model["id"], model["root"], model["parent"]) == ("gpt-oss-test", "fake", None)
    assert (await gateway.http.get("/v1/models/gpt-oss-test")).json() == model


async def test_ping_and_load_need_no_key(encoding: HarmonyEncoding, engine: FakeEngine) -> None:
    async with serving(encoding, [engine], config=GatewayConfig(api_keys=("key",))) as gateway:
        for method in ("GET", "POST"):
            answer = await gateway.http.request(method, "/ping", headers={"authorization": ""})
            assert (answer.status_code, answer.content) == (200, b"")
        engine.accepting = False
        assert (await gateway.http.get("/ping")).status_code == 503
        engine.accepting = True

        async def load() -> dict[str, int]:
            found: dict[str, int] = (await gateway.http.get("/load", headers={"authorization": ""})).json()
            return found

        assert await load() == {"server_load": 0}
        gate = asyncio.Event()
        engine.answer = lambda request: Script(turn(encoding, text="Hello"), gate=gate)
        running = asyncio.create_task(gateway.http.post(CHAT, json={"messages": [USER], "n": 3}))
        async with asyncio.timeout(30):
            await engine.arrived(3)
        assert await load() == {"server_load": 3}
        gate.set()
        assert (await running).status_code == 200
        assert await load() == {"server_load": 0}


async def test_allowed_tokens_reach_the_engine(gateway: Gateway, engine: FakeEngine) -> None:
    for path in (CHAT, COMPLETIONS):
        await post(gateway, path, allowed_token_ids=[9, 5, 9])
        assert engine.requests[-1].sampling.allowed_token_ids == (5, 9)
        await post(gateway, path)
        assert engine.requests[-1].sampling.allowed_token_ids == ()
        for wrong in ([], [-1], [2048], [5, 99999]):
            assert await refusal(gateway, path, allowed_token_ids=wrong) == (400, "allowed_token_ids", None)


async def test_the_priority_reaches_the_engine(gateway: Gateway, engine: FakeEngine) -> None:
    for path in (CHAT, COMPLETIONS):
        for priority in (-(2**63), -1, 3.0, 2**63 - 1):
            await post(gateway, path, priority=priority, n=2)
            assert [request.priority for request in engine.requests[-2:]] == [priority, priority]
        await post(gateway, path)
        assert engine.requests[-1].priority == 0
        for wrong in (2**63, -(2**63) - 1, 0.5, "high"):
            assert await refusal(gateway, path, priority=wrong) == (400, "priority", None)


async def test_bad_words_reach_the_engine_as_tokens(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    for path in (CHAT, COMPLETIONS):
        await post(gateway, path, bad_words=["Paris", " New York"], n=2)
        texts = ("Paris", " Paris", "New York", " New York")
        wanted = {tuple(encoding.encode(text)) for text in texts}
        assert len(wanted) == 4
        for request in engine.requests[-2:]:
            assert set(request.sampling.bad_words_token_ids) == wanted
        for wrong, param in (
            ([""], "bad_words[0]"),
            (["x", " "], "bad_words[1]"),
            (["x" * 257], "bad_words[0]"),
        ):
            assert await refusal(gateway, path, bad_words=wrong) == (400, param, None)
        assert await refusal(gateway, path, bad_words=["x"] * 65) == (400, "bad_words", None)
        assert await refusal(gateway, path, bad_words="x") == (400, "bad_words", None)
        assert await refusal(gateway, path, bad_words=["x", 5]) == (400, "bad_words[1]", None)
        await post(gateway, path, bad_words=["🎉" * 256] * 64)


async def test_long_bad_words_are_encoded_once_and_beside_the_loop(
    gateway: Gateway, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 of 256 characters take 0.1 s."""
    encode, threads = prompts.bad_word_tokens, []

    def watched(*args: Any, **keywords: Any) -> Any:
        threads.append(threading.current_thread())
        return encode(*args, **keywords)

    monkeypatch.setattr(prompts, "bad_word_tokens", watched)
    await post(gateway, COMPLETIONS, prompt=["x", "y", "z"], bad_words=["a b " * 64] * 64)
    await post(gateway, CHAT, bad_words=["a b " * 64] * 64)
    assert len(threads) == 2
    assert threading.main_thread() not in threads
    assert all(request.sampling.bad_words_token_ids for request in engine.requests)


async def test_words_of_the_format_cannot_be_bad_in_a_chat(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    first = encoding.decode(encoding.encode_literal("commentary")[:1])
    for word in ("final", "analysis", "commentary", "assistant", first):
        assert await refusal(gateway, CHAT, bad_words=["x y", word]) == (400, "bad_words[1]", None)
        await post(gateway, COMPLETIONS, bad_words=[word])


async def test_nulls_are_no_request(gateway: Gateway, engine: FakeEngine) -> None:
    fields = (
        *("return_tokens_as_token_ids", "truncate_prompt_tokens", "truncation_side"),
        *("cache_salt", "allowed_token_ids", "bad_words", "priority"),
    )
    for path in (CHAT, COMPLETIONS):
        await post(gateway, path, **dict.fromkeys(fields))
        await post(gateway, path, bad_words=[])
    assert len(engine.requests) == 4
