"""State of one choice: takes the engine's tokens, returns events of its messages and the finish.
Pure state machines over token ids."""

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from cluster.events import FinishReason, TokenLogprob
from cluster.generation.event_log import ChoiceEvent, EventLog
from cluster.generation.logprobs import token_logprob
from cluster.generation.repeated_calls import RepeatedCalls
from cluster.generation.stop_gate import StopGate
from cluster.harmony.encoding import HarmonyEncoding, IncrementalDecoder
from cluster.harmony.header import Repair
from cluster.harmony.message import (
    BLANK_LINE,
    BlankLines,
    Kind,
    MessageDelta,
    MessageEnd,
    MessageEvent,
    MessageStart,
    shows,
)
from cluster.harmony.parse import HarmonyParser
from cluster.harmony.stop import StopStrings
from workers.constraint.automaton import ConstraintLimits
from workers.request import EngineOutput, TokenLogprobs


@dataclass(frozen=True, slots=True)
class ReasoningLimit:
    """The limits that end a turn's reasoning.

    Attributes:
        num_wrap_up: number of tokens that then end it.
    """

    limits: ConstraintLimits
    num_wrap_up: int = 0

    def ended(self, num_reasoning_tokens: int, num_tokens: int) -> bool:
        """Return whether a limit ended the reasoning that has just ended.

        Args:
            num_reasoning_tokens: of the turn so far.
            num_tokens: of the turn so far, the end of the reasoning's message included.
        """
        counted, length = self.limits.max_counted_tokens, self.limits.max_length
        return (counted is not None and num_reasoning_tokens - self.num_wrap_up >= counted) or (
            length is not None and num_tokens - 1 - self.num_wrap_up >= length
        )


class Choice(Protocol):
    """The consumer of one sequence's engine outputs."""

    num_tokens: int
    num_cached_tokens: int
    finished: bool
    reasoning_was_cut: bool
    prompt_logprobs: list[TokenLogprobs]
    skips_special_tokens: bool

    @property
    def num_reasoning_tokens(self) -> int:
        """Number of output tokens that were reasoning."""

    @property
    def repairs(self) -> Mapping[Repair, int]:
        """Number of departures from the harmony format, by kind."""

    def push(self, output: EngineOutput) -> list[ChoiceEvent]:
        """Return the events that these tokens add; the last event of a choice is its ChoiceFinish,
        with which `finished` is set."""


class ChatChoice:
    """A choice that is a harmony turn.

    Args:
        stop: strings that end the text.
        tools: names of the declared functions.
        parallel_tool_calls: if False the turn ends with its first call.
        max_calls: if above 1, a call does not end the turn, as long as it is one of fewer calls and
            repeats none of them; a call that does is left out.
        ends_with_turn: stop when the model's turn is over, also without a stop token of the engine;
            False with ignore_eos.
        per_token: events are those of each token by itself, whatever number of tokens comes at
            once.

    Attributes:
        reasoning_limit: of the sequence's constraint; None: none. Set before the first output.
    """

    skips_special_tokens = False

    def __init__(
        self,
        index: int,
        encoding: HarmonyEncoding,
        stop: Sequence[str] = (),
        *,
        tools: Collection[str] = (),
        parallel_tool_calls: bool = True,
        max_calls: int = 1,
        ends_with_turn: bool = True,
        per_token: bool = False,
    ) -> None:
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.finished = False
        self.reasoning_was_cut = False
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.reasoning_limit: ReasoningLimit | None = None
        self._encoding = encoding
        self._parser = HarmonyParser(encoding, tools, several_calls=max_calls > 1)
        self._gate = StopGate(stop) if stop else None
        self._parallel_tool_calls = parallel_tool_calls
        self._max_calls = max_calls
        self._repeated = RepeatedCalls() if max_calls > 1 else None
        self._ends_with_turn = ends_with_turn
        self._per_token = per_token
        self._log = EventLog(index, per_token=per_token)
        self._kind: Kind = "text"
        self._num_calls = 0
        # Only with logprobs: those of text tokens whose text is not out yet, and how many
        # characters have been parsed and shown.
        self._has_logprobs = False
        self._pending: deque[TokenLogprob] = deque()
        self._num_parsed = 0
        self._num_shown = 0
        self._parsed_blank_lines = BlankLines()
        self._shown_blank_lines = BlankLines()

    @property
    def num_reasoning_tokens(self) -> int:
        """See Choice."""
        return self._parser.num_reasoning_tokens

    @property
    def repairs(self) -> Mapping[Repair, int]:
        """See Choice."""
        return self._parser.repairs

    def begin_with(self, token_ids: Sequence[int]) -> int:
        """Begin within a message, whose beginning has been read: a prompt ends with these tokens of
        the turn. They are no part of the answer.

        Returns:
            The number of them that are reasoning.
        """
        start: MessageStart | None = None
        for token_id in token_ids:
            for event in self._parser.push(token_id):
                start = event if isinstance(event, MessageStart) else start
        num_reasoning_tokens, self._parser.num_reasoning_tokens = self._parser.num_reasoning_tokens, 0
        if start is not None:
            self._take(replace(start, text=""))
        return num_reasoning_tokens

    def push(self, output: EngineOutput) -> list[ChoiceEvent]:
        """See Choice."""
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        self.prompt_logprobs += output.prompt_logprobs
        has_logprobs = bool(output.logprobs)
        self._has_logprobs |= has_logprobs
        for position, token_id in enumerate(output.token_ids):
            self.num_tokens += 1
            self._log.token(token_id)
            if (
                output.stop_token_id == token_id
                and position == len(output.token_ids) - 1
                and self._encoding.token_bytes(token_id)
            ):
                break  # a stop token that the client named ends the turn and is no part of its text
            events = self._parser.push(token_id)
            if has_logprobs and self._parser.part == "text":
                offset = self._offset_of_next(events)
                self._pending.append(
                    token_logprob(self._encoding, token_id, output.logprobs[position], offset)
                )
            for event in events:
                self._take(event)
                if self.finished:
                    return self._log.take()
            is_last = position == len(output.token_ids) - 1
            if self._per_token and self._ends_with_turn and self._parser.turn_over and not is_last:
                self._end(EngineOutput(()))  # as if the token had come by itself
                return self._log.take()
        if output.finish_reason is not None or (self._ends_with_turn and self._parser.turn_over):
            self._end(output)
        return self._log.take()

    def _offset_of_next(self, events: Sequence[MessageEvent]) -> int:
        """Return the offset at which the text begins of the token that gave, or will give, these
        events."""
        due = self._parsed_blank_lines.next_is_due(events[0] if events else None)
        return self._num_parsed + (len(BLANK_LINE) if due else 0)

    def _take(self, event: MessageEvent) -> None:
        if isinstance(event, MessageStart):
            self._kind = event.message.kind
        if self._kind == "tool_call" and self._repeated is not None:
            self._take_call(event, self._repeated)
            return
        if self._kind != "text":
            self._take_other(event)
            return
        if self._has_logprobs and not isinstance(event, MessageEnd):
            self._num_parsed += len(self._parsed_blank_lines.before(event)) + len(event.text)
        if self._gate is None:
            self._show(event)
            return
        for shown in self._gate.push(event):
            self._show(shown)
        if self._gate.matched is not None:
            self._pending.clear()
            self._finish("tool_calls" if self._num_calls else "stop", self._gate.matched)

    def _take_call(self, event: MessageEvent, repeated: RepeatedCalls) -> None:
        """Take an event of one of several calls."""
        for shown in repeated.push(event):
            self._take_other(shown)
        ends = isinstance(event, MessageEnd) and event.message.end == "call"
        if repeated.found or (ends and self._num_calls >= self._max_calls):
            self._show_held()
            self._finish("tool_calls", None)

    def _take_other(self, event: MessageEvent) -> None:
        """Take an event of reasoning or of a call, to which stop strings do not apply."""
        limit = self.reasoning_limit
        if limit is not None and isinstance(event, MessageEnd) and event.message.kind == "reasoning":
            ended = event.message.end is not None
            self.reasoning_was_cut |= ended and limit.ended(self.num_reasoning_tokens, self.num_tokens)
        if self._gate is not None and not shows(event):
            for shown in self._gate.follow(event):
                self._show(shown)
            return
        self._show_held()
        if isinstance(event, MessageStart) and self._kind == "tool_call":
            if self._num_calls and not self._parallel_tool_calls:
                self._finish("tool_calls", None)
                return
            self._num_calls += 1
        self._log.add(event)

    def _show(self, event: MessageEvent) -> None:
        logprobs: list[TokenLogprob] = []
        if self._has_logprobs and not isinstance(event, MessageEnd):
            self._num_shown += len(self._shown_blank_lines.before(event)) + len(event.text)
            while self._pending and self._pending[0].text_offset < self._num_shown:
                logprobs.append(self._pending.popleft())
        self._log.add(event, logprobs)

    def _show_held(self) -> None:
        if self._gate is not None:
            for event in self._gate.flush():
                self._show(event)

    def _end(self, output: EngineOutput) -> None:
        self._log.boundary()
        for event in self._parser.finish():
            self._take(event)
            if self.finished:
                return
        self._show_held()
        if output.finish_reason == "length":
            self._finish("length", None)
            return
        own_end = output.stop_token_id is None or output.stop_token_id in self._encoding.stop_token_ids
        self._finish("tool_calls" if self._num_calls else "stop", None if own_end else output.stop_token_id)

    def _finish(self, reason: FinishReason, stop_reason: str | int | None) -> None:
        self.finished = True
        self._log.finish(reason, stop_reason, tuple(self._pending))


class CompletionChoice:
    """A choice that continues a prompt as plain text.

    Args:
        stop: strings that end the text.
        echo: text that precedes the output, returned with the first tokens.
        echoed_names: the echo has the names of special tokens.
        prompt_only: leave the output out.
        skip_special_tokens: leave the names of special tokens out of the text.
    """

    num_reasoning_tokens = 0
    reasoning_was_cut = False
    repairs: Mapping[Repair, int] = {}

    def __init__(
        self,
        index: int,
        encoding: HarmonyEncoding,
        stop: Sequence[str] = (),
        *,
        echo: str = "",
        echoed_names: bool = False,
        prompt_only: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.finished = False
        self._encoding = encoding
        self._decoder = IncrementalDecoder(encoding)
        self._stop = StopStrings(stop) if stop else None
        self._skip_special_tokens = skip_special_tokens
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.skips_special_tokens = not echoed_names
        self._echo = echo
        self._prompt_only = prompt_only
        self._log = EventLog(index)
        self._pending: list[TokenLogprob] = []
        self._num_decoded = len(echo)

    def push(self, output: EngineOutput) -> list[ChoiceEvent]:
        """See Choice."""
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        self.prompt_logprobs += output.prompt_logprobs
        if not output.token_ids and output.finish_reason is None:
            return []
        if self._echo:
            self._log.add(MessageDelta(self._echo))
            self._echo = ""
        if self._prompt_only:
            self._finish("length", None)
            return self._log.take()
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
            self._log.add(MessageDelta(text), self._pending)
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
