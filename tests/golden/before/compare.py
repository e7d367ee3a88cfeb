"""Masking of what differs from run to run, and differences that a reader can follow."""

import json
import math
import re
from collections.abc import Iterator
from typing import Any

Json = Any
TOLERANCE = 2e-4
"""Between two floating-point numbers, which other processors round otherwise."""
_MOST_LINES = 60
_MOST_CHARS = 400

_MASKS = (
    (re.compile(r"\b(chatcmpl|cmpl)-[0-9a-f]{32}"), r"\1-ID"),
    (re.compile(r"(\"created\":) ?[0-9]+"), r"\g<1>0"),
    (re.compile(r"(request (?:id )?)[0-9a-f]{32}"), r"\1ID"),
)
_CALL_ID = re.compile(r"\bcall_[0-9a-f]{24}\b")


def masked(text: str) -> str:
    """Return a text without ids of requests and times; ids of tool calls become numbers in order of
    appearance."""
    for pattern, replacement in _MASKS:
        text = pattern.sub(replacement, text)
    seen: dict[str, str] = {}
    return _CALL_ID.sub(lambda match: seen.setdefault(match[0], f"call_{len(seen)}"), text)


def differences(was: Json, now: Json, path: str = "") -> Iterator[str]:
    """Yield a line for each place where two values differ. JSON inside a string is compared as
    JSON."""
    if isinstance(was, str) and isinstance(now, str) and was != now:
        yield from _of_texts(was, now, path)
    elif _is_number(was) and _is_number(now):
        exact = isinstance(was, int) and isinstance(now, int)
        if was != now if exact else not math.isclose(was, now, abs_tol=TOLERANCE, rel_tol=TOLERANCE):
            yield f"{path}: {was} → {now}"
    elif isinstance(was, dict) and isinstance(now, dict):
        for key in dict.fromkeys((*was, *now)):
            place = f"{path}.{key}" if path else str(key)
            if key not in now:
                yield f"{place}: {_short(was[key])} → gone"
            elif key not in was:
                yield f"{place}: new: {_short(now[key])}"
            else:
                yield from differences(was[key], now[key], place)
    elif isinstance(was, list) and isinstance(now, list):
        yield from _of_lists(was, now, path)
    elif was != now or type(was) is not type(now):
        yield f"{path}: {_short(was)} → {_short(now)}"


def report(was: Json, now: Json) -> str:
    """Return the differences as text; empty without any."""
    lines = list(differences(was, now))
    cases = {line.split(".", 1)[0].split(":", 1)[0] for line in lines}
    left_out = len(lines) - _MOST_LINES
    shown = [
        line if len(line) <= 2 * _MOST_CHARS else f"{line[: 2 * _MOST_CHARS]}…"
        for line in lines[:_MOST_LINES]
    ]
    if left_out > 0:
        shown.append(f"… and {left_out} more differences")
    return "\n".join([f"{len(lines)} differences in {len(cases)} cases", *shown]) if lines else ""


def _of_texts(was: str, now: str, path: str) -> Iterator[str]:
    try:
        before, after = json.loads(was), json.loads(now)
    except ValueError:
        start = next(
            (i for i, (a, b) in enumerate(zip(was, now, strict=False)) if a != b), min(len(was), len(now))
        )
        if len(was) + len(now) < _MOST_CHARS:
            yield f"{path}: {was!r} → {now!r}"
        else:
            begin = max(start - 60, 0)
            before, after = was[begin : start + 120], now[begin : start + 120]
            yield f"{path}: from character {start}: …{before!r} → …{after!r}"
        return
    lines = list(differences(before, after, path))
    yield from lines or [f"{path}: same JSON, in other order or spacing: {_short(was)} → {_short(now)}"]


def _of_lists(was: list[Json], now: list[Json], path: str) -> Iterator[str]:
    plain = all(isinstance(entry, int | float | str) for entry in (*was, *now))
    if (
        plain
        and len(was) != len(now)
        and (len(was) + len(now)) > 0
        and not any(isinstance(entry, float) for entry in (*was, *now))
    ):
        start = next(
            (i for i, (a, b) in enumerate(zip(was, now, strict=False)) if a != b), min(len(was), len(now))
        )
        sizes = f"{len(was)} → {len(now)} entries"
        yield f"{path}: {sizes}, from [{start}]: {_short(was[start:])} → {_short(now[start:])}"
        return
    for index, (before, after) in enumerate(zip(was, now, strict=False)):
        yield from differences(before, after, f"{path}[{index}]")
    for index in range(len(now), len(was)):
        yield f"{path}[{index}]: {_short(was[index])} → gone"
    for index in range(len(was), len(now)):
        yield f"{path}[{index}]: new: {_short(now[index])}"


def _is_number(value: Json) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: Json) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MOST_CHARS else f"{text[:_MOST_CHARS]}…"
