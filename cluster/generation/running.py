"""A running generation: its choices run at once, their events come out as one stream."""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing

from cluster.events import ChoiceDelta, ChoiceFinish, GenerationEvent, TokenLogprob, Usage
from cluster.fleet.dispatch import Dispatcher
from cluster.generation.admission import Ticket
from cluster.generation.event_log import ChoiceEvent
from cluster.generation.logprobs import prompt_token_logprobs
from cluster.generation.turn import Job, Turn
from cluster.harmony.encoding import HarmonyEncoding
from cluster.harmony.message import shows
from cluster.metrics import GatewayMetrics
from workers.errors import CantataError, InvalidRequest
from workers.request import EngineOutput

_QUEUE_SIZE = 64
"""Maximum number of unread events. When the queue is full a choice stops reading from its engine,
which then sends several tokens a message."""


class Generation:
    """The answer to one request: an async iterator of ChoiceDelta and ChoiceFinish (exactly one per
    choice) and, last, one Usage.

    It begins when it is made and its receiver must close it; `aclose` cancels the engines' calls
    that still run. An error ends it: it is raised once, by the read that meets it.

    Attributes:
        id: the request's, as clients see it.
        model: the name of the model that answers.
        prompts: token ids of each prompt.
        observer: awaited with each event before the reader gets it; None: there is none.
    """

    def __init__(
        self,
        turn: Turn,
        dispatcher: Dispatcher,
        metrics: GatewayMetrics,
        ticket: Ticket,
        encoding: HarmonyEncoding,
    ) -> None:
        """
        Args:
            ticket: given back when the generation is over.
        """
        self._encoding = encoding
        self.id = turn.id
        self.model = turn.model
        self.created_unix_s = int(time.time())
        self.prompts = turn.prompts
        self.observer: Callable[[GenerationEvent], Awaitable[None]] | None = None
        self._turn = turn
        self._jobs = turn.jobs
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._ticket = ticket
        self._events: asyncio.Queue[ChoiceEvent | Exception] = asyncio.Queue(_QUEUE_SIZE)
        self._first: deque[GenerationEvent] = deque()
        self._num_unfinished = len(self._jobs)
        self._usage_sent = False
        self._refused = False
        self._counted_prompts: set[int] = set()
        self._first_token_s: float | None = None
        self._last_token_s = 0.0
        self._closing: asyncio.Task[None] | None = None
        self._tasks = [asyncio.create_task(self._run(job)) for job in self._jobs]

    async def begin(self) -> None:
        """Wait for the first event that a client sees, so that a request that cannot be served
        fails here and not in its stream.

        Raises:
            CantataError: as iterating does; the generation is closed then.
        """
        while True:
            event = await self._next()
            self._first.append(event)
            if not isinstance(event, ChoiceDelta) or shows(event.event):
                return

    def __aiter__(self) -> "Generation":
        return self

    async def __anext__(self) -> GenerationEvent:
        event = self._first.popleft() if self._first else await self._next()
        if self.observer is not None:
            await self.observer(event)
        return event

    async def aclose(self) -> None:
        """Stop all running work; returns when the engines' calls are cancelled. Harmless when
        called again."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        # Shielded: a second cancellation of the caller does not leave calls open.
        await asyncio.shield(self._closing)

    async def _next(self) -> GenerationEvent:
        if self._num_unfinished:
            try:
                event = await self._events.get()
            except asyncio.CancelledError:
                self._cancel()
                raise
            if isinstance(event, Exception):
                self._num_unfinished, self._usage_sent = 0, True
                # Every replica refused it: no generation, and its waiting time would tell nothing
                # about those that were served.
                began = any(job.choice.num_tokens for job in self._jobs)
                self._refused = isinstance(event, CantataError) and event.retry_elsewhere and not began
                await self.aclose()
                raise event
            if isinstance(event, ChoiceFinish):
                self._num_unfinished -= 1
                self._metrics.finished_choices.labels(event.reason).inc()
            return event
        if self._usage_sent:
            raise StopAsyncIteration
        self._usage_sent = True
        await self.aclose()
        return self.usage()

    def usage(self) -> Usage:
        """Return the token counts so far."""
        cached = {job.prompt_index: job.choice.num_cached_tokens for job in reversed(self._jobs)}
        return Usage(
            prompt_tokens=sum(map(len, self.prompts)),
            cached_tokens=sum(cached.values()),
            completion_tokens=sum(job.choice.num_tokens for job in self._jobs),
            reasoning_tokens=sum(job.choice.num_reasoning_tokens for job in self._jobs),
        )

    def prompt_logprobs(self, prompt: int = 0, *, with_first: bool = False) -> Iterator[TokenLogprob]:
        """Yield the log-probabilities of a prompt's tokens, once its first choice has begun, with
        offsets in the prompt's text.

        Args:
            prompt: index of the prompt.
            with_first: begin with the first token, whose log-probability is then no matter; else
                with the second.
        """
        job = next(job for job in self._jobs if job.prompt_index == prompt)
        return prompt_token_logprobs(
            self._encoding,
            self.prompts[prompt],
            job.choice.prompt_logprobs,
            skip_special_tokens=job.choice.skips_special_tokens,
            with_first=with_first,
        )

    def times_s(self) -> tuple[float, float]:
        """Return the seconds from the request's arrival to its first token, and from there to its
        newest."""
        first = self._first_token_s
        return (0.0, 0.0) if first is None else (first - self._turn.arrived, self._last_token_s - first)

    async def _run(self, job: Job) -> None:
        journal = job.journal
        try:
            if journal is not None:
                for event in job.choice.push(journal.begun):
                    await self._events.put(event)
                if job.choice.finished:
                    return
            async with aclosing(
                self._dispatcher.stream(job.request, self._turn.deadline, job.hint)
            ) as outputs:
                previous: float | None = None
                async for output in outputs:
                    previous = self._observe(len(output.token_ids), previous)
                    if journal is not None:
                        await journal.keep(output)
                    for event in self._push(job, output):
                        await self._events.put(event)
                    if job.choice.finished:
                        return
            raise CantataError("The engine's answer ended without a finish reason.")
        except Exception as error:  # handed to the reader, which is the request's edge
            if isinstance(error, InvalidRequest) and (error.param or "").startswith("constraint"):
                error.param = self._turn.constrained_by  # engines have another name for it
            await self._events.put(error)

    def _push(self, job: Job, output: EngineOutput) -> list[ChoiceEvent]:
        """Have the choice read an output, and count it now: a rate over long answers must not jump
        at their end."""
        choice, metrics = job.choice, self._metrics
        num_tokens, num_reasoning = choice.num_tokens, choice.num_reasoning_tokens
        events = choice.push(output)
        if job.prompt_index not in self._counted_prompts:
            self._counted_prompts.add(job.prompt_index)
            metrics.prompt_tokens.inc(len(self.prompts[job.prompt_index]))
            metrics.cached_tokens.inc(choice.num_cached_tokens)
        metrics.output_tokens.inc(choice.num_tokens - num_tokens)
        metrics.reasoning_tokens.inc(choice.num_reasoning_tokens - num_reasoning)
        return events

    def _observe(self, num_tokens: int, previous: float | None) -> float | None:
        if not num_tokens:
            return previous
        now = self._last_token_s = time.monotonic()
        if self._first_token_s is None:
            self._first_token_s = now
        if previous is None:
            self._metrics.time_to_first_token.observe(now - self._turn.arrived)
        else:
            for _ in range(num_tokens):
                self._metrics.inter_token.observe((now - previous) / num_tokens)
        return now

    def _cancel(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _close(self) -> None:
        self._cancel()
        try:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        finally:
            if not self._refused:
                self._record()
            self._ticket.give_back()

    def _record(self) -> None:
        self._metrics.duration.observe(time.monotonic() - self._turn.arrived)
        for job in self._jobs:
            self._metrics.reasoning_cuts.inc(job.choice.reasoning_was_cut)
            for kind, count in job.choice.repairs.items():
                self._metrics.repairs.labels(kind).inc(count)
