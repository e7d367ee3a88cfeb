"""The defaults and spellings of other servers and clients, which are no errors."""

from typing import Any

import pytest

from cluster.harmony.encoding import HarmonyEncoding
from tests.support.fake_engine import FakeEngine, Script
from tests.support.gateway import Gateway
from workers.request import SamplingParams

USER = {"role": "user", "content": "Hello"}
CHAT = "/v1/chat/completions"


async def sampling(gateway: Gateway, engine: FakeEngine, path: str = CHAT, **fields: Any) -> SamplingParams:
    text = {"messages": [USER]} if path == CHAT else {"prompt": "x"}
    response = await gateway.http.post(path, json={**text, **fields})
    assert response.status_code == 200, response.text
    assert "x-cantata-ignored-fields" not in response.headers
    return engine.requests[-1].sampling


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
async def test_they_are_served(gateway: Gateway, engine: FakeEngine, path: str) -> None:
    defaults = {
        "skip_special_tokens": True,
        "include_stop_str_in_output": False,
        "use_beam_search": False,
        "min_tokens": 0,
        "min_p": 0,
        "top_k": -1,
        "stop": [],
        "stop_token_ids": [],
        "logit_bias": None,
        "user": None,
    }
    await sampling(gateway, engine, path, **defaults)


async def test_those_of_a_chat_are_served(gateway: Gateway, engine: FakeEngine) -> None:
    params = await sampling(gateway, engine, logprobs=False, top_logprobs=0)
    assert params.logprobs is None
    await sampling(
        gateway,
        engine,
        add_generation_prompt=True,
        continue_final_message=False,
        echo=False,
        metadata={"run": 7, "nested": {"a": []}},
        skip_special_tokens=False,
        structured_outputs=None,
    )


async def test_whole_numbers_may_be_written_as_floats(gateway: Gateway, engine: FakeEngine) -> None:
    params = await sampling(
        gateway,
        engine,
        max_tokens=20.0,
        top_k=5.0,
        seed=7.0,
        n=1.0,
        min_tokens=2.0,
        logprobs=True,
        top_logprobs=2.0,
    )
    assert (params.max_tokens, params.top_k, params.seed, params.min_tokens, params.logprobs) == (
        20,
        5,
        7,
        2,
        2,
    )
    assert isinstance(params.max_tokens, int)
    params = await sampling(gateway, engine, max_completion_tokens=21.0)
    assert params.max_tokens == 21
    params = await sampling(gateway, engine, "/v1/completions", max_tokens=3.0, logprobs=1.0, best_of=1.0)
    assert (params.max_tokens, params.logprobs) == (3, 1)


async def test_biases_may_be_written_as_texts(gateway: Gateway, engine: FakeEngine) -> None:
    params = await sampling(gateway, engine, logit_bias={"5": "-100", "6": "1.5", "7": 2})
    assert params.logit_bias == ((5, -100.0), (6, 1.5), (7, 2.0))


async def test_top_p_of_zero_is_greedy(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    engine.answer = lambda request: Script(encoding.encode("ab"))
    for path in (CHAT, "/v1/completions"):
        params = await sampling(gateway, engine, path, top_p=0, temperature=0.7)
        assert (params.temperature, params.top_p) == (0.0, 1.0)
        params = await sampling(gateway, engine, path, top_p=0.2, temperature=0.7)
        assert params.temperature == pytest.approx(0.7)
        assert params.top_p == pytest.approx(0.2)
