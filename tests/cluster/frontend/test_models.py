"""The list of models, their aliases, and the catalogue that Codex reads."""

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from cluster.generation import ChatDefaults, ModelInfo, ServedModel
from cluster.harmony.encoding import HarmonyEncoding
from cluster.rpc import inference_pb2 as pb
from cluster.rpc import inference_pb2_grpc
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import Gateway, serving
from workers.errors import ModelNotFound

HUB = "openai/gpt-oss-test"
ALIASES = (HUB, "gpt-oss:20b", "claude-*")
KNOWN = ("gpt-oss-test", HUB, f"{HUB}:free", "gpt-oss:20b", "gpt-oss:20b:x", "claude-haiku-4-5", "claude-")
UNKNOWN = (
    "gpt-oss-test:free",
    "gpt-oss",
    "gpt-oss:120b",
    f"{HUB}-x",
    f":{HUB}",
    "Claude-x",
    "",
    ":",
    "claude",
)
USER = {"role": "user", "content": "Hello"}
# Fields of Codex' ModelInfo that have no default, in all of its versions that were looked at.
CODEX_FIELDS = {
    "slug": str,
    "display_name": str,
    "supported_reasoning_levels": list,
    "shell_type": str,
    "visibility": str,
    "supported_in_api": bool,
    "priority": int,
    "base_instructions": str,
    "include_skills_usage_instructions": bool,
    "supports_reasoning_summaries": bool,
    "support_verbosity": bool,
    "truncation_policy": dict,
    "supports_parallel_tool_calls": bool,
    "experimental_supported_tools": list,
}


@pytest.fixture
async def gateway(encoding: HarmonyEncoding, engine: FakeEngine) -> AsyncIterator[Gateway]:
    defaults = ChatDefaults(reasoning_effort="high")
    async with serving(encoding, [engine], aliases=ALIASES, defaults=defaults) as gateway:
        yield gateway


def test_names() -> None:
    served = ServedModel(ModelInfo("gpt-oss-test", 4096, 2048, aliases=ALIASES))
    for name in (*KNOWN, None):
        served.check(name)
    for name in UNKNOWN:
        with pytest.raises(ModelNotFound):
            served.check(name)
    assert replace(served.info, aliases=("gpt-oss-test", HUB, HUB)).names == ("gpt-oss-test", HUB)
    ServedModel(replace(served.info, aliases=("*",))).check("anything")


async def test_every_api_takes_an_alias_and_answers_with_the_models_own_name(
    gateway: Gateway, stub: inference_pb2_grpc.InferenceStub
) -> None:
    for model, status in ((f"{HUB}:free", 200), ("gpt-oss-test:free", 404)):
        bodies = {
            "/v1/chat/completions": {"messages": [USER]},
            "/v1/completions": {"prompt": "Hello"},
            "/tokenize": {"prompt": "Hello"},
            "/detokenize": {"tokens": [5]},
        }
        for path, body in bodies.items():
            answer = await gateway.http.post(path, json={"model": model, **body})
            assert answer.status_code == status, path
            if status == 200 and path.startswith("/v1"):
                assert answer.json()["model"] == "gpt-oss-test"
    request = pb.ChatRequest(model=HUB, messages=[pb.Message(role=pb.ROLE_USER, content="Hello")])
    assert (await stub.Chat(request)).model == "gpt-oss-test"


async def test_the_list_has_every_whole_name(
    gateway: Gateway, stub: inference_pb2_grpc.InferenceStub, engine: FakeEngine
) -> None:
    names = ["gpt-oss-test", HUB, "gpt-oss:20b"]
    found = (await gateway.http.get("/v1/models")).json()
    assert [entry["id"] for entry in found["data"]] == names
    assert [entry["slug"] for entry in found["models"]] == names
    assert [model.id async for model in gateway.client.models.list()] == names
    listed = await stub.ListModels(pb.ListModelsRequest())
    assert [(model.id, model.max_model_len) for model in listed.models] == [
        (name, engine.max_model_len) for name in names
    ]
    for entry in found["data"]:
        assert (await gateway.http.get(f"/v1/models/{entry['id']}")).json() == entry
    assert (await gateway.http.get("/v1/models/claude-x")).json()["id"] == "claude-x"
    assert (await gateway.http.get("/v1/models/other")).status_code == 404


async def test_codex_finds_what_it_needs(gateway: Gateway, engine: FakeEngine) -> None:
    answer = await gateway.http.get("/v1/models", params={"client_version": "0.149.0"})
    first, *others = answer.json()["models"]
    for name, kind in CODEX_FIELDS.items():
        assert type(first[name]) is kind, name
    assert first["apply_patch_tool_type"] == "freeform"
    assert first["input_modalities"] == ["text"]
    assert first["context_window"] == first["max_context_window"] == engine.max_model_len
    assert first["truncation_policy"]["mode"] in ("bytes", "tokens")
    efforts = [level["effort"] for level in first["supported_reasoning_levels"]]
    assert efforts == ["low", "medium", "high"]
    assert first["default_reasoning_level"] == "high"  # the deployment's
    assert (first["visibility"], {other["visibility"] for other in others}) == ("list", {"hide"})
