"""Requests that real clients sent, each served or refused for a reason written here.

`tests/clients/requests.jsonl` holds 184 requests: captured from openai 3.57 (Python), litellm 1.110
(library and proxy), langchain-openai 1.7, pydantic-ai 2.38, openai-agents 0.24, instructor 1.17,
llm 0.36, smolagents 1.26, guidance 0.3 and lm-eval 0.4.13, and some written by hand. Their `status`
and `error` are what an early version answered.
"""

import json
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.harmony.encoding import HarmonyEncoding
from tests.support.fake_engine import FakeEngine, Script
from tests.support.gateway import Gateway, serving, turn
from tests.support.response_events import read_stream, text_of

FILE = Path(__file__).parents[2] / "clients" / "requests.jsonl"
TEXT = "Hello."


@dataclass(frozen=True)
class Refusal:
    """A reason for which requests are refused, with the answer that says it.

    Attributes:
        cases: the requests' names, see `requests`.
    """

    status: int
    words: str
    param: str | None
    cases: tuple[str, ...]


WRONG = (
    # llguidance forgets how many tokens such a rule has had when a draft's tokens are taken back.
    Refusal(
        400,
        "has 'max_tokens': this option is not supported",
        "structured_outputs.grammar",
        ("guidance: guidance VLLMModel (regex / llguidance)",),
    ),
    Refusal(400, "best_of is not offered", "best_of", ("openai3: completions suffix/best_of",)),
    Refusal(404, "Invalid URL (POST /v1/embeddings)", None, ("openai3: embeddings (NotFound expected)",)),
    Refusal(404, "Invalid URL (GET /v1/files)", None, ("openai3: moderations / files / batches",)),
    Refusal(404, "Invalid URL (GET /v1/batches)", None, ("openai3: moderations / files / batches (2)",)),
    Refusal(405, "GET is not allowed", None, ("openai3: moderations / files / batches (3)",)),
    Refusal(404, "'nope' does not exist", "model", ("openai3: errors: types",)),
    Refusal(400, "temperature must be 0 to 2, got 9.", "temperature", ("openai3: errors: types (2)",)),
    Refusal(400, "at least one message", "messages", ("openai3: errors: types (3)",)),
    Refusal(400, "max_tokens must be at least 1, got 0.", "max_tokens", ("openai3: errors: types (4)",)),
    Refusal(400, "n must be 1 to 128, got 0.", "n", ("openai3: errors: types (5)",)),
    Refusal(400, "you requested 1000000", "max_tokens", ("openai3: errors: types (6)",)),
    Refusal(400, "is not text", "messages[0].content[0]", ("openai3: errors: types (7)",)),
)
"""What this server does not take: mostly sent to see the error."""


def requests() -> dict[str, dict[str, Any]]:
    """Return the requests by `client: case`; the n-th of one name ends in ` (n)`."""
    seen: Counter[str] = Counter()
    found: dict[str, dict[str, Any]] = {}
    for line in FILE.read_text(encoding="utf-8").splitlines():
        request = json.loads(line)
        name = f"{request['client']}: {request['case']}"
        seen[name] += 1
        found[name if seen[name] == 1 else f"{name} ({seen[name]})"] = request
    return found


@pytest.fixture
async def engine(encoding: HarmonyEncoding) -> AsyncIterator[FakeEngine]:
    engine = await FakeEngine(max_model_len=16384).start()
    ids = turn(encoding, reasoning="Hm.", text=TEXT)
    engine.answer = lambda request: Script(ids, per_message=8)
    yield engine
    await engine.stop()


@pytest.fixture
async def gateway(encoding: HarmonyEncoding, engine: FakeEngine) -> AsyncIterator[Gateway]:
    async with serving(encoding, [engine], model_name="gpt-oss-20b") as gateway:
        yield gateway


async def test_every_request_is_served_or_refused_for_a_reason_that_stands_here(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    everything = requests()
    assert len(everything) == 184
    expected = {case: refusal for refusal in WRONG for case in refusal.cases}
    refused = {}
    for name, request in everything.items():
        headers = {"user-agent": request["user_agent"]} if request["user_agent"] else {}
        before = len(engine.requests)
        answer = await gateway.http.request(
            request["method"], request["path"], json=request["body"], headers=headers
        )
        if answer.status_code == 200:
            check_answer(name, request, answer)
            if request["path"] == "/v1/chat/completions":
                ids = engine.requests[before].prompt_token_ids
                check_prompt(name, request["body"], encoding.decode(ids, skip_special_tokens=False))
            continue
        error = answer.json()["error"]
        refused[name] = f"{answer.status_code} {error['param']}: {error['message']}"
        wanted = expected.get(name)
        if wanted is not None:
            assert (answer.status_code, error["param"]) == (wanted.status, wanted.param), (name, error)
            assert wanted.words in error["message"], (name, error)
    assert set(expected) <= set(everything), "a case that is not in the file"
    assert {name: refused[name] for name in refused if name not in expected} == {}, "refused, but not listed"
    assert [name for name in expected if name not in refused] == [], "served now: take it out of the list"


def check_response(name: str, request: dict[str, Any], answer: httpx.Response) -> None:
    """Check an answer of the Responses API."""
    stream = request["body"].get("stream")
    response = read_stream(answer.text)[-1]["response"] if stream else answer.json()
    assert response["status"] == "completed", name
    assert text_of(response["output"][-1]) == TEXT, name


def check_answer(name: str, request: dict[str, Any], answer: httpx.Response) -> None:
    """Check that the answer is whole, and the script's as far as the request lets it come."""
    if request["path"] == "/v1/responses":
        check_response(name, request, answer)
        return
    if request["method"] == "GET":
        models = answer.json()
        assert [model["id"] for model in models.get("data", [models])] == ["gpt-oss-20b"], name
        return
    body = request["body"]
    pieces = events_of(name, answer) if body.get("stream") else [answer.json()]
    texts: dict[int, str] = {}
    ended: dict[int, str] = {}
    for choice in (choice for piece in pieces for choice in piece["choices"]):
        part = choice.get("message") or choice.get("delta") or choice
        index = choice["index"]
        texts[index] = texts.get(index, "") + (part.get("content") or part.get("text") or "")
        if choice["finish_reason"]:
            ended[index] = choice["finish_reason"]
    prompts = body.get("prompt")
    num_choices = (body.get("n") or 1) * (len(prompts) if isinstance(prompts, list) else 1)
    assert sorted(texts) == sorted(ended) == list(range(num_choices)), name
    for index, text in texts.items():
        if request["path"] == "/v1/completions":
            assert text, name
        elif ended[index] == "stop":
            assert text == TEXT, name
        else:
            assert (ended[index], TEXT.startswith(text)) == ("length", True), name


def events_of(name: str, answer: httpx.Response) -> list[dict[str, Any]]:
    """Return the chunks of a stream that ended well."""
    *events, last = (line for line in answer.text.splitlines() if line.startswith("data: "))
    assert last == "data: [DONE]", name
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert all("error" not in chunk for chunk in chunks), name
    return chunks


def check_prompt(name: str, body: dict[str, Any], prompt: str) -> None:
    """Check that the model sees what people and tools said, and the tools."""
    for message in body["messages"]:
        content = message.get("content") or ""
        parts = [content] if isinstance(content, str) else [part["text"] for part in content]
        assert all(part in prompt for part in parts), (name, message)
        for call in message.get("tool_calls") or ():
            assert f"to=functions.{call['function']['name']} " in prompt, (name, call)
    if body.get("tool_choice") != "none":
        for tool in body.get("tools") or ():
            assert f"\ntype {tool[tool['type']]['name']} = (" in prompt, (name, tool)
