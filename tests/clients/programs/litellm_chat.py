"""LiteLLM: a conversation with a tool, streams put together again, several choices,
log-probabilities, stop strings, retries, errors."""

import json

import litellm

# `openai/` stands for any server with OpenAI's API; it reads OPENAI_BASE_URL and OPENAI_API_KEY.
MODEL = "openai/gpt-oss-20b"
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
        message = litellm.completion(model=MODEL, messages=messages, tools=TOOLS).choices[0].message
        messages.append(message)  # with the reasoning in it
        if not message.tool_calls:
            return message.content
        for call in message.tool_calls:
            result = get_weather(**json.loads(call.function.arguments))
            messages.append(
                {"role": "tool", "tool_call_id": call.id, "name": "get_weather", "content": result}
            )


messages = []
answers = [ask(messages, "What is the weather in Paris?"), ask(messages, "And in Oslo?")]
# The documentation shows all of the above.

litellm.suppress_debug_info = True
HELLO = [{"role": "user", "content": "Say hello."}]


def say(text: str, **options: object) -> litellm.ModelResponse:
    return litellm.completion(**{"model": MODEL, "messages": [{"role": "user", "content": text}]} | options)


assert answers == ["The weather: sunny, 21 degrees.", "The weather: rain, 4 degrees."], answers
assert messages[1].reasoning_content == "I should look up the weather."

whole = say("Say hello.")
chunks = list(say("Say hello.", stream=True, stream_options={"include_usage": True}))
streamed = litellm.stream_chunk_builder(chunks, messages=HELLO)
for answer in (whole, streamed):
    message = answer.choices[0].message
    assert (message.content, message.reasoning_content) == ("Hello! How can I help?", "A greeting.")
    assert answer.choices[0].finish_reason == "stop"
assert streamed.usage.prompt_tokens == whole.usage.prompt_tokens
assert streamed.usage.completion_tokens == whole.usage.completion_tokens
assert whole.usage.completion_tokens_details.reasoning_tokens > 0
# A streamed call and its result go back as well.
asked = [{"role": "user", "content": "What is the weather in Oslo?"}]
chunks = list(litellm.completion(model=MODEL, messages=asked, tools=TOOLS, stream=True))
message = litellm.stream_chunk_builder(chunks, messages=asked).choices[0].message
call = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain, 4 degrees"}
answer = litellm.completion(model=MODEL, messages=[*asked, message, call], tools=TOOLS)
assert answer.choices[0].message.content == "The weather: rain, 4 degrees."
cached = [{"type": "text", "text": "Say hello.", "cache_control": {"type": "ephemeral"}}]
assert (
    say("", messages=[{"role": "user", "content": cached}]).choices[0].message.content
    == "Hello! How can I help?"
)

assert [choice.message.content for choice in say("Pick a number.", n=2, seed=4).choices] == ["4", "5"]
assert say("Count.", stop=[" four"]).choices[0].message.content == "one two three"
logprobs = say("Count.", logprobs=True, top_logprobs=2).choices[0].logprobs.content
assert "".join(token.token for token in logprobs) == "one two three four five"
low = say("Say hello.", reasoning_effort="low", temperature=0.1)
assert low.choices[0].message.content == "Hello! How can I help?"


def refused(kind: type[Exception], reason: str, text: str = "Say hello.", **options: object) -> None:
    try:
        list(say(text, **options))
    except kind as error:
        assert reason in str(error), error
    else:
        raise AssertionError(f"{options} must be refused")


refused(litellm.ContextWindowExceededError, "maximum context length", "word " * 5_000)
refused(litellm.NotFoundError, "does not exist", model="openai/gpt-4o")
refused(litellm.AuthenticationError, "Incorrect API key", api_key="wrong")
NOT = {"type": "json_schema", "json_schema": {"name": "out", "schema": {"items": {"not": {"type": "null"}}}}}
refused(litellm.BadRequestError, "schema.items.not cannot be enforced", response_format=NOT)
refused(litellm.exceptions.MidStreamFallbackError, "try again", "Break off.", stream=True)
assert say("Are you busy?", num_retries=1).choices[0].message.content == "Hello! How can I help?"
