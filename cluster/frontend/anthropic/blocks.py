"""Conversion of a generation to the content blocks of the Messages API, as events and as a whole
message. Each message of the model's turn is a block."""

import json
from collections.abc import AsyncGenerator, Iterator, Mapping

import orjson
from pydantic_core import from_json

from cluster.events import Usage
from cluster.frontend.anthropic.answers import (
    BlockBody,
    BlockDelta,
    BlockEvent,
    MessageAnswer,
    MessageUsage,
    StopReason,
)
from cluster.frontend.anthropic.request import ThinkingShown
from cluster.frontend.anthropic.schema import TOOL_USE
from cluster.frontend.anthropic.signatures import Signatures
from cluster.frontend.fold import (
    Finish,
    Fold,
    PartDelta,
    PartDone,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
)
from cluster.generation import Generation


class BlockStream:
    """The events of one turn's blocks.

    Args:
        shown: what is shown of the thinking.

    Attributes:
        finish: how the turn ended; None: it has not yet.
    """

    def __init__(self, shown: ThinkingShown, signatures: Signatures) -> None:
        self._shown = shown
        self._signatures = signatures
        self._num_blocks = 0
        self._is_open = False
        self._thinking: list[str] | None = None
        self.finish: Finish | None = None

    def add(self, part: PartDelta) -> Iterator[BlockEvent]:
        """Yield the events of the turn's next piece."""
        match part.delta:
            case ReasoningDelta(text) if self._shown.blocks:
                if not self._is_open:
                    self._thinking = []
                    yield self._start({"type": "thinking", "thinking": "", "signature": ""})
                assert self._thinking is not None
                self._thinking.append(text)
                if self._shown.text:
                    yield self._delta({"type": "thinking_delta", "thinking": text})
            case TextDelta(text) if text:
                if not self._is_open:
                    yield self._start({"type": "text", "text": "", "citations": None})
                yield self._delta({"type": "text_delta", "text": text})
            case ToolCallDelta(_, name, arguments, id):
                if name is not None:
                    yield self._start(
                        {"type": "tool_use", "id": tool_use_id(id or ""), "name": name, "input": {}}
                    )
                if arguments:
                    yield self._delta({"type": "input_json_delta", "partial_json": arguments})
            case PartDone():
                yield from self._stop()
            case Finish() as finish:
                yield from self._stop()
                self.finish = finish

    def _start(self, block: BlockBody) -> BlockEvent:
        self._is_open = True
        self._num_blocks += 1
        return {"type": "content_block_start", "index": self._num_blocks - 1, "content_block": block}

    def _delta(self, delta: BlockDelta) -> BlockEvent:
        return {"type": "content_block_delta", "index": self._num_blocks - 1, "delta": delta}

    def _stop(self) -> Iterator[BlockEvent]:
        """Yield the end of the block that is open, if any."""
        if not self._is_open:
            return
        if self._thinking is not None:
            text = "".join(self._thinking)
            sealed = self._signatures.sign(text, shown=self._shown.text)
            yield self._delta({"type": "signature_delta", "signature": sealed})
            self._thinking = None
        self._is_open = False
        yield {"type": "content_block_stop", "index": self._num_blocks - 1}


def tool_use_id(call_id: str) -> str:
    """Return the id of a call as Anthropic's API spells it."""
    return f"{TOOL_USE}{call_id.removeprefix('call_')}"


async def events(
    generation: Generation, shown: ThinkingShown, signatures: Signatures, max_tokens: int
) -> AsyncGenerator[bytes, None]:
    """Yield a generation as complete server-sent events.

    Args:
        max_tokens: the number that the client asked for.
    """
    stream, fold = BlockStream(shown, signatures), Fold(id=generation.id)
    yield _event("message_start", {"message": _message(generation, [], usage_body(generation.usage()))})
    async for event in generation:
        if isinstance(event, Usage):
            assert stream.finish is not None
            reason, sequence = stop_reason(stream.finish, event, max_tokens)
            delta = {"stop_reason": reason, "stop_sequence": sequence}
            yield _event("message_delta", {"delta": delta, "usage": usage_body(event)})
        elif (part := fold.add_part(event)) is not None:
            for shown_event in stream.add(part):
                yield _event(shown_event["type"], shown_event)
    yield _event("message_stop", {})


async def whole_message(
    generation: Generation, shown: ThinkingShown, signatures: Signatures, max_tokens: int
) -> MessageAnswer:
    """Return the whole message of a generation, when it is over."""
    stream, fold, content = BlockStream(shown, signatures), Fold(id=generation.id), _Content()
    usage: Usage | None = None
    async for event in generation:
        if isinstance(event, Usage):
            usage = event
        elif (part := fold.add_part(event)) is not None:
            for shown_event in stream.add(part):
                content.add(shown_event)
    assert usage is not None
    assert stream.finish is not None
    message = _message(generation, content.blocks, usage_body(usage))
    message["stop_reason"], message["stop_sequence"] = stop_reason(stream.finish, usage, max_tokens)
    return message


class _Content:
    """The blocks that events make."""

    def __init__(self) -> None:
        self.blocks: list[BlockBody] = []
        self._pieces: list[str] = []

    def add(self, event: BlockEvent) -> None:
        if event["type"] == "content_block_start":
            self.blocks.append(event["content_block"])
        elif event["type"] == "content_block_delta":
            self._add_delta(event["delta"])
        else:
            self._end_block()

    def _add_delta(self, delta: BlockDelta) -> None:
        block = self.blocks[-1]
        if delta["type"] == "text_delta":
            self._pieces.append(delta["text"])
        elif delta["type"] == "thinking_delta":
            self._pieces.append(delta["thinking"])
        elif delta["type"] == "input_json_delta":
            self._pieces.append(delta["partial_json"])
        elif block["type"] == "thinking":
            block["signature"] = delta["signature"]

    def _end_block(self) -> None:
        block, text = self.blocks[-1], "".join(self._pieces)
        self._pieces.clear()
        if block["type"] == "text":
            block["text"] = text
        elif block["type"] == "thinking":
            block["thinking"] = text
        else:
            block["input"] = call_input(text)


def call_input(arguments: str) -> orjson.Fragment:
    """Return the input of a call, a JSON object: the model's own text, so that each number keeps
    its digits. Arguments that were cut off give what is there; those that are no object are its
    `arguments`, as text."""
    if not arguments.strip():
        return orjson.Fragment(b"{}")
    for text in (arguments, _completed(arguments)):
        if text is not None and _is_object(text):
            return orjson.Fragment(text)
    return orjson.Fragment(orjson.dumps({"arguments": arguments}))


def _is_object(text: str) -> bool:
    try:
        return isinstance(from_json(text, allow_inf_nan=False), dict)
    except ValueError:
        return False


def _completed(text: str) -> str | None:
    """Return JSON that was cut off with its end; None if it is no JSON, or has a number that has no
    other text than its own."""
    try:
        value = from_json(text, allow_partial="trailing-strings", allow_inf_nan=False)
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError:
        return None


def stop_reason(finish: Finish, usage: Usage, max_tokens: int) -> tuple[StopReason, str | None]:
    """Return why a turn ended, and the stop sequence that ended it.

    Args:
        max_tokens: the number that the client asked for, of which the context may have had room
            for a part.
    """
    match finish:
        case Finish("tool_calls"):
            return "tool_use", None
        case Finish("length"):
            full = usage.completion_tokens < max_tokens
            return "model_context_window_exceeded" if full else "max_tokens", None
        case Finish(_, str(sequence)):
            return "stop_sequence", sequence
        case _:
            return "end_turn", None


def usage_body(usage: Usage) -> MessageUsage:
    """Return token counts under Anthropic's names: cached tokens are no part of `input_tokens`."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
    }


def _message(generation: Generation, content: list[BlockBody], usage: MessageUsage) -> MessageAnswer:
    return {
        "id": f"msg_{generation.id.removeprefix('chatcmpl-')}",
        "type": "message",
        "role": "assistant",
        "model": generation.model,
        "content": content,
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {**usage, "service_tier": "standard"},
    }


def _event(name: str, fields: Mapping[str, object]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), orjson.dumps({"type": name, **fields}))
