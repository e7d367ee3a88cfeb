"""OpenAI's library for Python: a conversation with a tool, streams, several choices,
log-probabilities, stop strings, token counts, errors; typed answers and calls of a model that
writes noise within them."""

import json

import openai

client = openai.OpenAI()  # reads OPENAI_BASE_URL and OPENAI_API_KEY

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Current weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]


def get_weather(city: str) -> str:
    return {"Paris": "sunny, 21 degrees", "Oslo": "rain, 4 degrees"}[city]


def ask(messages: list, question: str) -> str:
    messages.append({"role": "user", "content": question})
    while True:
        answer = client.chat.completions.create(model="gpt-oss-20b", messages=messages, tools=TOOLS)
        message = answer.choices[0].message
        messages.append(message)  # with the reasoning in it, which the model needs while it calls tools
        if not message.tool_calls:
            return message.content
        for call in message.tool_calls:
            result = get_weather(**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})


messages = []
answers = [ask(messages, "What is the weather in Paris?"), ask(messages, "And in Oslo?")]
# The documentation shows all of the above.

import os
from typing import Literal

from pydantic import BaseModel, Field

HELLO = [{"role": "user", "content": "Say hello."}]
MODEL = "gpt-oss-20b"


def say(text: str, **options: object) -> openai.types.chat.ChatCompletion:
    return client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": text}], **options
    )


assert answers == ["The weather: sunny, 21 degrees.", "The weather: rain, 4 degrees."], answers
assert messages[1].reasoning == messages[1].reasoning_content == "I should look up the weather."
assert messages[1].tool_calls[0].function.name == "get_weather"

with client.chat.completions.stream(
    model=MODEL, messages=HELLO, stream_options={"include_usage": True}
) as stream:
    text = "".join(event.delta for event in stream if event.type == "content.delta")
    streamed = stream.get_final_completion()
assert text == streamed.choices[0].message.content == "Hello! How can I help?"
chunks = list(client.chat.completions.create(model=MODEL, messages=HELLO, stream=True))
reasoning = [getattr(chunk.choices[0].delta, "reasoning", None) or "" for chunk in chunks]
assert "".join(reasoning) == "A greeting."

whole = say("Say hello.")
assert streamed.usage == whole.usage
counted = client.post(
    str(client.base_url.copy_with(path="/tokenize")), body={"messages": HELLO}, cast_to=object
)
assert whole.usage.prompt_tokens == counted["count"] == len(counted["tokens"])
assert whole.usage.completion_tokens_details.reasoning_tokens > 0

assert [choice.message.content for choice in say("Pick a number.", n=3, seed=4).choices] == ["4", "5", "6"]
low = say("Say hello.", reasoning_effort="low", temperature=0.2)
assert low.choices[0].message.content == "Hello! How can I help?"
(stopped,) = say("Count.", stop=[" four"]).choices
assert (stopped.message.content, stopped.finish_reason) == ("one two three", "stop")
(cut,) = say("Count.", max_completion_tokens=6).choices
assert cut.finish_reason == "length"
tokens = say("Count.", logprobs=True, top_logprobs=2).choices[0].logprobs.content
assert bytes(byte for token in tokens for byte in token.bytes).decode() == "one two three four five"
assert {len(token.top_logprobs) for token in tokens} == {2}
assert [model.id for model in client.models.list()] == [MODEL]


def refused(
    kind: type[openai.APIStatusError], param: str | None, code: str | None, **options: object
) -> None:
    try:
        client.chat.completions.create(**{"model": MODEL, "messages": HELLO} | options)
    except kind as error:
        assert (error.param, error.code) == (param, code), error
    else:
        raise AssertionError(f"{options} must be refused")


refused(openai.NotFoundError, "model", "model_not_found", model="gpt-4o")
refused(openai.BadRequestError, "temperature", None, temperature=3)
refused(
    openai.BadRequestError,
    "messages",
    "context_length_exceeded",
    messages=[{"role": "user", "content": "word " * 5_000}],
)
NOT = {"type": "json_schema", "json_schema": {"name": "out", "schema": {"items": {"not": {"type": "null"}}}}}
place = "response_format.json_schema.schema.items.not"
refused(openai.BadRequestError, place, None, response_format=NOT)
refused(openai.BadRequestError, "tool_choice", None, tool_choice="required")
try:
    client.with_options(api_key="wrong").models.list()
except openai.AuthenticationError as error:
    assert error.code == "invalid_api_key", error
else:
    raise AssertionError("a wrong key must be refused")
# Refused once with 429 and Retry-After, which the client obeys.
assert say("Are you busy?").choices[0].message.content == "Hello! How can I help?"
broken = client.chat.completions.create(
    model=MODEL, messages=[{"role": "user", "content": "Break off."}], stream=True
)
seen = ""
try:
    for chunk in broken:
        seen += chunk.choices[0].delta.content or ""
except openai.APIError as error:
    assert error.code == "engine_unavailable", error
    assert seen == "This sentence has no"
else:
    raise AssertionError("a stream that breaks off must be an error")


class Out(BaseModel, extra="forbid"):
    colour: Literal["red", "green"]
    count: int = Field(ge=0, le=99)
    flags: list[bool] = Field(max_length=3)


noise = openai.OpenAI(base_url=os.environ["NOISE_BASE_URL"])
typed = {
    "model": MODEL,
    "messages": HELLO,
    "response_format": Out,
    "max_tokens": 400,
    "extra_body": {"max_reasoning_tokens": 4},
}
assert isinstance(noise.chat.completions.parse(**typed).choices[0].message.parsed, Out)
with noise.chat.completions.stream(**typed) as stream:
    final = stream.get_final_completion()
assert isinstance(final.choices[0].message.parsed, Out)
del typed["response_format"]
called = noise.chat.completions.parse(
    **typed, tools=[openai.pydantic_function_tool(Out)], tool_choice="required"
).choices[0]
assert called.finish_reason == "tool_calls"
assert isinstance(called.message.tool_calls[0].function.parsed_arguments, Out)
