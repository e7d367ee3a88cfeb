"""`POST /v1/responses/compact`: a conversation in a short form that the model writes, sealed, as an
item to be sent instead of the items before it."""

import uuid
from collections.abc import Sequence

import orjson
from fastapi import FastAPI, Request, Response

from cluster.events import Usage
from cluster.frontend import sse
from cluster.frontend.fold import whole_answer
from cluster.frontend.openapi import Schemas
from cluster.frontend.reasoning import reasoning_effort, shown_effort
from cluster.frontend.responses import answers
from cluster.frontend.responses.items import input_messages, sealed_summary
from cluster.frontend.responses.request import NAMES
from cluster.frontend.responses.routes import ResponsesApi, owner_of
from cluster.frontend.responses.schema import CompactRequest
from cluster.frontend.responses.views import Json, unix_s, usage_body
from cluster.generation import ChatRequest
from cluster.harmony.message import Message
from workers.request import SamplingParams

MAX_SUMMARY_TOKENS = 4096
"""Maximum length of a summary, its reasoning included; a quarter of the context where that is
less."""
PROMPT = (
    "The conversation so far is about to be removed from your context. Write a summary from which you can "
    "continue the work without it: what the user wants, decisions and constraints, what was done with which "
    "results (files, commands, names and values word for word), what is open, and the next steps. Write only "
    "the summary."
)


def add_compact(app: FastAPI, api: ResponsesApi, schemas: Schemas) -> None:
    """Add the route."""

    @app.post("/v1/responses/compact", openapi_extra=schemas.describe(CompactRequest, answers.CompactedBody))
    async def compact(request: Request) -> Response:
        """Write a conversation in a short form, as one item."""
        seals = api.seals(owner_of(request))
        parsed, num_bytes, prior = await api.read(request, CompactRequest)
        effort = reasoning_effort(parsed.reasoning.effort if parsed.reasoning else None, "reasoning.effort")
        given = await api.service.prompts.threads.run(
            num_bytes, lambda: input_messages(parsed.input, parsed.instructions, seals, prior.num_before)
        )
        max_tokens = min(MAX_SUMMARY_TOKENS, api.service.served.info.max_model_len // 4)
        chat = ChatRequest(
            messages=(*given, Message("user", PROMPT)),
            num_bytes=num_bytes,
            sampling=SamplingParams(max_tokens=max_tokens),
            skips_reasoning=effort == "none",
            reasoning_effort=shown_effort(effort),
            model=parsed.model,
            leaves_out_turns=True,
            names=NAMES,
        )
        id = uuid.uuid4().hex
        generation = await sse.begin(request, api.service.chat(chat, f"compact_{id}"))
        try:
            whole = await sse.until_gone(request, whole_answer(generation, 1))
        finally:
            await generation.aclose()
        (choice,) = whole.choices
        # The request's own instructions are sent again with the next one, those among its items are
        # not.
        instructions = [message.content for message in given if message.role == "developer"]
        kept = instructions[1:] if parsed.instructions else instructions
        sealed = sealed_summary(choice.content or choice.reasoning or "", kept, seals)
        return Response(orjson.dumps(_body(id, sealed, whole.usage)), media_type="application/json")


def _body(id: str, sealed: str, usage: Usage) -> Json:
    output: Sequence[Json] = [{"id": f"cmp_{id}", "type": "compaction", "encrypted_content": sealed}]
    return {
        "id": f"resp_{id}",
        "object": "response.compaction",
        "created_at": unix_s(),
        "output": output,
        "usage": usage_body(usage),
    }
