"""OpenAI's Agents SDK over chat completions: an agent with a tool over two turns, streams,
settings, errors."""

import asyncio

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI

set_tracing_disabled(True)  # traces go to OpenAI
model = OpenAIChatCompletionsModel(
    "gpt-oss-20b",
    AsyncOpenAI(),  # reads OPENAI_BASE_URL and OPENAI_API_KEY
    should_replay_reasoning_content=lambda context: True,  # gpt-oss needs its reasoning while it calls tools
)


@function_tool
def get_weather(city: str) -> str:
    """Current weather of a city."""
    return {"Paris": "sunny, 21 degrees", "Oslo": "rain, 4 degrees"}[city]


settings = ModelSettings(include_usage=True)  # in streams, too
agent = Agent("Assistant", tools=[get_weather], model=model, model_settings=settings)


async def talk() -> list[str]:
    first = await Runner.run(agent, "What is the weather in Paris?")
    question = {"role": "user", "content": "And in Oslo?"}
    second = await Runner.run(agent, [*first.to_input_list(), question])
    return [first.final_output, second.final_output]


answers = asyncio.run(talk())
# The documentation shows all of the above.
assert answers == ["The weather: sunny, 21 degrees.", "The weather: rain, 4 degrees."], answers

import os
from typing import Literal

import openai
from agents import RunConfig
from openai.types.responses import ResponseTextDeltaEvent
from openai.types.shared import Reasoning
from pydantic import BaseModel, Field

plain = Agent("Plain", instructions="Be brief.", model=model, model_settings=settings)


async def stream(agent: Agent, question: str) -> tuple[str, object]:
    run = Runner.run_streamed(agent, question)
    deltas = [
        event.data.delta
        async for event in run.stream_events()
        if event.type == "raw_response_event" and isinstance(event.data, ResponseTextDeltaEvent)
    ]
    assert "".join(deltas) == run.final_output
    return run.final_output, run.context_wrapper.usage


async def say(text: str, **settings: object) -> str:
    config = RunConfig(model_settings=ModelSettings(**settings))
    return (await Runner.run(plain, text, run_config=config)).final_output


async def refused(
    kind: type[openai.APIStatusError], param: str, agent: Agent, text: str = "Say hello."
) -> None:
    try:
        await Runner.run(agent, text)
    except kind as error:
        assert error.param == param, error
    else:
        raise AssertionError(f"{kind.__name__} must be raised")


class Out(BaseModel, extra="forbid"):
    colour: Literal["red", "green"]
    flags: list[bool] = Field(max_length=3)


async def check() -> None:
    whole = await Runner.run(plain, "Say hello.")
    assert [item.type for item in whole.new_items] == ["reasoning_item", "message_output_item"]
    assert whole.new_items[0].raw_item.summary[0].text == "A greeting."
    text, usage = await stream(plain, "Say hello.")
    assert text == whole.final_output == "Hello! How can I help?"
    assert usage.input_tokens == whole.context_wrapper.usage.input_tokens > 0
    assert usage.output_tokens == whole.context_wrapper.usage.output_tokens > 0
    assert usage.output_tokens_details.reasoning_tokens > 0
    text, usage = await stream(agent, "What is the weather in Oslo?")
    assert text == "The weather: rain, 4 degrees."
    assert (usage.requests, usage.input_tokens_details.cached_tokens) == (2, 16)

    usual = {"temperature": 0.3, "top_p": 0.9, "max_tokens": 60, "extra_args": {"seed": 7}}
    assert await say("Pick a number.", **usual) == "7"
    assert await say("Count.", extra_args={"stop": [" four"]}) == "one two three"
    assert await say("Say hello.", reasoning=Reasoning(effort="low"), verbosity="low") == whole.final_output
    assert await say("Are you busy?") == whole.final_output  # after a 429 with Retry-After

    other = OpenAIChatCompletionsModel("gpt-4o", AsyncOpenAI())
    await refused(openai.NotFoundError, "model", Agent("Other", model=other))
    await refused(openai.BadRequestError, "messages", plain, "word " * 5_000)
    forced = ModelSettings(tool_choice="required")
    await refused(openai.BadRequestError, "tool_choice", plain.clone(model_settings=forced))
    noise = OpenAIChatCompletionsModel("gpt-oss-20b", AsyncOpenAI(base_url=os.environ["NOISE_BASE_URL"]))
    short = ModelSettings(max_tokens=400, extra_body={"max_reasoning_tokens": 4})
    typed = Agent("Typed", model=noise, output_type=Out, model_settings=short)
    assert isinstance((await Runner.run(typed, "Say hello.")).final_output, Out)
    try:
        await stream(plain, "Break off.")
    except openai.APIError as error:
        assert error.code == "engine_unavailable", error
    else:
        raise AssertionError("a stream that breaks off must be an error")


asyncio.run(check())
