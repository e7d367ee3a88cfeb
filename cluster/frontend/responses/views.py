"""The Response object and the items of its output: plain dicts, built without validation."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cluster.events import TokenCandidate, TokenLogprob, Usage
from cluster.frontend.errors import row_of
from cluster.frontend.fold import Phase
from workers.errors import CantataError, ContextLengthExceeded, InvalidRequest, Overloaded

Json = dict[str, Any]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


@dataclass(frozen=True, slots=True)
class ResponseRecord:
    """What a response is made from beside its tokens. It holds JSON only, so that it can be stored.

    Attributes:
        created_at: Unix seconds.
        fields: the fields of the Response object that repeat the request.
        shows_logprobs, seals_reasoning, summarizes: what of the answer is shown: log-probabilities
            of its text, the reasoning sealed too, the reasoning as summary instead of content.
        custom_tools: the model's names of custom tools.
        namespaces: namespace and name by the model's name, of the tools in namespaces.
    """

    id: str
    created_at: int
    fields: Mapping[str, Any]
    shows_logprobs: bool = False
    seals_reasoning: bool = False
    summarizes: bool = False
    custom_tools: tuple[str, ...] = ()
    namespaces: Mapping[str, Sequence[str]] | None = None

    def item_id(self, prefix: str, index: int) -> str:
        """Return the id of an item of the output."""
        return f"{prefix}_{self.id.removeprefix('resp_')}_{index}"

    def response(
        self,
        status: str,
        output: Sequence[Json] = (),
        *,
        usage: Usage | None = None,
        completed_at: int | None = None,
        error: Json | None = None,
        incomplete: str | None = None,
    ) -> Json:
        """Return the Response object.

        Args:
            incomplete: why it is incomplete.
        """
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created_at,
            "status": status,
            "completed_at": completed_at,
            "error": error,
            "incomplete_details": None if incomplete is None else {"reason": incomplete},
            "output": list(output),
            "usage": None if usage is None else usage_body(usage),
            **self.fields,
        }


def unix_s() -> int:
    """Return the current time in Unix seconds."""
    return int(time.time())


def usage_body(usage: Usage) -> Json:
    """Return token counts under the names of the Responses API."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def failure(error: CantataError) -> Json:
    """Return the `error` of a failed response, with the codes by which clients decide whether and
    when to try again."""
    code, message = "server_error", error.message
    if isinstance(error, ContextLengthExceeded):
        code = "context_length_exceeded"
    elif isinstance(error, Overloaded) or row_of(error).http_status == 429:
        code = "rate_limit_exceeded"
        message = f"{message} Please try again in {max(1, round(error.retry_after_s or 1))}s."
    elif isinstance(error, InvalidRequest):
        code = "invalid_prompt"
    return {"code": code, "message": message}


def reasoning_item(
    id: str, text: str, status: ItemStatus, *, as_summary: bool = False, sealed: str | None = None
) -> Json:
    """Return a reasoning item; an empty text has no part."""
    parts = [reasoning_part(text, as_summary=as_summary)] if text else []
    item: Json = {
        "id": id,
        "type": "reasoning",
        "summary": parts if as_summary else [],
        "content": [] if as_summary else parts,
        "status": status,
    }
    if sealed is not None:
        item["encrypted_content"] = sealed
    return item


def reasoning_part(text: str, *, as_summary: bool) -> Json:
    """Return the one part of reasoning."""
    return {"type": "summary_text" if as_summary else "reasoning_text", "text": text}


def message_item(id: str, parts: Sequence[Json], status: ItemStatus, phase: Phase) -> Json:
    """Return a message of the assistant."""
    return {
        "id": id,
        "type": "message",
        "status": status,
        "role": "assistant",
        "phase": phase,
        "content": list(parts),
    }


def text_part(text: str, logprobs: Sequence[Json] = ()) -> Json:
    """Return the one part of a message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


def call_item(
    id: str,
    call_id: str,
    name: str,
    text: str,
    status: ItemStatus,
    *,
    custom: bool = False,
    namespace: str | None = None,
) -> Json:
    """Return a call of a function or, with `custom`, of a custom tool."""
    item: Json = {
        "id": id,
        "type": "custom_tool_call" if custom else "function_call",
        "status": status,
        "call_id": call_id,
        "name": name,
        "input" if custom else "arguments": text,
    }
    if namespace is not None:
        item["namespace"] = namespace
    return item


def logprob_bodies(entries: Sequence[TokenLogprob]) -> list[Json]:
    """Return log-probabilities as the Responses API shows them."""
    return [
        {**_candidate(entry.chosen), "top_logprobs": [_candidate(candidate) for candidate in entry.top]}
        for entry in entries
    ]


def _candidate(candidate: TokenCandidate) -> Json:
    return {
        "token": candidate.text,
        "logprob": candidate.logprob,
        "bytes": list(candidate.token_bytes),
    }
