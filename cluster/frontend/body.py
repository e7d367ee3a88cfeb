"""Request bodies: read with a bound, decoded strictly, checked against a schema; each refusal names
the field."""

import asyncio
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import orjson
from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import ClientDisconnect

from cluster.config import GatewayConfig
from cluster.frontend.errors import BodyTooLarge, RequestTimeout, UnsupportedMediaType
from cluster.frontend.unknown_fields import ignored_fields
from cluster.generation.limits import MAX_CUT_CONTEXTS, check_num_messages
from workers.errors import Cancelled, ContextLengthExceeded, InvalidRequest
from workers.grammars.grammar import may_have_gbnf

Model = TypeVar("Model", bound=BaseModel)
Asked = TypeVar("Asked")
_Place = tuple["_Place", str | int] | None
"""A value's place in a body, from its end: the place of the value around it, and its key there."""

MIN_BYTES_PER_S = 16 * 1024
_INLINE_BYTES = 64 * 1024
_LONE_SURROGATE = (
    "has half of a surrogate pair (\\ud800 to \\udfff), which is no character: a text was probably cut in "
    "the middle of one."
)
_JSON_KINDS = {
    "model_type": "an object",
    "dict_type": "an object",
    "list_type": "an array",
    "string_type": "a string",
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "none_required": "null",
}
"""The expected kind of value by pydantic's error type, in JSON's terms instead of Python's."""


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """Limits on every request's body.

    Attributes:
        max_bytes: longest body; a longer one is refused with 413.
        timeout_s: seconds for the body to arrive, and one second more for each MIN_BYTES_PER_S of
            it; then 408.
        max_messages: maximum number of a chat's messages, with the parts and calls in them.
        max_values: maximum number of objects, arrays and their entries, as `check_num_values`
            counts them.
        refuse_unknown: refuse fields that the schema does not have; else they are ignored.
    """

    max_bytes: int
    timeout_s: float
    max_messages: int
    max_values: int
    refuse_unknown: bool

    @classmethod
    def of(cls, config: GatewayConfig) -> "BodyLimits":
        """Return the limits of a gateway's settings."""
        return cls(
            max_bytes=config.max_body_bytes,
            timeout_s=config.body_timeout_s,
            max_messages=config.max_messages,
            max_values=config.max_json_values,
            refuse_unknown=config.unknown_fields == "refuse",
        )


async def read(
    request: Request,
    kind: type[Model],
    limits: BodyLimits,
    max_items: int,
    convert: Callable[[Model, int], Asked],
) -> tuple[Model, Asked]:
    """Return the body as `kind` and the result of `convert` on it and its size in bytes. Large
    ones, and those with GBNF, are decoded, checked and converted in a thread, so that other
    requests go on. The names of ignored fields are put into `request.state.ignored_fields`, for the
    edge to show.

    Args:
        max_items: maximum number of entries of an array: the context's tokens, since an entry of a
            message or prompt list takes at least one.
    Raises:
        InvalidRequest: not JSON, not an object, a misspelt field, a wrong type or value; `param` is
            a path such as `messages[0].content`.
        ContextLengthExceeded: more values, messages or entries than the limits allow.
        BodyTooLarge: longer than `limits.max_bytes`; the rest is not read.
        RequestTimeout: it came too slowly, or not at all.
        UnsupportedMediaType: not declared as JSON, or compressed.
    """
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media_type != "application/json" and not (
        media_type.startswith("application/") and media_type.endswith("+json")
    ):
        raise UnsupportedMediaType("The body must be JSON: set the header Content-Type to application/json.")
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise UnsupportedMediaType(
            "The body is compressed: send it as it is, without the header Content-Encoding."
        )
    data = await _bytes(request, limits)

    def parse() -> tuple[Model, Asked]:
        check_num_values(data, limits.max_values)
        value = _object(data, kind, max_items, limits.max_messages)
        body, request.state.ignored_fields = _checked(value, kind, limits)
        return body, convert(body, len(data))

    if len(data) <= _INLINE_BYTES and not may_have_gbnf(data):
        return parse()
    return await asyncio.to_thread(parse)


def parsed_frame(
    data: bytes, kind: type[Model], limits: BodyLimits, max_items: int, envelope: Sequence[str]
) -> tuple[Model, dict[str, object]]:
    """Return a body that is sent as a frame of a WebSocket, and the fields of its envelope, which
    stand beside its own.

    Args:
        envelope: names of these fields.
    Raises:
        InvalidRequest, ContextLengthExceeded: as `read`.
    """
    check_num_values(data, limits.max_values)
    value = _object(data, kind, max_items, limits.max_messages)
    around = {name: value.pop(name) for name in envelope if name in value}
    body, _ = _checked(value, kind, limits)
    return body, around


def _checked(value: dict[str, object], kind: type[Model], limits: BodyLimits) -> tuple[Model, list[str]]:
    """Return a decoded body and the names of ignored fields."""
    ignored = ignored_fields(value, kind.model_fields, refuse=limits.refuse_unknown)
    if limits.refuse_unknown:
        value = {name: field for name, field in value.items() if name in kind.model_fields}
    return check(value, kind, refuse_unknown=limits.refuse_unknown), ignored


def _object(data: bytes, kind: type[BaseModel], max_items: int, max_messages: int) -> dict[str, object]:
    """Return a body whose lists are short enough to be validated."""
    value = decode(data)
    if not isinstance(value, dict):
        raise InvalidRequest(f"The body must be a JSON object, got {_kind(value)}.")
    if value.get("truncate_prompt_tokens") is not None:
        max_items *= MAX_CUT_CONTEXTS
    for name, field in value.items():
        if isinstance(field, list | dict) and len(field) > max_items and name in kind.model_fields:
            reason = (
                f"{name} has {len(field)} entries, more than the {max_items} tokens that this model takes."
            )
            raise ContextLengthExceeded(reason, name)
    for name in ("messages", "input"):
        if name in kind.model_fields and isinstance(value.get(name), list):
            check_num_messages(_num_entries(value[name]), max_messages, name)
    return value


def check_num_values(data: bytes, limit: int) -> None:
    """Refuse JSON that would take long to parse. The parser keeps the GIL, in a thread as well, and
    its time depends on the number of values more than on the number of bytes. The error's code is
    that of a prompt that is too long, on which clients shorten the chat.

    Args:
        limit: maximum number of `{`, `[` and `,`, those in texts included.
    Raises:
        ContextLengthExceeded: there are more.
    """
    if len(data) <= limit:
        return
    count = sum(data.count(mark) for mark in (b"{", b"[", b","))
    if count > limit:
        raise ContextLengthExceeded(
            f"The body has {count} objects, arrays and entries of these, counted by its braces, brackets and "
            f"commas; this server takes {limit} (gateway.max_json_values)."
        )


def _num_entries(messages: list[object]) -> int:
    """Return the number of objects that pydantic would create from each message of a chat that has
    not been validated."""
    lists = [
        message.get(name)
        for message in messages
        if isinstance(message, dict)
        for name in ("content", "tool_calls", "output", "summary")
    ]
    return len(messages) + sum(len(entry) for entry in lists if isinstance(entry, list))


async def _bytes(request: Request, limits: BodyLimits) -> bytes:
    too_large = BodyTooLarge(f"The body is larger than the {limits.max_bytes} bytes that this server takes.")
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and (len(declared) > 20 or int(declared) > limits.max_bytes):
        raise too_large
    chunks: list[bytes] = []
    length = 0
    begin_s = asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout(limits.timeout_s) as timeout:
            async for chunk in request.stream():
                length += len(chunk)
                if length > limits.max_bytes:
                    raise too_large
                chunks.append(chunk)
                timeout.reschedule(begin_s + limits.timeout_s + length / MIN_BYTES_PER_S)
    except TimeoutError:
        raise RequestTimeout(
            f"The body did not arrive in time: {length} bytes came in "
            f"{asyncio.get_running_loop().time() - begin_s:.0f} s."
        ) from None
    except ClientDisconnect:
        raise Cancelled("The client left before its body was complete.") from None
    return b"".join(chunks)


def decode(data: bytes) -> object:
    """Decode JSON as RFC 8259 defines it: UTF-8, no NaN or Infinity, nesting within bounds.

    Raises:
        InvalidRequest: names the position, or the field with a number that is not finite or a text
            that is not Unicode.
    """
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise _wrong_value(data) or InvalidRequest(f"The body is not valid JSON: {error}.") from None


def _wrong_value(data: bytes) -> InvalidRequest | None:
    """Return the error of a value which Python's own parser accepts and RFC 8259 does not: NaN, an
    infinity, half of a surrogate pair; None if there is none."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    pending: list[tuple[_Place, object]] = [(None, value)]
    while pending:
        place, node = pending.pop()
        if isinstance(node, float) and not math.isfinite(node):
            path = _path(_loc(place))
            return InvalidRequest(f"{path or 'The body'} must be a finite number.", path or None)
        if isinstance(node, str) and not _is_unicode(node):
            path = _path(_loc(place))
            return InvalidRequest(f"{path or 'The body'} {_LONE_SURROGATE}", path or None)
        if isinstance(node, dict):
            if not all(map(_is_unicode, node)):
                path = _path(_loc(place))
                where = f"A field name in {path}" if path else "A field name"
                return InvalidRequest(f"{where} {_LONE_SURROGATE}", path or None)
            pending += [((place, key), child) for key, child in node.items()]
        elif isinstance(node, list):
            pending += [((place, index), child) for index, child in enumerate(node)]
    return None


def _loc(place: _Place) -> tuple[str | int, ...]:
    parts: list[str | int] = []
    while place is not None:
        place, part = place
        parts.append(part)
    return tuple(reversed(parts))


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check(value: object, kind: type[Model], *, refuse_unknown: bool) -> Model:
    """Validate `value` and return it as `kind`.

    Args:
        refuse_unknown: refuse fields that the schema does not have, at all depths.
    Raises:
        InvalidRequest: see `read`.
    """
    try:
        return kind.model_validate(value, extra="forbid" if refuse_unknown else None)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
    path = _path(first["loc"])
    raise InvalidRequest(_sentence(path, first), path or None)


def _path(loc: tuple[str | int, ...]) -> str:
    text = ""
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        elif not part.startswith("<"):  # the tag of a union's member; see schema.py
            text += f".{part[:100]}" if text else part[:100]
    return text


def _sentence(path: str, error: ErrorDetails) -> str:
    match error["type"]:
        case "extra_forbidden":
            return f"Unknown field {path}: this server has no such parameter."
        case "missing":
            return f"{path} is missing."
        case "value_error":
            reason = str(error["ctx"]["error"])
            return f"{path} {reason}." if path else f"{reason}."
        case "literal_error" if error["ctx"]["expected"] == "True":
            return f"{path} must be true."
    reason = _JSON_KINDS.get(error["type"]) or error["msg"].removeprefix("Input should be ").removeprefix(
        "Value error, "
    )
    return f"{path} must be {reason}."


def _kind(value: object) -> str:
    names = {
        list: "an array",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names.get(type(value), type(value).__name__)
