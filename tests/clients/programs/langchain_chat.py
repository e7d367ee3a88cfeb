"""LangChain: a conversation with a tool, streams with usage, several choices, log-probabilities,
stop strings, errors."""

from langchain_core.messages import BaseMessage, HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI


@tool
def get_weather(city: str) -> str:
    """Current weather of a city."""
    return {"Paris": "sunny, 21 degrees", "Oslo": "rain, 4 degrees"}[city]


model = ChatOpenAI(model="gpt-oss-20b", stream_usage=True)  # reads OPENAI_BASE_URL and OPENAI_API_KEY
agent = model.bind_tools([get_weather])


def ask(messages: list[BaseMessage], question: str) -> str:
    messages.append(HumanMessage(question))
    while True:
        answer = agent.invoke(messages)
        messages.append(answer)
        if not answer.tool_calls:
            return answer.content
        messages += [get_weather.invoke(call) for call in answer.tool_calls]


messages: list[BaseMessage] = []
answers = [ask(messages, "What is the weather in Paris?"), ask(messages, "And in Oslo?")]
# The documentation shows all of the above.

import os
from typing import Literal

import openai
from langchain_core.exceptions import ContextOverflowError
from pydantic import BaseModel, Field

assert answers == ["The weather: sunny, 21 degrees.", "The weather: rain, 4 degrees."], answers
assert messages[1].tool_calls[0]["args"] == {"city": "Paris"}
assert messages[1].response_metadata["finish_reason"] == "tool_calls"
assert messages[1].usage_metadata["input_token_details"]["cache_read"] == 16
assert messages[1].usage_metadata["output_token_details"]["reasoning"] > 0

whole = model.invoke("Say hello.")
chunks = list(model.stream("Say hello."))
streamed = chunks[0]
for chunk in chunks[1:]:
    streamed += chunk
assert streamed.content == whole.content == "Hello! How can I help?"
assert streamed.usage_metadata == whole.usage_metadata
assert whole.usage_metadata["total_tokens"] > whole.usage_metadata["input_tokens"] > 0
called = list(agent.stream("What is the weather in Oslo?"))
streamed = called[0]
for chunk in called[1:]:
    streamed += chunk
assert [(call["name"], call["args"]) for call in streamed.tool_calls] == [("get_weather", {"city": "Oslo"})]

assert [answer.content for answer in model.batch(["Count.", "Say hello."])] == [
    "one two three four five",
    "Hello! How can I help?",
]
(choices,) = model.generate([[HumanMessage("Pick a number.")]], n=2, seed=4).generations
assert [choice.text for choice in choices] == ["4", "5"]
assert model.bind(stop=[" four"]).invoke("Count.").content == "one two three"
logprobs = model.bind(logprobs=True, top_logprobs=2).invoke("Count.").response_metadata["logprobs"]
assert "".join(token["token"] for token in logprobs["content"]) == "one two three four five"
low = ChatOpenAI(model="gpt-oss-20b", reasoning_effort="low", temperature=0.2, seed=1, max_tokens=50)
assert low.invoke("Say hello.").content == "Hello! How can I help?"


def refused(kind: type[Exception], text: str, call: object, *arguments: object) -> None:
    try:
        call(*arguments)
    except kind as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"{kind.__name__} must be raised")


refused(ContextOverflowError, "context_length_exceeded", model.invoke, "word " * 5_000)
refused(openai.NotFoundError, "model_not_found", ChatOpenAI(model="gpt-4o").invoke, "Say hello.")
refused(openai.AuthenticationError, "invalid_api_key", ChatOpenAI(api_key="wrong").invoke, "Say hello.")
refused(openai.APIError, "try again", lambda: list(model.stream("Break off.")))
assert model.invoke("Are you busy?").content == "Hello! How can I help?"  # after a 429 with Retry-After


class Out(BaseModel, extra="forbid"):
    colour: Literal["red", "green"]
    count: int = Field(ge=0, le=99)
    flags: list[bool] = Field(max_length=3)


noise = ChatOpenAI(
    model="gpt-oss-20b",
    base_url=os.environ["NOISE_BASE_URL"],
    max_tokens=400,
    extra_body={"max_reasoning_tokens": 4},
)
for method in ("json_schema", "function_calling"):
    assert isinstance(noise.with_structured_output(Out, method=method).invoke("Say hello."), Out)
assert noise.bind_tools([Out], tool_choice="any").invoke("Say hello.").tool_calls[0]["name"] == "Out"
