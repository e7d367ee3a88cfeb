"""Instructor: a typed object out of an answer whose schema is enforced, or out of one in Markdown
with a second attempt after one that does not fit; errors."""

import instructor
import openai
from pydantic import BaseModel


class Person(BaseModel):
    name: str
    year: int


client = instructor.from_openai(openai.OpenAI(), mode=instructor.Mode.JSON_SCHEMA)
person = client.chat.completions.create(
    model="gpt-oss-20b",
    messages=[{"role": "user", "content": "Who wrote the first program?"}],
    response_model=Person,
)
# The documentation shows all of the above.

import os
from typing import Literal

from pydantic import Field

from instructor.core.exceptions import InstructorRetryException

assert person.model_dump() == {"name": "Ada Lovelace", "year": 1843}

server = openai.OpenAI()
client = instructor.from_openai(server, mode=instructor.Mode.MD_JSON)
QUESTION = [{"role": "user", "content": "Who wrote the first program?"}]


def ask(mode: instructor.Mode, model: str = "gpt-oss-20b", **options: object) -> Person:
    return instructor.from_openai(server, mode=mode).chat.completions.create(
        **{"model": model, "messages": QUESTION, "response_model": Person, "max_retries": 1} | options
    )


person, answer = client.chat.completions.create_with_completion(
    model="gpt-oss-20b", messages=QUESTION, response_model=Person, max_retries=2
)
# In the first answer the year was a word; a report of that led to the second.
assert answer.choices[0].message.content == '```json\n{"name": "Ada Lovelace", "year": 1843}\n```'
# That of both attempts together; the second has the first in its prompt.
assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
once = server.chat.completions.create(model="gpt-oss-20b", messages=QUESTION)
assert answer.usage.prompt_tokens > 2 * once.usage.prompt_tokens
assert answer.usage.completion_tokens > once.usage.completion_tokens

# Without another attempt the answer that does not fit is an error that names the field.
try:
    ask(instructor.Mode.MD_JSON, max_retries=0)
except InstructorRetryException as error:
    assert "year" in str(error), error
else:
    raise AssertionError("an answer that does not fit must be an error")


def refused(param: str, mode: instructor.Mode, **options: object) -> None:
    try:
        ask(mode, **options)
    except (openai.BadRequestError, openai.NotFoundError, InstructorRetryException) as error:
        assert f"'param': '{param}'" in str(error), error
    else:
        raise AssertionError(f"{mode} must be refused")


refused("model", instructor.Mode.MD_JSON, model="gpt-4o")


class Out(BaseModel, extra="forbid"):
    colour: Literal["red", "green"]
    count: int = Field(ge=0, le=99)
    flags: list[bool] = Field(max_length=3)


noise = openai.OpenAI(base_url=os.environ["NOISE_BASE_URL"])
for mode in (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA):
    out = instructor.from_openai(noise, mode=mode).chat.completions.create(
        model="gpt-oss-20b",
        messages=QUESTION,
        response_model=Out,
        max_retries=0,
        max_tokens=400,
        extra_body={"max_reasoning_tokens": 4},
    )
    assert isinstance(out, Out)
