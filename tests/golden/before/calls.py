"""Requests over HTTP and gRPC, and their answers in a form that does not depend on the run.

Frames of a fake engine are kept as they are; those of a real engine depend on how many tokens a
message brings, so neighbouring deltas of one kind are joined.
"""

import json
import re
from typing import Any

import grpc
import grpc.aio
import httpx
from google.protobuf.json_format import MessageToDict, ParseDict, ParseError

from tests.golden.before.compare import Json, masked
from tests.golden.before.internals import inference_pb2 as pb
from tests.golden.before.internals import inference_pb2_grpc

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
_HEADERS = ("retry-after", "allow", "www-authenticate")
_USAGE = re.compile(r'"usage":\{.*\}\}$')
_GRPC_FIELDS = (
    *(
        "model",
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
    ),
    *("repetition_penalty", "logit_bias", "seed", "n", "min_tokens", "ignore_eos", "stop_token_ids"),
)
_HTTP_ONLY = ("return_token_ids", "stream_options", "include_reasoning")
"""Fields that gRPC does without."""


async def whole(http: httpx.AsyncClient, path: str, body: Json, *, exact: bool = True) -> Json:
    """Return status, body and the headers that matter.

    Args:
        body: bytes are sent as they are.
        exact: keep the body's text; else its content.
    """
    response = await http.post(path, **_content(body))
    return _answered(response, exact)


def _content(body: Json) -> dict[str, Any]:
    if isinstance(body, bytes):
        return {"content": body, "headers": {"content-type": "application/json"}}
    return {"json": body}


def _answered(response: httpx.Response, exact: bool) -> Json:
    headers = {name: response.headers[name] for name in _HEADERS if name in response.headers}
    text = masked(response.text)
    return {"status": response.status_code, "body": text if exact else json.loads(text)} | headers


async def stream(http: httpx.AsyncClient, path: str, body: dict[str, Json], *, exact: bool = True) -> Json:
    """Return the events of a stream, sorted by choice where there are several: their order depends
    on the run."""
    response = await http.post(path, json={**body, "stream": True})
    if response.status_code != 200:
        return _answered(response, exact)
    *events, rest = response.text.split("\n\n")
    if _num_choices(body) > 1:  # ids of calls become numbers in order of appearance
        events.sort(key=_choice_of)
    *events, rest = masked("\n\n".join([*events, rest])).split("\n\n")
    assert rest == "", f"the stream ended inside an event: {rest!r}"
    frames = [event.removeprefix("data: ") for event in events]
    assert all(event.startswith("data: ") for event in events)
    end = frames.pop() if frames[-1] == "[DONE]" else None
    found: dict[str, Json] = {"type": response.headers["content-type"], "end": end}
    if not exact:
        return found | _folded([json.loads(frame) for frame in frames])
    if (body.get("stream_options") or {}).get("continuous_usage_stats"):
        # What has been counted by the time that an event is read depends on the run.
        frames = [
            frame if '"choices":[]' in frame else _USAGE.sub('"usage":"masked"}', frame) for frame in frames
        ]
    envelopes = {frame.partition('"choices":')[0] for frame in frames if '"choices":' in frame}
    if len(envelopes) == 1:
        found["envelope"] = envelopes.pop()
        frames = [frame.removeprefix(found["envelope"]) for frame in frames]
    return found | {"frames": frames if _num_choices(body) == 1 else _by_choice(frames)}


def _num_choices(body: dict[str, Json]) -> int:
    prompt = body.get("prompt")
    several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    return int(body.get("n") or 1) * (len(prompt) if several and isinstance(prompt, list) else 1)


def _by_choice(frames: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for frame in frames:
        found.setdefault(_choice_of(frame), []).append(frame)
    return dict(sorted(found.items()))


def _choice_of(frame: str) -> str:
    return frame.partition('"index":')[2].split(",")[0] if '"choices":[{' in frame else "none"


class _Fold:
    """One choice's deltas, neighbours of one kind joined."""

    def __init__(self) -> None:
        self.parts: list[list[str]] = []
        self.rest: dict[str, Json] = {}

    def text(self, kind: str, text: str) -> None:
        if self.parts and self.parts[-1][0] == kind:
            self.parts[-1][1] += text
        else:
            self.parts.append([kind, text])

    def extend(self, key: str, entries: list[Json]) -> None:
        self.rest.setdefault(key, []).extend(entries)

    def stored(self) -> Json:
        return {"parts": self.parts, **self.rest}


def _folded(frames: list[dict[str, Json]]) -> Json:
    choices: dict[int, _Fold] = {}
    found: dict[str, Json] = {}
    for frame in frames:
        if "error" in frame:
            found["error"] = frame["error"]
            continue
        found |= {
            key: value
            for key, value in frame.items()
            if key not in ("choices", "usage") or (key == "usage" and value)
        }
        for choice in frame["choices"]:
            fold = choices.setdefault(choice["index"], _Fold())
            for key, value in choice.items():
                if key == "delta":
                    _fold_delta(fold, value)
                elif key == "text":
                    fold.text("text", value)
                elif key == "token_ids":
                    fold.extend(key, value)
                elif key == "logprobs":
                    for name, entries in (value or {}).items():
                        fold.extend(f"logprobs.{name}", entries or [])
                elif key != "index" and value is not None:
                    fold.rest[key] = value
    return found | {"choices": {str(index): choices[index].stored() for index in sorted(choices)}}


def _fold_delta(fold: _Fold, delta: dict[str, Json]) -> None:
    twice = "reasoning" in delta and delta.get("reasoning_content") == delta["reasoning"]
    for key, value in delta.items():
        if key != "tool_calls":
            if not (twice and key == "reasoning_content"):
                fold.text("reasoning = reasoning_content" if twice and key == "reasoning" else key, value)
            continue
        for call in value:
            if "id" in call:
                fold.parts.append(["call", json.dumps({**call, "function": call["function"]["name"]})])
            fold.text(f"arguments {call['index']}", call["function"].get("arguments", ""))


def grpc_request(body: Json) -> pb.ChatRequest | None:
    """Return a chat's body as gRPC has it; None if gRPC cannot say all of it."""
    if not isinstance(body, dict):
        return None
    left = {key: value for key, value in body.items() if key not in _HTTP_ONLY and value is not None}
    asked: dict[str, Json] = {name: left.pop(name) for name in _GRPC_FIELDS if name in left}
    try:
        asked["messages"] = [_grpc_message(message) for message in left.pop("messages", [])]
        asked["tools"] = [_grpc_tool(tool) for tool in left.pop("tools", [])]
        if left.pop("logprobs", False):
            asked["top_logprobs"] = left.pop("top_logprobs", 0)
        if "stop" in left:
            stop = left.pop("stop")
            asked["stop"] = [stop] if isinstance(stop, str) else stop
        if "reasoning_effort" in left:
            asked["reasoning_effort"] = f"REASONING_EFFORT_{left.pop('reasoning_effort').upper()}"
        return None if left else ParseDict(asked, pb.ChatRequest())
    except (ParseError, KeyError, TypeError, ValueError, AttributeError):
        return None


def _grpc_message(message: dict[str, Json]) -> Json:
    left = dict(message)
    found = {"role": f"ROLE_{left.pop('role').upper()}", "content": left.pop("content", None) or ""}
    for name in ("reasoning", "tool_call_id"):
        if name in left:
            found[name] = left.pop(name)
    if "tool_calls" in left:
        calls = left.pop("tool_calls") or []
        found["tool_calls"] = [{"id": call["id"], **call["function"]} for call in calls]
    if left:
        raise KeyError(next(iter(left)))
    return found


def _grpc_tool(tool: dict[str, Json]) -> Json:
    function = dict(tool["function"])
    function.pop("strict", None)
    return {key: value for key, value in function.items() if value is not None}


class Grpc:
    """The public gRPC API of one server. Close it with `close`."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)])
        self.stub = inference_pb2_grpc.InferenceStub(self._channel)

    async def close(self) -> None:
        await self._channel.close()

    async def whole(self, request: pb.ChatRequest) -> Json:
        """Return the answer or the status of the failure."""
        try:
            return _masked_message(await self.stub.Chat(request, timeout=60))
        except grpc.aio.AioRpcError as error:
            return _status(error)

    async def stream(self, request: pb.ChatRequest, *, exact: bool = True) -> Json:
        """Return the events, by choice where there are several, and the status of a failure."""
        events: list[dict[str, Json]] = []
        failure: Json = {}
        try:
            async for event in self.stub.ChatStream(request, timeout=60):
                events.append(MessageToDict(event, preserving_proto_field_name=True))
        except grpc.aio.AioRpcError as error:
            failure = {"failure": _status(error)}
        ids = {masked(event.pop("id")) for event in events}
        if request.n > 1:
            events.sort(key=lambda event: event.get("choice", 0))
        events = json.loads(masked(json.dumps(events)))
        if exact and request.n <= 1:
            return {"ids": sorted(ids), "events": events} | failure
        choices: dict[int, list[dict[str, Json]]] = {}
        for event in events:
            choices.setdefault(-1 if "usage" in event else event.pop("choice", 0), []).append(event)
        if exact:
            return {
                "ids": sorted(ids),
                "events": {str(key): choices[key] for key in sorted(choices)},
            } | failure
        return {
            "ids": sorted(ids),
            "events": {str(key): _folded_events(choices[key]) for key in sorted(choices)},
        } | failure


def _folded_events(events: list[dict[str, Json]]) -> Json:
    fold = _Fold()
    for event in events:
        [(kind, value)] = event.items()
        if kind in ("text", "reasoning"):
            fold.text(kind, value.get("text", ""))
            fold.extend("logprobs", value.get("logprobs", []))
        elif kind == "tool_call":
            if "name" in value:
                fold.parts.append(
                    ["call", json.dumps([value.get("call_index", 0), value.get("id"), value["name"]])]
                )
            fold.text(f"arguments {value.get('call_index', 0)}", value.get("arguments", ""))
        else:
            fold.rest[kind] = value
    return fold.stored()


def _masked_message(message: Any) -> Json:
    found = json.loads(masked(json.dumps(MessageToDict(message, preserving_proto_field_name=True))))
    if "created_unix_s" in found:
        found["created_unix_s"] = "masked"
    return found


def _status(error: grpc.aio.AioRpcError) -> Json:
    metadata = {key: value for key, value in error.trailing_metadata() or () if isinstance(value, str)}
    return {"code": error.code().name, "details": masked(error.details() or ""), "metadata": metadata}
