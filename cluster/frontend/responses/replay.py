"""The events of a response from what is stored of it: its record and its tokens."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from cluster.frontend.responses.events import Event, ResponseEvents
from cluster.frontend.responses.items import REASONING, Seals
from cluster.frontend.responses.request import Asked
from cluster.frontend.responses.views import Json, ResponseRecord
from cluster.generation.choices import ChatChoice
from cluster.harmony.encoding import HarmonyEncoding
from workers.request import EngineOutput


def stored_form(asked: Asked) -> Json:
    """Return what the events of a response are a function of, beside its tokens, as JSON."""
    chat = asked.chat
    return {
        "record": asdict(asked.record),
        "reader": {
            "stop": list(chat.stop),
            "tools": [tool.name for tool in chat.tools],
            "parallel_tool_calls": chat.parallel_tool_calls,
            "max_calls": chat.tool_choice.max_calls,
            "ends_with_turn": not chat.sampling.ignore_eos,
        },
    }


def record_of(form: Json) -> ResponseRecord:
    """Return the record of a stored form."""
    fields: dict[str, Any] = form["record"]
    return ResponseRecord(**{**fields, "custom_tools": tuple(fields["custom_tools"])})


class Replay:
    """The maker of one response's events from its stored tokens: the same bytes under the same
    numbers, whichever gateway reads them, and in whatever pieces they come.

    Args:
        form: as `stored_form` gives it.
    """

    def __init__(self, form: Json, encoding: HarmonyEncoding, seals: Seals) -> None:
        self._events = ResponseEvents(record_of(form), lambda: 0, lambda text: seals.seal(text, REASONING))
        reader = form["reader"]
        self._choice = ChatChoice(
            0,
            encoding,
            reader["stop"],
            tools=reader["tools"],
            parallel_tool_calls=reader["parallel_tool_calls"],
            max_calls=reader["max_calls"],
            ends_with_turn=reader["ends_with_turn"],
            per_token=True,
        )
        self.num_tokens = 0

    def begin(self) -> list[Event]:
        """Return the events before the first token."""
        return self._events.begin()

    def push(self, outputs: Sequence[EngineOutput]) -> list[Event]:
        """Return the events that these outputs add."""
        made: list[Event] = []
        for output in outputs:
            self.num_tokens += len(output.token_ids)
            if self._choice.finished:
                continue
            for event in self._choice.push(output):
                made += self._events.add(event)
        return made

    def end(self, response: Json) -> list[Event]:
        """Return the terminal event."""
        return self._events.end_with(response)
