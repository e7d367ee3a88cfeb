"""The output side of a request: output that the engine's thread has produced and its reader has not
yet taken.

A stream's memory is bounded by `max_tokens`; a slow reader gets several tokens at once. Readers are
woken once per step, however many streams got tokens: the engine passes each `Notifier` the list of
its streams with new output.
"""

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from queue import SimpleQueue
from typing import Protocol

from workers.errors import CantataError
from workers.request import EngineOutput, FinishReason, TokenLogprobs

MAX_PROMPT_LOGPROBS = 8192
"""Entries of one output; with 20 alternatives each they take 3 MB of a message."""


class Notifier(Protocol):
    """Wakes the readers of streams. Called on the engine's thread; must not block."""

    def notify(self, streams: "Sequence[OutputStream]") -> None:
        """Wake the readers of these streams, which have new output."""


class OutputStream:
    """The output of one request, from the engine's thread to its reader.

    Attributes:
        seq_id: the engine's number of the sequence.
        failure: why the request ended, if the reason is an error with its own status (deadline,
            dead engine). Set before the terminal output can be taken.
    """

    def __init__(self, request_id: str, seq_id: int, notifier: Notifier) -> None:
        self.request_id = request_id
        self.seq_id = seq_id
        self.notifier = notifier
        self.failure: CantataError | None = None
        self._lock = threading.Lock()
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._prompt_logprobs: list[TokenLogprobs] = []
        self._num_cached_tokens = 0
        self._terminal: EngineOutput | None = None
        self._taken = False

    @property
    def ended(self) -> bool:
        """Whether the last output has been produced; the reader may not have taken it yet."""
        return self._terminal is not None

    def push(
        self, token_ids: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...], num_cached_tokens: int
    ) -> None:
        """Add tokens (engine side); ignored after the end."""
        with self._lock:
            if self._terminal is not None:
                return
            self._token_ids += token_ids
            self._num_cached_tokens = num_cached_tokens
            if logprobs:
                self._logprobs += logprobs

    def push_prompt(self, logprobs: tuple[TokenLogprobs, ...]) -> None:
        """Add log-probabilities of prompt tokens (engine side); ignored after the end."""
        with self._lock:
            if self._terminal is None:
                self._prompt_logprobs += logprobs

    def end(
        self,
        reason: FinishReason,
        *,
        stop_token_id: int | None = None,
        error: str | None = None,
        failure: CantataError | None = None,
    ) -> bool:
        """End the output (engine side). Only the first call has an effect; return whether this was
        it."""
        with self._lock:
            if self._terminal is not None:
                return False
            self.failure = failure
            self._terminal = EngineOutput(finish_reason=reason, stop_token_id=stop_token_id, error=error)
            return True

    def take(self) -> EngineOutput | None:
        """Return all output since the last call (reader side), or None. The last output has the
        finish reason."""
        with self._lock:
            terminal = self._terminal
            if self._taken or not (terminal or self._token_ids or self._prompt_logprobs):
                return None
            prompt_logprobs = tuple(self._prompt_logprobs[:MAX_PROMPT_LOGPROBS])
            del self._prompt_logprobs[:MAX_PROMPT_LOGPROBS]
            if self._prompt_logprobs:  # the rest first
                return EngineOutput(prompt_logprobs=prompt_logprobs)
            output = EngineOutput(
                token_ids=tuple(self._token_ids),
                logprobs=tuple(self._logprobs),
                finish_reason=terminal.finish_reason if terminal else None,
                stop_token_id=terminal.stop_token_id if terminal else None,
                num_cached_tokens=self._num_cached_tokens,
                error=terminal.error if terminal else None,
                prompt_logprobs=prompt_logprobs,
            )
            self._token_ids.clear()
            self._logprobs.clear()
            self._taken = terminal is not None
            return output


class AsyncReader:
    """Reads streams in the asyncio loop in which it was created, with one call into the loop per
    step."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: dict[int, asyncio.Event] = {}

    def notify(self, streams: Sequence[OutputStream]) -> None:
        try:
            self._loop.call_soon_threadsafe(self._wake, [stream.seq_id for stream in streams])
        except RuntimeError:
            # The loop is closed: its readers are gone, and their output is dropped with their
            # streams.
            if not self._loop.is_closed():
                raise

    async def read(self, stream: OutputStream) -> AsyncGenerator[EngineOutput]:
        """Yield outputs up to the one with the finish reason."""
        event = self._events[stream.seq_id] = asyncio.Event()
        try:
            while True:
                event.clear()  # before take(): later output sets the event again
                output = stream.take()
                if output is None:
                    await event.wait()
                    continue
                yield output
                if output.finish_reason is not None:
                    return
        finally:
            del self._events[stream.seq_id]

    def _wake(self, seq_ids: list[int]) -> None:
        for seq_id in seq_ids:
            event = self._events.get(seq_id)
            if event is not None:
                event.set()


class ThreadReader:
    """Reads many streams in one thread, in the order in which they get output."""

    def __init__(self) -> None:
        self._ready: SimpleQueue[Sequence[OutputStream]] = SimpleQueue()

    def notify(self, streams: Sequence[OutputStream]) -> None:
        self._ready.put(streams)

    def read(self, streams: Sequence[OutputStream]) -> Iterator[tuple[OutputStream, EngineOutput]]:
        """Yield the outputs of all streams until each has ended; block while there is none. They
        must have been submitted with this reader."""
        unfinished = {stream.seq_id for stream in streams}
        while unfinished:
            for stream in self._ready.get():
                while stream.seq_id in unfinished and (output := stream.take()) is not None:
                    if output.finish_reason is not None:
                        unfinished.remove(stream.seq_id)
                    yield stream, output
