"""OpenAI's Agents SDK over the Responses API, its default: an agent with a tool over two turns, a
handoff, typed output, streams."""

import asyncio

from agents import Agent, ModelSettings, Runner, function_tool, set_tracing_disabled

set_tracing_disabled(True)  # traces go to OpenAI


@function_tool
def get_weather(city: str) -> str:
    """Current weather of a city."""
    return {"Paris": "sunny, 21 degrees", "Oslo": "rain, 4 degrees"}[city]


# The SDK reads OPENAI_BASE_URL and OPENAI_API_KEY.
agent = Agent(
    "Assistant", tools=[get_weather], model="gpt-oss-20b", model_settings=ModelSettings(store=False)
)


async def talk() -> list[str]:
    first = await Runner.run(agent, "What is the weather in Paris?")
    question = {"role": "user", "content": "And in Oslo?"}
    second = await Runner.run(agent, [*first.to_input_list(), question])
    return [first.final_output, second.final_output]


answers = asyncio.run(talk())
# The documentation shows all of the above.
assert answers == ["The weather: sunny, 21 degrees.", "The weather: rain, 4 degrees."], answers

from agents import set_default_openai_client
from openai import AsyncOpenAI
from openai.types.shared import Reasoning
from pydantic import BaseModel

MODEL = "gpt-oss-20b"
low = Agent("Plain", model=MODEL, model_settings=ModelSettings(reasoning=Reasoning(effort="low")))


class Author(BaseModel):
    name: str
    year: int


typed = Agent("Typed", model=MODEL, output_type=Author)
specialist = Agent("Specialist", model=MODEL)
front = Agent("Front", model=MODEL, handoffs=[specialist])


async def check() -> None:
    set_default_openai_client(AsyncOpenAI(), use_for_tracing=False)  # of this event loop
    run = Runner.run_streamed(low, "Say hello.")
    deltas = [
        event.data.delta
        async for event in run.stream_events()
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
    ]
    assert "".join(deltas) == run.final_output == "Hello! How can I help?"
    found = await Runner.run(typed, "Who wrote the first program?")
    assert found.final_output == Author(name="Ada Lovelace", year=1843)
    handed = await Runner.run(front, "Hand over.")
    assert handed.last_agent.name == "Specialist"
    assert handed.final_output == "Hello! How can I help?"


asyncio.run(check())
