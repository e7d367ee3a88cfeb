"""What a chat's body says about reasoning: the effort, whether it is shown, and the reasoning of
earlier turns, under the names that clients and proxies use."""

from collections.abc import Iterator, Sequence
from typing import Literal

from cluster.chat_options import ReasoningEffort
from cluster.frontend.schema import (
    ChatCompletionRequest,
    ChatFields,
    ChatTemplateKwargs,
    Message,
    ReasoningPart,
)
from cluster.generation.limits import check_reasoning_budget
from workers.errors import InvalidRequest

Effort = ReasoningEffort | Literal["none"]

EFFORTS: dict[str, Effort] = {
    "none": "none",
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "high",
    "max": "high",
}
"""The effort by the word of the API. gpt-oss has three; `none` makes the answer begin at once."""


def reasoning_effort(text: str | None, param: str) -> Effort | None:
    """Return the effort that a word means.

    Raises:
        InvalidRequest: another word.
    """
    if text is None:
        return None
    if text not in EFFORTS:
        raise InvalidRequest(
            f"{param} must be 'none', 'low', 'medium' or 'high' (or 'minimal' for low, 'xhigh' or 'max' for "
            f"high).",
            param,
        )
    return EFFORTS[text]


def shown_effort(effort: Effort | None) -> ReasoningEffort | None:
    """Return the effort that the prompt names."""
    return "low" if effort == "none" else effort


def _template_effort(kwargs: ChatTemplateKwargs) -> Effort | None:
    """Return the effort that a chat template's arguments request.

    Raises:
        InvalidRequest: an unknown word.
    """
    effort = reasoning_effort(kwargs.reasoning_effort, "chat_template_kwargs.reasoning_effort")
    return effort or ("none" if kwargs.enable_thinking is False else None)


def chat_effort(body: ChatFields, kwargs: ChatTemplateKwargs) -> Effort | None:
    """Return the effort that a chat requests: the first that is named; else `none` if one of the
    switches turns reasoning off; else None.

    Raises:
        InvalidRequest: an unknown word.
    """
    named = (
        reasoning_effort(body.reasoning_effort, "reasoning_effort")
        or reasoning_effort(body.reasoning.effort if body.reasoning else None, "reasoning.effort")
        or _template_effort(kwargs)
    )
    turned_off = (
        body.enable_thinking is False
        or (body.reasoning is not None and body.reasoning.enabled is False)
        or (body.thinking is not None and body.thinking.type == "disabled")
    )
    return named or ("none" if turned_off else None)


def reasoning_budget(body: ChatCompletionRequest) -> tuple[int | None, str]:
    """Return the maximum number of reasoning tokens that a chat requests, the first that is named,
    and the field that names it; None: no limit.

    Raises:
        InvalidRequest: out of range.
    """
    budgets = {
        "max_reasoning_tokens": body.max_reasoning_tokens,
        "thinking_token_budget": body.thinking_token_budget,
        "reasoning.max_tokens": body.reasoning.max_tokens if body.reasoning else None,
        "thinking.budget_tokens": body.thinking.budget_tokens if body.thinking else None,
    }
    for param, tokens in budgets.items():
        if tokens is not None:
            if param == "thinking_token_budget" and tokens == -1:
                return None, param
            check_reasoning_budget(tokens, param)
            return tokens, param
    return None, "max_reasoning_tokens"


def shows_reasoning(body: ChatCompletionRequest) -> bool:
    """Return whether the answer has the model's reasoning."""
    excluded = body.reasoning is not None and body.reasoning.exclude is True
    return body.include_reasoning is not False and not excluded


def earlier_reasoning(message: Message) -> str | None:
    """Return the reasoning of an assistant's message of the history: that of the first place which
    has any, since proxies repeat it in several. None if there is none."""
    for text in (message.reasoning, message.reasoning_content, message.thinking):
        if text:
            return text
    places = (
        _provider_fields(message.provider_specific_fields),
        _part_texts(message.content),
        _block_texts(message.thinking_blocks),
        _block_texts(message.reasoning_details),
    )
    for texts in places:
        if joined := "\n\n".join(text for text in texts if text):
            return joined
    return None


def _provider_fields(fields: object) -> Iterator[str]:
    """Yield the reasoning in a proxy's copy of the fields that it does not know."""
    if isinstance(fields, dict):
        for name in ("reasoning", "reasoning_content"):
            if isinstance(text := fields.get(name), str):
                yield text
                return


def _part_texts(content: object) -> Iterator[str]:
    for part in content if isinstance(content, list) else ():
        if isinstance(part, ReasoningPart):
            yield next((text for text in (part.thinking, part.reasoning, part.text) if text), "")


def _block_texts(blocks: object) -> Iterator[str]:
    """Yield the texts of Anthropic's thinking blocks or OpenRouter's reasoning details, whatever
    else they carry."""
    entries: Sequence[object] = blocks if isinstance(blocks, list) else ()
    for block in entries:
        if isinstance(block, dict):
            for name in ("thinking", "text", "summary"):
                if isinstance(text := block.get(name), str):
                    yield text
                    break
