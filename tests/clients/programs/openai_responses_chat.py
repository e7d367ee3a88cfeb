"""OpenAI's library for Python over the Responses API: a conversation with a tool, streams, typed
answers, sealed reasoning, log-probabilities, errors; calls of a model that writes noise within
them."""

import json

import openai

client = openai.OpenAI()  # reads OPENAI_BASE_URL and OPENAI_API_KEY

TOOLS = [
    {
        "type": "function",
        "name": "get_weather",
        "description": "Current weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    }
]


def get_weather(city: str) -> str:
    return {"Paris": "sunny, 21 degrees", "Oslo": "rain, 4 degrees"}[city]


def ask(items: list, question: str) -> str:
    items.append({"role": "user", "content": question})
    while True:
        response = client.responses.create(model="gpt-oss-20b", input=items, tools=TOOLS, store=False)
        items += response.output  # with the reasoning in it, which the model needs while it calls tools
        calls = [item for item in response.output if item.type == "function_call"]
        if not calls:
            return response.output_text
        for call in calls:
            result = get_weather(**json.loads(call.arguments))
            items.append({"type": "function_call_output", "call_id": call.call_id, "output": result})


items = []
answers = [ask(items, "What is the weather in Paris?"), ask(items, "And in Oslo?")]
# The documentation shows all of the above.

import os

from pydantic import BaseModel

MODEL = "gpt-oss-20b"
assert answers == ["The weather: sunny, 21 degrees.", "The weather: rain, 4 degrees."], answers
assert items[1].content[0].text == "I should look up the weather."

with client.responses.stream(model=MODEL, input="Say hello.") as stream:
    events = list(stream)
    streamed = stream.get_final_response()
text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
reasoning = "".join(event.delta for event in events if event.type == "response.reasoning_text.delta")
assert (text, reasoning) == ("Hello! How can I help?", "A greeting.")
assert events[-1].type == "response.completed"
assert [event.sequence_number for event in events] == list(range(len(events)))
assert streamed.usage.output_tokens_details.reasoning_tokens > 0
counted = client.responses.input_tokens.count(model=MODEL, input="Say hello.")
assert counted.input_tokens == streamed.usage.input_tokens

low = client.responses.create(
    model=MODEL,
    input="Say hello.",
    reasoning={"effort": "low", "summary": "auto"},
    include=["reasoning.encrypted_content", "message.output_text.logprobs"],
    top_logprobs=0,
)
assert low.output[0].summary[0].text == "A greeting."
assert low.output[0].encrypted_content
assert low.output[1].phase == "final_answer"


class Author(BaseModel):
    name: str
    year: int


typed = client.responses.parse(model=MODEL, input="Who wrote the first program?", text_format=Author)
assert typed.output_parsed == Author(name="Ada Lovelace", year=1843)
try:
    client.with_options(max_retries=0).responses.create(model="other", input="x")
    raise AssertionError
except openai.NotFoundError as error:
    assert error.code == "model_not_found"
try:
    client.responses.create(model=MODEL, input="x", previous_response_id="resp_1")
    raise AssertionError
except openai.BadRequestError as error:
    assert error.param == "previous_response_id"
failed = list(client.responses.create(model=MODEL, input="Break off.", stream=True))[-1]
assert (failed.type, failed.response.error.code) == ("response.failed", "server_error")

noise = openai.OpenAI(base_url=os.environ["NOISE_BASE_URL"])
STRICT = [{**TOOLS[0], "strict": True}]
forced = noise.responses.create(
    model=MODEL,
    input="x",
    tools=STRICT,
    tool_choice="required",
    max_output_tokens=300,
    reasoning={"effort": "low"},
)
calls = [item for item in forced.output if item.type == "function_call"]
if forced.status == "completed":
    assert isinstance(json.loads(calls[0].arguments)["city"], str)
PATCH = {
    "type": "custom",
    "name": "patch",
    "format": {"type": "grammar", "syntax": "regex", "definition": "[ab]{3}"},
}
chosen = noise.responses.create(
    model=MODEL,
    input="x",
    tools=[PATCH],
    tool_choice={"type": "custom", "name": "patch"},
    max_output_tokens=300,
)
assert len(chosen.output[-1].input) == 3, chosen
assert set(chosen.output[-1].input) <= {"a", "b"}
