"""A gRPC engine without a model: it answers each Generate with a script, and records requests and
cancellations."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace

import grpc.aio

from workers.constraint.registry import KnownAutomata
from workers.engine.access import SecretInterceptor
from workers.errors import CantataError
from workers.request import EngineLoad, EngineOutput, EngineRequest, FinishReason, TokenLogprobs
from workers.rpc import convert, engine_pb2, engine_pb2_grpc

METRICS_TEXT = """# HELP cantata_engine_preemptions_total Sequences that lost their blocks.
# TYPE cantata_engine_preemptions_total counter
cantata_engine_preemptions_total 3.0
"""


@dataclass
class Script:
    """The script of one sequence.

    Attributes:
        token_ids: the generated tokens; cut at the request's max_tokens with reason `length`.
        finish: reason after the last token; `stop` names it as the stop token if it is one of the
            request's.
        per_message: number of tokens in each message.
        gate: event awaited after `gate_after` tokens.
        refusal: error with which the call fails before its first token.
        break_after: number of tokens after which the call fails with `failure`.
        num_cached_tokens: count reported with the first message.
    """

    token_ids: Sequence[int] = ()
    finish: FinishReason = "stop"
    per_message: int = 1
    gate: asyncio.Event | None = None
    gate_after: int = 0
    refusal: CantataError | None = None
    break_after: int | None = None
    failure: CantataError | None = None
    num_cached_tokens: int = 0


@dataclass
class FakeEngine:
    """A fake engine. Serve it with `start`; set `answer` to choose the script of each request.

    Attributes:
        requests: in order of arrival; `messages` also has refused ones.
        cancelled: request id → monotonic time at which its call was seen to be cancelled.
        secret: what each call must carry; empty: nothing.
        gate_of_load: event awaited before GetLoad is answered.
        arrivals, cancellations: set whenever a call arrives or is cancelled.
    """

    max_model_len: int = 1024
    vocab_size: int = 2048
    answer: Callable[[EngineRequest], Script] = lambda request: Script()
    accepting: bool = True
    gate_of_load: asyncio.Event | None = None
    metrics_text: str = METRICS_TEXT
    requests: list[EngineRequest] = field(default_factory=list)
    cancelled: dict[str, float] = field(default_factory=dict)
    arrivals: asyncio.Event = field(default_factory=asyncio.Event)
    cancellations: asyncio.Event = field(default_factory=asyncio.Event)
    num_open: int = 0
    max_open: int = 0
    address: str = ""
    start_id: str = ""
    secret: str = ""
    capabilities: tuple[str, ...] = convert.CAPABILITIES
    automata: KnownAutomata = field(default_factory=KnownAutomata)
    messages: list[engine_pb2.GenerateRequest] = field(default_factory=list)
    _server: grpc.aio.Server | None = None

    async def start(self) -> "FakeEngine":
        self._server = grpc.aio.server(interceptors=[SecretInterceptor(self.secret)] if self.secret else None)
        engine_pb2_grpc.add_EngineServicer_to_server(_Servicer(self), self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        self.address = f"127.0.0.1:{port}"
        return self

    async def arrived(self, count: int) -> None:
        """Wait until this many requests have arrived."""
        while len(self.requests) < count:
            self.arrivals.clear()
            await self.arrivals.wait()

    async def was_cancelled(self, count: int) -> None:
        """Wait until this many calls were cancelled."""
        while len(self.cancelled) < count:
            self.cancellations.clear()
            await self.cancellations.wait()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    def info(self) -> convert.EngineInfo:
        return convert.EngineInfo(
            "0.1.0",
            "fake",
            "fp_fake",
            self.max_model_len,
            self.vocab_size,
            16,
            "cpu",
            "float32",
            4096,
            1,
            self.start_id,
            self.capabilities,
        )


class _Servicer(engine_pb2_grpc.EngineServicer):
    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine

    async def Generate(
        self, message: engine_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[engine_pb2.GenerateResponse]:
        engine = self._engine
        engine.num_open += 1
        engine.max_open = max(engine.max_open, engine.num_open)
        try:
            engine.messages.append(message)
            request = convert.request_from_wire(
                message,
                vocab_size=engine.vocab_size,
                deadline_s=context.time_remaining(),
                automata=engine.automata,
            )
            engine.requests.append(request)
            engine.arrivals.set()
            script = engine.answer(request)
            if script.refusal is None:
                await context.send_initial_metadata(convert.TAKEN_METADATA)
            async for output in _play(script, request):
                yield convert.output_to_wire(output)
        except CantataError as error:
            await context.abort(
                grpc.StatusCode[error.status], error.message, convert.error_to_metadata(error)
            )
        except (
            asyncio.CancelledError,
            GeneratorExit,
        ):  # the latter when grpc drops the stream while it sends
            engine.cancelled[message.request_id] = time.monotonic()
            engine.cancellations.set()
            raise
        finally:
            engine.num_open -= 1

    async def GetInfo(
        self, request: engine_pb2.GetInfoRequest, context: grpc.aio.ServicerContext
    ) -> engine_pb2.EngineInfo:
        return convert.info_to_wire(self._engine.info())

    async def GetLoad(
        self, request: engine_pb2.GetLoadRequest, context: grpc.aio.ServicerContext
    ) -> engine_pb2.EngineLoad:
        if self._engine.gate_of_load is not None:
            await self._engine.gate_of_load.wait()
        return convert.load_to_wire(EngineLoad(self._engine.num_open, 0, 0.0, self._engine.accepting))

    async def GetMetrics(
        self, request: engine_pb2.GetMetricsRequest, context: grpc.aio.ServicerContext
    ) -> engine_pb2.MetricsText:
        return engine_pb2.MetricsText(text=self._engine.metrics_text)


async def _play(script: Script, request: EngineRequest) -> AsyncIterator[EngineOutput]:
    if script.refusal is not None:
        raise script.refusal
    limit = request.sampling.max_tokens or len(script.token_ids)
    ids = tuple(script.token_ids)[:limit]
    finish: FinishReason = "length" if len(ids) == limit and limit < len(script.token_ids) else script.finish
    position = 0
    while position < len(ids):
        if script.gate is not None and position >= script.gate_after:
            await script.gate.wait()
        if script.break_after is not None and position >= script.break_after:
            assert script.failure is not None
            raise script.failure
        step = ids[position : position + script.per_message]
        if script.gate is not None and position < script.gate_after:
            step = step[: script.gate_after - position]
        position += len(step)
        output = EngineOutput(
            step,
            _logprobs(step, request),
            num_cached_tokens=script.num_cached_tokens if position == len(step) else 0,
            prompt_logprobs=_prompt_logprobs(request) if position == len(step) else (),
        )
        if position < len(ids):
            yield output
            continue
        stopped = (
            finish == "stop"
            and step[-1] in request.sampling.stop_token_ids
            and not request.sampling.ignore_eos
        )
        error = "scripted" if finish in ("abort", "error") else None
        yield replace(output, finish_reason=finish, stop_token_id=step[-1] if stopped else None, error=error)


def _prompt_logprobs(request: EngineRequest) -> tuple[TokenLogprobs, ...]:
    """Return -1 for each prompt token from the second on, if they are asked for."""
    asked = request.sampling.prompt_logprobs is not None
    return (TokenLogprobs(-1.0),) * (len(request.prompt_token_ids) - 1 if asked else 0)


def _logprobs(ids: Sequence[int], request: EngineRequest) -> tuple[TokenLogprobs, ...]:
    """Return -0.5 for the chosen token, -1, -2 … for alternatives: the chosen token and the ids
    after it."""
    count = request.sampling.logprobs
    if count is None:
        return ()
    return tuple(
        TokenLogprobs(-0.5, tuple((token_id + other, -0.5 - other) for other in range(count)))
        for token_id in ids
    )
