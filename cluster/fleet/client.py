"""Calls to engines: one channel per address, kept open. Failures are raised as the classes of
`workers.errors`."""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace
from functools import partial
from typing import NoReturn, TypedDict

import grpc.aio

from cluster.fleet.probe import Patience, ReplicaWatch
from cluster.fleet.table import Replica
from workers.engine.access import authorization
from workers.errors import (
    CantataError,
    ConstraintNotReady,
    DeadlineExceeded,
    EngineDead,
    InvalidRequest,
    NoReplica,
    UnknownAutomaton,
)
from workers.request import EngineLoad, EngineOutput, EngineRequest
from workers.rpc import convert, engine_pb2, engine_pb2_grpc

logger = logging.getLogger(__name__)

_CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", convert.MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", convert.MAX_MESSAGE_BYTES),
    # While calls are open, a host that vanishes without closing its connections is noticed within
    # 40 s.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # A dead address fails a call in about a second instead of gRPC's twenty, and is retried soon.
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # The dispatcher retries, because it knows other replicas. Proxies in the environment are for
    # the internet.
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
)

_INFO_TIMEOUT_S = 5.0
_MAX_SENT_IDS = 4096
"""Maximum number of automata remembered as sent, per replica (400 kB)."""


class RecentIds:
    """Ids of the automata that a replica was sent; the least recently used is forgotten first."""

    def __init__(self, max_ids: int = _MAX_SENT_IDS) -> None:
        self._max_ids = max_ids
        self._ids: OrderedDict[bytes, None] = OrderedDict()

    def use(self, automaton_id: bytes) -> bool:
        """Record that an automaton is sent or named now; return whether it was recorded before."""
        was_sent = automaton_id in self._ids
        self._ids[automaton_id] = None
        self._ids.move_to_end(automaton_id)
        if len(self._ids) > self._max_ids:
            self._ids.popitem(last=False)
        return was_sent


class EngineClient:
    """The gRPC client for a gateway's engines; one per gateway. Belongs to the event loop in which
    it is used.

    Args:
        on_silence: called with True when a replica with calls from here does not answer, with False
            when it answers again.

    Attributes:
        on_constraint_left_out: called when a sequence runs without its optional constraint: with
            `engine_version` because the replica's version lacks what that needs, with `engine`
            because the replica refused it, had it not ready in time, or could not go on with it.
    """

    def __init__(
        self,
        on_silence: Callable[[Replica, bool], object] = lambda replica, silent: None,
        patience: Patience | None = None,
    ) -> None:
        self._closed = False
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._watches: dict[Replica, ReplicaWatch] = {}
        self._capabilities: dict[Replica, frozenset[str]] = {}
        self._sent: dict[Replica, RecentIds] = {}
        self.on_constraint_left_out: Callable[[str], object] = lambda reason: None
        self._on_silence = on_silence
        self._patience = patience or Patience()

    async def generate(self, replica: Replica, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        """Run a sequence. Closing the generator, or cancelling the task that reads it, cancels it
        in the engine at once.

        Raises:
            CantataError: the engine's error; EngineDead (which says whether the engine had accepted
                the request) if it cannot be reached, stops answering, or its stream ends early;
                NoReplica if its version lacks what the request needs.
        """
        capabilities: frozenset[str] = frozenset()
        wanted = convert.capabilities_of(request)
        if wanted or request.priority or request.constraint is not None:
            capabilities = await self._capabilities_of(replica)
        optional = request.constraint is not None and request.constraint.optional
        if missing := wanted - capabilities:
            if not optional or not convert.OF_CONSTRAINTS.issuperset(missing):
                raise NoReplica(f"The replica's version does not support {', '.join(sorted(missing))}.")
            self.on_constraint_left_out("engine_version")
            request = convert.without_constraint(request)
        if not optional or request.constraint is None:
            async with aclosing(self._generate(replica, request, capabilities)) as outputs:
                async for output in outputs:
                    yield output
            return
        sent = _Progress(request)
        try:
            async with aclosing(self._generate(replica, request, capabilities)) as outputs:
                async for output in outputs:
                    sent.add(output)
                    yield output
            return
        except InvalidRequest as error:
            # Before the first token, or where a text cannot go on.
            if (error.param or "").partition(".")[0] != "constraint":
                raise
        except ConstraintNotReady:
            pass
        self.on_constraint_left_out("engine")
        async with aclosing(self._generate(replica, sent.rest(), capabilities)) as outputs:
            async for output in outputs:
                yield sent.unsent(output)

    async def _generate(
        self, replica: Replica, request: EngineRequest, capabilities: frozenset[str]
    ) -> AsyncGenerator[EngineOutput, None]:
        """Run a sequence; its automaton is sent if the engine does not know it."""
        by_reference = convert.CONSTRAINT_REF in capabilities
        sent = self._sent.setdefault(replica, RecentIds()) if by_reference else None
        knows = request.constraint is not None and sent is not None and sent.use(request.constraint.id)
        with_priority = convert.PRIORITY in capabilities
        message = convert.request_to_wire(
            request, by_reference=by_reference, with_body=not knows, with_priority=with_priority
        )
        try:
            async with aclosing(self._call(replica, message, request.deadline_s)) as outputs:
                async for output in outputs:
                    yield output
            return
        except UnknownAutomaton:
            # The engine has forgotten this automaton; the sequence has produced nothing yet.
            if not knows:
                raise
        message = convert.request_to_wire(request, by_reference=True, with_priority=with_priority)
        async with aclosing(self._call(replica, message, request.deadline_s)) as outputs:
            async for output in outputs:
                yield output

    async def _call(
        self, replica: Replica, message: engine_pb2.GenerateRequest, deadline_s: float | None
    ) -> AsyncGenerator[EngineOutput, None]:
        call = self._stub(replica).Generate(
            message, timeout=deadline_s, metadata=authorization(replica.secret)
        )
        watch = self._watch(replica)
        watch.add(call)
        try:
            with _failures():
                async for response in call:
                    output = convert.output_from_wire(response)
                    yield output
                    if output.finish_reason is not None:
                        return
            raise EngineDead("The replica that served this request ended its stream early; try again.")
        except EngineDead as error:
            # An engine that has accepted a request sends its initial metadata at once.
            error.under_request = call.done() and bool(await call.initial_metadata())
            raise
        finally:
            watch.discard(call)
            call.cancel()

    async def info(self, replica: Replica, timeout_s: float) -> convert.EngineInfo:
        """Return what the replica serves."""
        with _failures():
            answer = await self._stub(replica).GetInfo(
                engine_pb2.GetInfoRequest(), **_options(replica, timeout_s)
            )
        info = convert.info_from_wire(answer)
        self._capabilities[replica] = frozenset(info.capabilities)
        return info

    async def _capabilities_of(self, replica: Replica) -> frozenset[str]:
        if replica not in self._capabilities:
            await self.info(replica, _INFO_TIMEOUT_S)
        return self._capabilities[replica]

    async def load(self, replica: Replica, timeout_s: float) -> EngineLoad:
        """Return the replica's load."""
        with _failures():
            return convert.load_from_wire(
                await self._stub(replica).GetLoad(engine_pb2.GetLoadRequest(), **_options(replica, timeout_s))
            )

    async def metrics(self, replica: Replica, timeout_s: float) -> str:
        """Return the replica's metrics in Prometheus' text format."""
        with _failures():
            return (
                await self._stub(replica).GetMetrics(
                    engine_pb2.GetMetricsRequest(), **_options(replica, timeout_s)
                )
            ).text

    async def forget(self, replica: Replica) -> None:
        """Close the channel of a replica that will not return."""
        self._capabilities.pop(replica, None)
        self._sent.pop(replica, None)
        watch = self._watches.pop(replica, None)
        if watch is not None:
            watch.stop()
        channel = self._channels.pop(replica.address, None)
        if channel is not None:
            await channel.close(None)

    async def close(self) -> None:
        """Close all channels. Open and later calls end with EngineDead and no stream is resumed."""
        self._closed = True
        for watch in self._watches.values():
            watch.stop()
        self._watches.clear()
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            await channel.close(None)

    def _watch(self, replica: Replica) -> ReplicaWatch:
        watch = self._watches.get(replica)
        if watch is None:
            ask, on_silence = partial(self.load, replica), partial(self._note_silence, replica)
            watch = self._watches[replica] = ReplicaWatch(ask, on_silence, self._patience)
        return watch

    def _note_silence(self, replica: Replica, silent: bool) -> None:
        logger.warning(
            "replica %s %s",
            replica.id,
            f"has not answered for {self._patience.suspect_s:g} s" if silent else "answers again",
        )
        self._on_silence(replica, silent)

    def _stub(self, replica: Replica) -> "engine_pb2_grpc.EngineAsyncStub":
        if self._closed:
            raise EngineDead("This server is shutting down; try again.", under_request=False)
        channel = self._channels.get(replica.address)
        if channel is None:
            channel = self._channels[replica.address] = grpc.aio.insecure_channel(
                replica.address, options=_CHANNEL_OPTIONS
            )
        return engine_pb2_grpc.EngineStub(channel)


class _Progress:
    """What the reader of a sequence has got, for a second call that goes on from there without the
    constraint."""

    def __init__(self, request: EngineRequest) -> None:
        self._request = request
        self._started_s = time.monotonic()
        self._token_ids: list[int] = []
        self._num_prompt_logprobs = 0

    def add(self, output: EngineOutput) -> None:
        self._token_ids += output.token_ids
        self._num_prompt_logprobs += len(output.prompt_logprobs)

    def rest(self) -> EngineRequest:
        """Return the request of the rest of the sequence, within what is left of its deadline.

        Raises:
            DeadlineExceeded: nothing is left.
        """
        request = convert.without_constraint(self._request)
        left_s = request.deadline_s
        if left_s is not None:
            left_s -= time.monotonic() - self._started_s
            if left_s <= 0:
                raise DeadlineExceeded("The request's deadline passed before its last token.")
        output_token_ids = (*request.output_token_ids, *self._token_ids)
        return replace(request, output_token_ids=output_token_ids, deadline_s=left_s)

    def unsent(self, output: EngineOutput) -> EngineOutput:
        """Return an output of the second call without what came with the first: the prompt's
        log-probabilities, and the number of cached tokens, which now would count the output's."""
        num_again = min(self._num_prompt_logprobs, len(output.prompt_logprobs))
        self._num_prompt_logprobs -= num_again
        num_cached_tokens = 0 if self._token_ids else output.num_cached_tokens
        return replace(
            output,
            prompt_logprobs=output.prompt_logprobs[num_again:],
            num_cached_tokens=num_cached_tokens,
        )


@contextmanager
def _failures() -> Iterator[None]:
    """Convert the failures of a call to the classes of `workers.errors`."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        _raise(error)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        # Not our own cancellation: gRPC raises this when a channel is closed during a call.
        raise EngineDead("The replica that served this request is gone; try again.") from None


def _raise(error: grpc.aio.AioRpcError) -> NoReturn:
    status = error.code().name
    trailing: Iterable[tuple[str, str | bytes]] = error.trailing_metadata() or ()  # type: ignore[assignment]
    metadata = {key: value for key, value in trailing if isinstance(value, str)}
    if status == "UNAVAILABLE" or (status == "CANCELLED" and convert.ERROR_CLASS_KEY not in metadata):
        # gRPC's text contains addresses. A cancellation that is not ours means that the server is
        # stopping.
        raise EngineDead(
            "The replica that served this request is gone or shutting down; try again."
        ) from error
    if status == "UNAUTHENTICATED":
        # The secret belongs to the listed engine: another process has its port by now.
        raise EngineDead("The replica that was to serve this request is gone; try again.") from error
    if status == "DEADLINE_EXCEEDED":
        raise DeadlineExceeded("The request's deadline passed before its last token.") from error
    if convert.ERROR_CLASS_KEY not in metadata and status != "RESOURCE_EXHAUSTED":
        raise CantataError(f"The engine answered {status}.") from error
    raise convert.error_from_status(
        status, error.details() or f"The engine answered {status}.", metadata
    ) from error


def _options(replica: Replica, timeout_s: float) -> "_CallOptions":
    return {"timeout": timeout_s, "metadata": authorization(replica.secret)}


class _CallOptions(TypedDict):
    timeout: float
    metadata: tuple[tuple[str, str], ...]
