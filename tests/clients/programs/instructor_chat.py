"""Instructor: a typed object out of an answer in Markdown, a second attempt after one that does not
fit, errors."""

import instructor
import openai
from pydantic import BaseModel


class Person(BaseModel):
    name: str
    year: int


# Asks for JSON in the prompt. The other modes need structured output or forced tools.
client = instructor.from_openai(openai.OpenAI(), mode=instructor.Mode.MD_JSON)
person = client.chat.completions.create(
    model="gpt-oss-20b",
    messages=[{"role": "user", "content": "Who wrote the first program?"}],
    response_model=Person,
    max_retries=2,
)
# The documentation shows all of the above.

from instructor.core.exceptions import InstructorRetryException

# In the first answer the year was a word; a report of that led to the second.
assert person.model_dump() == {"name": "Ada Lovelace", "year": 1843}

server = openai.OpenAI()
QUESTION = [{"role": "user", "content": "Who wrote the first program?"}]


def ask(mode: instructor.Mode, model: str = "gpt-oss-20b", **options: object) -> Person:
    return instructor.from_openai(server, mode=mode).chat.completions.create(
        **{"model": model, "messages": QUESTION, "response_model": Person, "max_retries": 1} | options
    )


person, answer = client.chat.completions.create_with_completion(
    model="gpt-oss-20b", messages=QUESTION, response_model=Person, max_retries=2
)
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


refused("tool_choice", instructor.Mode.TOOLS)
refused("response_format", instructor.Mode.JSON)
refused("response_format", instructor.Mode.JSON_SCHEMA)
refused("model", instructor.Mode.MD_JSON, model="gpt-4o")
