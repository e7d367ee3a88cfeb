"""pydantic-ai: an agent with a tool over two turns, streams, settings, logprobs, errors."""

from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel

model = OpenAIChatModel("gpt-oss-20b")  # reads OPENAI_BASE_URL and OPENAI_API_KEY
agent = Agent(model)


@agent.tool_plain
def get_weather(city: str) -> str:
    """Current weather of a city."""
    return {"Paris": "sunny, 21 degrees", "Oslo": "rain, 4 degrees"}[city]


first = agent.run_sync("What is the weather in Paris?")
second = agent.run_sync("And in Oslo?", message_history=first.all_messages())
# The documentation shows all of the above.

import asyncio
import os
from typing import Literal

import openai
from pydantic import BaseModel, Field
from pydantic_ai import ModelHTTPError, NativeOutput, messages
from pydantic_ai.models.openai import OpenAIChatModelSettings
from pydantic_ai.providers.openai import OpenAIProvider

outputs = [first.output, second.output]
assert outputs == ["The weather: sunny, 21 degrees.", "The weather: rain, 4 degrees."], outputs
called = first.all_messages()[1]
assert [type(part) for part in called.parts] == [messages.ThinkingPart, messages.ToolCallPart]
assert called.parts[0].content == "I should look up the weather."
assert called.parts[1].args_as_dict() == {"city": "Paris"}
assert (called.finish_reason, called.model_name) == ("tool_call", "gpt-oss-20b")
assert first.usage.requests == 2
assert first.usage.tool_calls == 1
assert first.usage.cache_read_tokens == 16
assert first.usage.details["reasoning_tokens"] > 0

plain = Agent(model, instructions="Be brief.")
whole = plain.run_sync("Say hello.")


async def stream() -> None:
    async with plain.run_stream("Say hello.") as run:
        texts = [text async for text in run.stream_text(delta=True, debounce_by=None)]
        assert len(texts) > 1
        assert "".join(texts) == whole.output == "Hello! How can I help?"
    assert run.usage.input_tokens == whole.usage.input_tokens > 0
    assert run.usage.output_tokens == whole.usage.output_tokens > 0
    thought, calls = "", []
    async with agent.run_stream_events("What is the weather in Oslo?") as events:
        async for event in events:
            if isinstance(event, messages.PartStartEvent) and isinstance(event.part, messages.ThinkingPart):
                thought += event.part.content
            elif isinstance(event, messages.PartDeltaEvent) and isinstance(
                event.delta, messages.ThinkingPartDelta
            ):
                thought += event.delta.content_delta or ""
            elif isinstance(event, messages.FunctionToolCallEvent):
                calls.append(event.part.args_as_dict())
    assert thought == "I should look up the weather."
    assert calls == [{"city": "Oslo"}]


asyncio.run(stream())


def say(text: str, **settings: object) -> str:
    response = plain.run_sync(text, model_settings=OpenAIChatModelSettings(**settings)).response
    return "".join(part.content for part in response.parts if isinstance(part, messages.TextPart))


assert say("Pick a number.", seed=7, temperature=0.3, top_p=0.9, max_tokens=60) == "7"
assert say("Count.", stop_sequences=[" four"]) == "one two three"
assert say("Say hello.", openai_reasoning_effort="low", logit_bias={"5": 1}, openai_user="u") == whole.output
logged = plain.run_sync("Count.", model_settings={"openai_logprobs": True, "openai_top_logprobs": 2})
logprobs = logged.response.provider_details["logprobs"]
assert "".join(token["token"] for token in logprobs) == "one two three four five"
assert say("Are you busy?") == whole.output  # after a 429 with Retry-After


def refused(status: int, param: str | None, code: str | None, agent: Agent, text: str = "Say hello.") -> None:
    try:
        agent.run_sync(text)
    except ModelHTTPError as error:
        assert (error.status_code, error.body["param"], error.body["code"]) == (status, param, code), error
    else:
        raise AssertionError(f"must be refused with {status}")


refused(404, "model", "model_not_found", Agent(OpenAIChatModel("gpt-4o")))
refused(400, "messages", "context_length_exceeded", plain, "word " * 5_000)


async def broken() -> None:
    async with plain.run_stream("Break off.") as run:
        await run.get_output()


try:
    asyncio.run(broken())
except openai.APIError as error:
    assert error.code == "engine_unavailable", error
else:
    raise AssertionError("a stream that breaks off must be an error")


class Out(BaseModel, extra="forbid"):
    colour: Literal["red", "green"]
    count: int = Field(ge=0, le=99)
    flags: list[bool] = Field(max_length=3)


noise = OpenAIChatModel(
    "gpt-oss-20b",
    provider=OpenAIProvider(base_url=os.environ["NOISE_BASE_URL"]),
    settings={"max_tokens": 400, "extra_body": {"max_reasoning_tokens": 4}},
)
for output_type in (Out, NativeOutput(Out)):  # the arguments of a forced call, and the answer's text
    assert isinstance(Agent(noise, output_type=output_type).run_sync("Say hello.").output, Out)
