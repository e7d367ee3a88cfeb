"""Background responses: made without a client, by any gateway that lives."""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from cluster.frontend.errors import as_cantata_error
from cluster.frontend.responses.events import ResponseEvents
from cluster.frontend.responses.items import REASONING
from cluster.frontend.responses.prior import Prior
from cluster.frontend.responses.replay import record_of, stored_form
from cluster.frontend.responses.request import Asked, asked_response
from cluster.frontend.responses.schema import ResponsesRequest
from cluster.frontend.responses.schema_items import Item
from cluster.frontend.responses.views import Json, unix_s
from cluster.generation import MAX_ENGINE_DEATHS, Journal
from cluster.generation.threads import INLINE_CHARS
from cluster.state import responses as stored
from cluster.state.background import MAX_ATTEMPTS, Background, Progress
from cluster.state.conversations import StoredTurns
from cluster.state.errors import StateFull, StateUnavailable
from cluster.state.rows import StoredItem
from cluster.state.state import State
from cluster.state.token_writer import TokenWriter
from workers.errors import CantataError, NoReplica, Overloaded
from workers.request import EngineOutput, TokenLogprobs

if TYPE_CHECKING:
    from cluster.frontend.responses.routes import ResponsesApi

_log = logging.getLogger(__name__)

TURN_S = 2.0
"""Seconds between two times at which a gateway says that it lives."""
MAX_RUNNING = 2048
"""Maximum number of background responses of one gateway."""
_CANCEL_S, _CANCEL_POLL_S = 4 * TURN_S, 0.05
"""Seconds that a cancellation waits for the response's end, and between two looks at it."""
_LONGEST_WAIT_S = 30.0
_MAX_WAITS = 30
"""Longest seconds between two attempts to have a response generated, and how many there are."""
_ITEMS: TypeAdapter[list[Item]] = TypeAdapter(list[Item])


@dataclass
class _Run:
    """A response that is being made.

    Attributes:
        events: hold what has been made so far.
        is_cancelled: by a client; else a task that is cancelled leaves its response to others.
        is_ending: its end is being stored, which no client can cancel.
    """

    progress: Progress
    events: ResponseEvents
    task: "asyncio.Task[None] | None" = None
    is_cancelled: bool = False
    is_ending: bool = False


class BackgroundRuns:
    """The background responses that one gateway makes. Its state runs and closes it."""

    def __init__(self, api: "ResponsesApi", state: State) -> None:
        self._api = api
        self._state = state
        self.background: Background = state.background
        self._runs: dict[str, _Run] = {}
        self._is_closed = False
        self.writer = TokenWriter(state.background, self._stop)

    async def begin(self, asked: Asked, prior: Prior, given: ResponsesRequest, owner: str) -> Json:
        """Store a response and begin to make it; return the Response object.

        Raises:
            CantataError: the request is wrong.
            Overloaded: too many are running.
            NoReplica: this gateway is stopping.
            ItemTooLarge: an item of the input is too large.
            StateUnavailable: the database does not answer.
        """
        self._api.service.check_chat(asked.chat)
        if self._is_closed:
            raise NoReplica("This gateway is stopping; retry.")
        if len(self._runs) >= MAX_RUNNING:
            raise Overloaded("The server is at capacity for background responses; retry later.", 5.0)
        record = stored.ResponseRecord(
            id=asked.record.id,
            owner=owner,
            created_at=asked.record.created_at,
            request=self._form(asked, given),
            inputs=prior.inputs,
            previous_response_id=prior.previous_response_id,
            conversation_id=prior.conversation_id,
            conversation_position=prior.conversation_position,
        )
        begun = await self.background.begin(record)
        if not self._is_closed:  # else another gateway takes it over
            self._start(begun)
        return asked.record.response("queued")

    async def cancel(self, id: str, owner: str) -> None:
        """End a response, and wait until it has ended, at most as long as another gateway takes to
        notice.

        Raises:
            NotStored: there is none.
        """
        await self.background.ask_to_cancel(id, owner)
        self._cancel(id)
        for _ in range(int(_CANCEL_S / _CANCEL_POLL_S)):
            if (await self._state.responses.get(id, owner)).status not in stored.UNFINISHED:
                return
            await asyncio.sleep(_CANCEL_POLL_S)

    async def run(self) -> None:
        """Make responses until cancelled: those that begin here, and those of gateways that have
        ended."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.writer.run())
            group.create_task(self._turns())

    async def close(self) -> None:
        """Stop all responses that are being made; they can be taken over."""
        self._is_closed = True
        tasks = [run.task for run in self._runs.values() if run.task is not None]
        for id, run in self._runs.items():
            run.is_cancelled = False  # the end would wait for tokens that are not written any more
            self._stop(id)
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _turns(self) -> None:
        while True:
            await asyncio.sleep(TURN_S)
            try:
                turn = await self.background.turn(list(self._runs))
            except (StateUnavailable, StateFull):  # logged where it was noticed
                continue
            except Exception as error:  # the edge of this task; without the text, which may quote data
                _log.error("background responses were not looked after: %s", type(error).__name__)
                continue
            for id in turn.lost:
                self._stop(id)
            for id in turn.cancelled:
                self._cancel(id)
            for progress in turn.taken:
                id = progress.stored.id
                try:
                    self._start(progress)
                    _log.info("response %s is taken over", id)
                except Exception as error:  # of another version, whose gateways may be able to read it
                    _log.error("response %s cannot be taken over: %s", id, type(error).__name__)

    def _cancel(self, id: str) -> None:
        """End a response for a client, unless it is ending."""
        run = self._runs.get(id)
        if run is not None and not run.is_cancelled and not run.is_ending:
            run.is_cancelled = True
            self._stop(id)

    def _stop(self, id: str) -> None:
        """Stop making a response, at once."""
        run = self._runs.get(id)
        if run is not None and run.task is not None:
            run.task.cancel()

    def _start(self, progress: Progress) -> None:
        id = progress.stored.id
        run = self._runs[id] = _Run(progress, self._events(progress))
        run.task = asyncio.create_task(self._make(run))

        def done(_: object) -> None:
            if self._runs.get(id) is run:
                del self._runs[id]
                self.writer.end(id)

        run.task.add_done_callback(done)

    async def _make(self, run: "_Run") -> None:
        """Make a response to its end."""
        id = run.progress.stored.id
        try:
            if run.progress.num_attempts >= MAX_ATTEMPTS:
                raise CantataError("The response was begun several times, and each gateway ended under it.")
            await self._generate_with_patience(run)
        except asyncio.CancelledError:
            if not run.is_cancelled:
                raise
            run.events.cancel()
        except Exception as error:  # the edge of this task
            run.events.fail(as_cantata_error(error, id))
        run.is_ending = True
        await self.writer.flush(id)
        assert run.events.response is not None
        await self._finish(id, run.events.response)

    async def _generate_with_patience(self, run: "_Run") -> None:
        """Generate a response; wait and go on while no engine has room or lives, or the database
        does not answer, without which no end can be stored either."""
        id, owner = run.progress.stored.id, run.progress.stored.owner
        self.writer.begin(id, sum(len(output.token_ids) for output in run.progress.outputs))
        num_waits = num_deaths = 0
        is_again = False
        while True:
            try:
                if is_again:
                    run.progress = await self.background.progress(id, owner)
                    run.events = self._events(run.progress)
                await self._generate(run)
                return
            except (StateUnavailable, StateFull):
                wait_s = TURN_S
            except CantataError as error:
                num_waits += 1
                num_deaths += error.num_deaths
                if not error.retry_elsewhere or num_waits == _MAX_WAITS or num_deaths >= MAX_ENGINE_DEATHS:
                    raise
                wait_s = min(2.0 ** (num_waits - 1), _LONGEST_WAIT_S)
            is_again = True
            await self.writer.flush(id)
            await asyncio.sleep(wait_s)

    async def _generate(self, run: "_Run") -> None:
        id, events = run.progress.stored.id, run.events
        chat = (await self._asked(run.progress)).chat

        async def keep(output: EngineOutput) -> None:
            await self.writer.keep(id, output)

        generation = await self._api.service.chat(chat, id, Journal(keep, joined(run.progress.outputs)))
        events.begin()
        async with aclosing(generation):
            async for event in generation:
                events.add(event)

    async def _finish(self, id: str, response: Json) -> None:
        outputs = [StoredItem(item) for item in response["output"]]
        while True:
            try:
                if not await self.background.finish(id, response["status"], response, outputs):
                    _log.info("response %s was taken over by another gateway", id)
                return
            except (StateUnavailable, StateFull):
                await asyncio.sleep(TURN_S)
            except CantataError as error:  # its conversation is gone, or an item too large
                _log.warning("response %s cannot be stored: %s", id, type(error).__name__)
                failed = {"code": "server_error", "message": error.message}
                response = {**response, "status": "failed", "output": [], "error": failed}
                outputs = []

    def _events(self, progress: Progress) -> ResponseEvents:
        seals, form = self._api.seals(progress.stored.owner), progress.stored.request
        return ResponseEvents(record_of(form), unix_s, lambda text: seals.seal(text, REASONING))

    def _form(self, asked: Asked, given: ResponsesRequest) -> Json:
        """Return all that another gateway needs to go on."""
        prompts = self._api.service.prompts
        return {
            **stored_form(asked),
            "body": given.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude={"input"}),
            "seed": asked.chat.sampling.seed,
            "date": prompts.date(),
            "effort": asked.chat.reasoning_effort or prompts.defaults.reasoning_effort,
        }

    async def _asked(self, progress: Progress) -> Asked:
        """Return what a stored response asks for, with what precedes it."""
        found = progress.stored
        form, inputs = found.request, await self._state.responses.inputs(found.id, found.owner)
        turns = StoredTurns(())
        if found.previous_response_id is not None:
            turns = await self._state.responses.history(found.previous_response_id, found.owner)
        elif found.conversation_id is not None:
            turns = await self._state.conversations.history(
                found.conversation_id, found.owner, before=found.conversation_position
            )
        num_bytes = turns.num_bytes + sum(len(str(item.body)) for item in inputs)

        def convert() -> Asked:
            items = _ITEMS.validate_python([item.body for item in (*turns.items, *inputs)])
            body = ResponsesRequest.model_validate({**form["body"], "seed": form["seed"]})
            asked = asked_response(
                body.model_copy(update={"input": items}),
                num_bytes,
                self._api.seals(found.owner),
                id=found.id,
                created_at=found.created_at,
                model=self._api.service.served.info.id,
                num_before=len(turns.items),
            )
            chat = replace(asked.chat, current_date=form["date"], reasoning_effort=form["effort"])
            return replace(asked, chat=chat)

        # In a thread, however short the items: the body can have a grammar that takes long.
        return await self._api.service.prompts.threads.run(max(num_bytes, INLINE_CHARS + 1), convert)


def joined(outputs: Sequence[EngineOutput]) -> EngineOutput:
    """Return the outputs of one sequence as one."""
    ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    for output in outputs:
        ids += output.token_ids
        logprobs += output.logprobs
    last: dict[str, Any] = {}
    if outputs:
        last = {
            "finish_reason": outputs[-1].finish_reason,
            "stop_token_id": outputs[-1].stop_token_id,
            "num_cached_tokens": outputs[0].num_cached_tokens,
        }
    return EngineOutput(tuple(ids), tuple(logprobs), **last)
