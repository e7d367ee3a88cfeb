"""One choice: the engine's tokens in, deltas and the finish out. Pure state machines over token
ids."""

import uuid
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from cluster.events import (
    ChoiceDelta,
    ChoiceFinish,
    Delta,
    FinishReason,
    TextDelta,
    TokenCandidate,
    TokenLogprob,
    ToolCallDelta,
)
from cluster.harmony.encoding import HarmonyEncoding, IncrementalDecoder
from cluster.harmony.header import Repair
from cluster.harmony.parse import HarmonyParser
from cluster.harmony.stop import StopStrings
from workers.request import EngineOutput, TokenLogprobs

ChoiceEvent = ChoiceDelta | ChoiceFinish


class Choice(Protocol):
    """What runs a sequence feeds with the engine's outputs."""

    num_tokens: int
    num_cached_tokens: int
    finished: bool

    @property
    def num_reasoning_tokens(self) -> int:
        """Output tokens that were reasoning."""

    @property
    def repairs(self) -> Mapping[Repair, int]:
        """Departures from the harmony format, by kind."""

    def push(self, output: EngineOutput) -> list[ChoiceEvent]:
        """What these tokens add; the last event of a choice is its ChoiceFinish, and `finished` is
        set with it."""


class _EventLog:
    """The events of one push, neighbours of the same kind joined, each with the tokens since the
    one before."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._token_ids: list[int] = []
        self._events: list[ChoiceEvent] = []
        # The first of the neighbours, the texts of all of them.
        self._joined: Delta | None = None
        self._texts: list[str] = []
        self._joined_logprobs: list[TokenLogprob] = []
        self._joined_ids: list[int] = []

    def token(self, token_id: int) -> None:
        self._token_ids.append(token_id)

    def delta(self, delta: Delta, logprobs: Sequence[TokenLogprob] = ()) -> None:
        if self._joined is None or not _continues(self._joined, delta):
            self._close()
            self._joined = delta
        self._texts.append(delta.arguments if isinstance(delta, ToolCallDelta) else delta.text)
        self._joined_logprobs += logprobs
        self._joined_ids += self._token_ids
        self._token_ids.clear()

    def finish(
        self, reason: FinishReason, stop_reason: str | int | None, logprobs: Sequence[TokenLogprob]
    ) -> None:
        self._close()
        self._events.append(
            ChoiceFinish(self._index, reason, stop_reason, tuple(logprobs), tuple(self._token_ids))
        )
        self._token_ids.clear()

    def take(self) -> list[ChoiceEvent]:
        self._close()
        events, self._events = self._events, []
        return events

    def _close(self) -> None:
        if self._joined is not None:
            delta = _with_text(self._joined, "".join(self._texts))
            self._events.append(
                ChoiceDelta(self._index, delta, tuple(self._joined_logprobs), tuple(self._joined_ids))
            )
            self._joined = None
            self._texts.clear()
            self._joined_logprobs.clear()
            self._joined_ids.clear()


def _continues(left: Delta, right: Delta) -> bool:
    if isinstance(left, ToolCallDelta) and isinstance(right, ToolCallDelta):
        return right.name is None and left.call_index == right.call_index
    return type(left) is type(right)


def _with_text(delta: Delta, text: str) -> Delta:
    return replace(delta, arguments=text) if isinstance(delta, ToolCallDelta) else replace(delta, text=text)


class ChatChoice:
    """A harmony turn.

    Args:
        stop: strings that end the text.
        tools: names of the declared functions.
        parallel_tool_calls: if False the turn ends with its first call.
        ends_with_turn: stop when the model's turn is over, also where no stop token of the engine
            says so; not with ignore_eos.
    """

    def __init__(
        self,
        index: int,
        encoding: HarmonyEncoding,
        stop: Sequence[str] = (),
        *,
        tools: Collection[str] = (),
        parallel_tool_calls: bool = True,
        ends_with_turn: bool = True,
    ) -> None:
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.finished = False
        self._encoding = encoding
        self._parser = HarmonyParser(encoding, tools)
        self._stop = StopStrings(stop) if stop else None
        self._parallel_tool_calls = parallel_tool_calls
        self._ends_with_turn = ends_with_turn
        self._log = _EventLog(index)
        self._has_calls = False
        # Logprobs of text tokens whose text is not out yet, and how many characters have been
        # parsed and shown.
        self._pending: deque[TokenLogprob] = deque()
        self._num_parsed = 0
        self._num_shown = 0

    @property
    def num_reasoning_tokens(self) -> int:
        """See Choice."""
        return self._parser.num_reasoning_tokens

    @property
    def repairs(self) -> Mapping[Repair, int]:
        """See Choice."""
        return self._parser.repairs

    def push(self, output: EngineOutput) -> list[ChoiceEvent]:
        """See Choice."""
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        for position, token_id in enumerate(output.token_ids):
            self.num_tokens += 1
            self._log.token(token_id)
            if (
                output.stop_token_id == token_id
                and position == len(output.token_ids) - 1
                and self._encoding.token_bytes(token_id)
            ):
                break  # a stop token that the client named ends the turn and is no part of its text
            before = self._num_parsed
            deltas = self._parser.push(token_id)
            if output.logprobs and self._parser.part == "text":
                self._pending.append(
                    token_logprob(self._encoding, token_id, output.logprobs[position], before)
                )
            for delta in deltas:
                self._take(delta)
                if self.finished:
                    return self._log.take()
        if output.finish_reason is not None or (self._ends_with_turn and self._parser.turn_over):
            self._end(output)
        return self._log.take()

    def _take(self, delta: Delta) -> None:
        if isinstance(delta, TextDelta):
            self._num_parsed += len(delta.text)
            if self._stop is None:
                self._show(delta.text)
                return
            result = self._stop.push(delta.text)
            self._show(result.text)
            if result.matched is not None:
                self._pending.clear()
                self._finish("tool_calls" if self._has_calls else "stop", result.matched)
            return
        self._show_held()
        if isinstance(delta, ToolCallDelta):
            if delta.call_index > 0 and not self._parallel_tool_calls:
                self._finish("tool_calls", None)
                return
            if delta.name is not None:
                self._has_calls = True
                delta = ToolCallDelta(
                    delta.call_index, delta.name, delta.arguments, f"call_{uuid.uuid4().hex[:24]}"
                )
        self._log.delta(delta)

    def _show(self, text: str) -> None:
        if text:
            self._num_shown += len(text)
            logprobs = []
            while self._pending and self._pending[0].text_offset < self._num_shown:
                logprobs.append(self._pending.popleft())
            self._log.delta(TextDelta(text), logprobs)

    def _show_held(self) -> None:
        if self._stop is not None:
            self._show(self._stop.flush())

    def _end(self, output: EngineOutput) -> None:
        for delta in self._parser.finish():
            self._take(delta)
            if self.finished:
                return
        self._show_held()
        if output.finish_reason == "length":
            self._finish("length", None)
            return
        own_end = output.stop_token_id is None or output.stop_token_id in self._encoding.stop_token_ids
        self._finish("tool_calls" if self._has_calls else "stop", None if own_end else output.stop_token_id)

    def _finish(self, reason: FinishReason, stop_reason: str | int | None) -> None:
        self.finished = True
        self._log.finish(reason, stop_reason, tuple(self._pending))


class CompletionChoice:
    """A continuation as plain text.

    Args:
        stop: strings that end the text.
        echo: text that comes first, with the first tokens.
        skip_special_tokens: leave the names of special tokens out of the text.
    """

    num_reasoning_tokens = 0
    repairs: Mapping[Repair, int] = {}

    def __init__(
        self,
        index: int,
        encoding: HarmonyEncoding,
        stop: Sequence[str] = (),
        *,
        echo: str = "",
        skip_special_tokens: bool = True,
    ) -> None:
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.finished = False
        self._encoding = encoding
        self._decoder = IncrementalDecoder(encoding)
        self._stop = StopStrings(stop) if stop else None
        self._skip_special_tokens = skip_special_tokens
        self._echo = echo
        self._log = _EventLog(index)
        self._pending: list[TokenLogprob] = []
        self._num_decoded = len(echo)

    def push(self, output: EngineOutput) -> list[ChoiceEvent]:
        """See Choice."""
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        if self._echo:
            self._log.delta(TextDelta(self._echo))
            self._echo = ""
        for position, token_id in enumerate(output.token_ids):
            self.num_tokens += 1
            self._log.token(token_id)
            if output.logprobs:
                self._pending.append(
                    token_logprob(self._encoding, token_id, output.logprobs[position], self._num_decoded)
                )
            if output.stop_token_id == token_id and position == len(output.token_ids) - 1:
                break
            self._take(self._text_of(token_id))
            if self.finished:
                return self._log.take()
        if output.finish_reason is not None:
            self._end(output)
        return self._log.take()

    def _text_of(self, token_id: int) -> str:
        if token_id in self._encoding.special_ids:
            name = (
                ""
                if self._skip_special_tokens
                else self._encoding.decode([token_id], skip_special_tokens=False)
            )
            return self._decoder.flush() + name
        return self._decoder.push(token_id)

    def _take(self, text: str) -> None:
        self._num_decoded += len(text)
        if self._stop is None:
            self._show(text)
            return
        result = self._stop.push(text)
        self._show(result.text)
        if result.matched is not None:
            self._finish("stop", result.matched)

    def _show(self, text: str) -> None:
        if text:
            self._log.delta(TextDelta(text), self._pending)
            self._pending.clear()

    def _end(self, output: EngineOutput) -> None:
        self._take(self._decoder.flush())
        if self.finished:
            return
        if self._stop is not None:
            self._show(self._stop.flush())
        own_end = output.stop_token_id is None or output.stop_token_id in self._encoding.stop_token_ids
        self._finish(
            "length" if output.finish_reason == "length" else "stop",
            None if own_end else output.stop_token_id,
        )

    def _finish(self, reason: FinishReason, stop_reason: str | int | None) -> None:
        self.finished = True
        self._log.finish(reason, stop_reason, self._pending)


def token_logprob(
    encoding: HarmonyEncoding, token_id: int, logprobs: TokenLogprobs, text_offset: int
) -> TokenLogprob:
    """The engine's numbers with the tokens' texts."""
    top = tuple(_candidate(encoding, other, logprob) for other, logprob in logprobs.top)
    return TokenLogprob(_candidate(encoding, token_id, logprobs.logprob), text_offset, top)


def _candidate(encoding: HarmonyEncoding, token_id: int, logprob: float) -> TokenCandidate:
    return TokenCandidate(token_id, token_text(encoding, token_id), encoding.token_bytes(token_id), logprob)


def token_text(encoding: HarmonyEncoding, token_id: int) -> str:
    """How a single token is shown: its text, the name of a special token, or `bytes:` and hex
    escapes for a part of a character."""
    token_bytes = encoding.token_bytes(token_id)
    if not token_bytes:
        return encoding.decode([token_id], skip_special_tokens=False)
    try:
        return token_bytes.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes)
