"""Checks of a Responses stream: each event against the models of the openai package and of Open
Responses, and what holds for all of them together."""

import enum
import json
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import openresponses_types.types as open_responses
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel

Json = dict[str, Any]
TERMINAL = ("response.completed", "response.incomplete", "response.failed")
_RENAMED = {
    "response.reasoning_text.delta": "response.reasoning.delta",
    "response.reasoning_text.done": "response.reasoning.done",
}
"""Events that Open Responses names otherwise than OpenAI, whose names clients read."""
_NOT_OPEN = ("response.custom_tool_call_input.delta", "response.custom_tool_call_input.done")
"""Events that Open Responses does not have, since it has no custom tools."""


def _openai_models() -> Mapping[str, type[BaseModel]]:
    union = typing.get_args(ResponseStreamEvent)[0]
    models: tuple[type[BaseModel], ...] = typing.get_args(union)
    return {typing.get_args(model.model_fields["type"].annotation)[0]: model for model in models}


def _open_models() -> Mapping[str, type[BaseModel]]:
    found = {}
    for name, model in vars(open_responses).items():
        if name.endswith("StreamingEvent"):
            (kind,) = typing.cast("type[enum.Enum]", model.model_fields["type"].annotation)
            found[kind.value] = model
    return found


OPENAI, OPEN = _openai_models(), _open_models()


def read_stream(text: str) -> list[Json]:
    """Return the events of a stream, each checked; the last frame is `[DONE]`."""
    frames = [frame for frame in text.split("\n\n") if frame and not frame.startswith(":")]
    assert frames.pop() == "data: [DONE]"
    events = []
    for frame in frames:
        name, data = frame.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    check_events(events)
    return events


def check_events(events: Sequence[Json]) -> None:
    """Check a whole response's events."""
    for event in events:
        check_event(event)
    kinds = [event["type"] for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events))), "a gap"
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert [kind for kind in kinds if kind in TERMINAL] == [kinds[-1]], "not exactly one end, at the end"
    _check_items(events)
    assert json.dumps(events).count(events[0]["response"]["id"]) >= 3


def check_event(event: Json) -> None:
    """Check one event against both models."""
    kind = event["type"]
    _check_error_code(event)
    OPENAI[kind].model_validate(event)
    if kind in _NOT_OPEN or "custom_tool_call" in json.dumps(event):
        return
    if event.get("response") and any(tool["type"] != "function" for tool in event["response"]["tools"]):
        return
    if event.get("response") and not _is_open_choice(event["response"]["tool_choice"]):
        return
    kind = _RENAMED.get(kind, kind)
    OPEN[kind].model_validate({**event, "type": kind})


def _is_open_choice(choice: object) -> bool:
    kind = choice["type"] if isinstance(choice, dict) else ""
    return isinstance(choice, str) or kind in ("function", "allowed_tools")


def _check_error_code(event: Json) -> None:
    """Let the code pass that clients know and the openai package does not list."""
    error = (event.get("response") or {}).get("error")
    if error is not None and error["code"] == "context_length_exceeded":
        error["code"] = "server_error"


def _check_items(events: Sequence[Json]) -> None:
    """Check that items are added in order and done, that their texts are those of their deltas, and
    that the response at the end has them."""
    added: dict[int, Json] = {}
    done: list[Json] = []
    texts: dict[str, str] = {}
    for event in events:
        match event["type"]:
            case "response.output_item.added":
                assert event["output_index"] == len(added)
                assert len(done) == len(added), "two items at once"
                added[event["output_index"]] = event["item"]
                assert event["item"].get("status") == "in_progress"
            case "response.output_item.done":
                assert event["output_index"] == len(done)
                assert event["item"]["id"] == added[len(done)]["id"]
                done.append(event["item"])
            case kind if kind.endswith(".delta"):
                assert event["item_id"] == added[event["output_index"]]["id"]
                assert event["delta"], "an empty delta"
                texts[event["item_id"]] = texts.get(event["item_id"], "") + event["delta"]
            case kind if kind.endswith((".text.done", "_text.done", "arguments.done", "input.done")):
                whole = next(event[name] for name in ("text", "arguments", "input") if name in event)
                assert whole == texts.get(event["item_id"], "")
    for item in done:
        assert text_of(item) == texts.get(item["id"], "")
    final = events[-1]["response"]
    if events[-1]["type"] != "response.failed":
        assert len(done) == len(added)
        assert final["output"] == done
    else:
        assert final["output"][: len(done)] == done
    assert len({item["id"] for item in added.values()}) == len(added)
    Response.model_validate(final if final["error"] is None else {**final, "error": None})


def text_of(item: Json) -> str:
    """Return the text, arguments or input of an item."""
    if "arguments" in item or "input" in item:
        return str(item.get("arguments", item.get("input")))
    parts = item["summary"] or item["content"] if item["type"] == "reasoning" else item["content"]
    return "".join(part["text"] for part in parts)
