"""What a chat's prompt says of the date and the effort: the request's value wins over the
deployment's."""

import datetime
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.generation import ChatDefaults, ChatRequest, ModelInfo
from cluster.generation.prompts import Prompts
from cluster.generation.settings import ServedModel
from cluster.harmony.message import Message
from tests.support.gateway import VOCAB_SIZE, make_encoding
from workers.request import SamplingParams

TODAY = datetime.date(2026, 1, 2)


@pytest.fixture
def prompts(tmp_path: Path) -> Iterator[Prompts]:
    served = ServedModel(ModelInfo("m", 4096, VOCAB_SIZE))
    prompts = Prompts(make_encoding(tmp_path), served, today=lambda: TODAY)
    yield prompts
    prompts.close()


async def system_message(prompts: Prompts, **request: str) -> str:
    chat = ChatRequest((Message("user", "Hi"),), SamplingParams(), num_bytes=2, **request)
    return (await prompts.detokenize(await prompts.chat(chat))).split("<|end|>")[0]


@pytest.mark.parametrize(
    ("deployment", "request_", "shown"),
    [
        ("none", None, None),
        ("none", "2025-05-05", "2025-05-05"),
        ("auto", None, "2026-01-02"),
        ("auto", "2025-05-05", "2025-05-05"),
        ("2024-03-04", None, "2024-03-04"),
        ("2024-03-04", "2025-05-05", "2025-05-05"),
    ],
)
async def test_the_date(prompts: Prompts, deployment: str, request_: str | None, shown: str | None) -> None:
    prompts.defaults = ChatDefaults(conversation_date=deployment)
    said = await system_message(prompts, **({} if request_ is None else {"current_date": request_}))
    dates = [line for line in said.splitlines() if line.startswith("Current date")]
    assert dates == ([] if shown is None else [f"Current date: {shown}"])


@pytest.mark.parametrize(
    ("deployment", "request_", "shown"),
    [("high", None, "high"), ("high", "low", "low"), ("low", "high", "high")],
)
async def test_the_effort(prompts: Prompts, deployment: str, request_: str | None, shown: str) -> None:
    prompts.defaults = ChatDefaults(reasoning_effort=deployment)
    said = await system_message(prompts, **({} if request_ is None else {"reasoning_effort": request_}))
    assert f"Reasoning: {shown}\n" in said
