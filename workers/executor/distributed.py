"""DistributedExecutor: the engine's side of several ranks, however they are started.

Start-up: every rank sends a hello (version, checkpoint), then all join, load, allocate one KV plan,
and are ready. Plans then go to all ranks and rank 0's results come back. A rank that dies, reports
a failure, or exceeds the step timeout ends the executor: open futures get an error result, the
engine is notified, and the ranks are killed, since they cannot work without it.
"""

import logging
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from functools import partial
from typing import NamedTuple

import msgpack
import numpy as np
import torch
from torch import Tensor

from workers.config import EngineConfig, ModelConfig
from workers.config_json import engine_config_to_json
from workers.errors import CheckpointError, ConfigError, EngineDead, RankCrashed
from workers.executor import channel as wire
from workers.executor.base import MAX_IN_FLIGHT, ExecutorInfo
from workers.executor.channel import EngineChannel
from workers.executor.launcher import RankLauncher
from workers.kv_cache.memory import KVCachePlan, KVMemory, plan_kv_cache
from workers.parallel.shard import plan_shards
from workers.rank.process import RankSpec, identity
from workers.rank.rank import LOAD_TIMEOUT_S, Progress, RankLoaded
from workers.scheduler.masks import masks_failed, masks_late
from workers.scheduler.plan import StepMasks, StepPlan, StepResult
from workers.scheduler.plan_wire import decode_result, encode_masks, encode_plan

logger = logging.getLogger(__name__)

_STOP_S = 5.0
"""Seconds for ranks to end by themselves."""
_CONNECT_S = 10.0
"""Seconds for a rank that sent its hello to connect its other socket."""
_EXPLANATION_S = 0.05
"""Seconds for a rank's watcher to report how the rank ended once the others have noticed. Requests
should end within 0.1 s."""
_POLL_S = 0.5
_ALIVE_S = 1.0
"""Seconds between two heartbeats to listening ranks. A rank that receives none for long considers
its engine lost."""


class _Flight(NamedTuple):
    """A step in flight; `masks` is None if it awaits none."""

    plan: StepPlan
    result: "Future[StepResult]"
    masks: "Future[StepMasks] | None"


class DistributedExecutor:
    """Runs plans on several ranks.

    Args:
        progress: called with each phase of each rank, on the starting thread.
        clock: returns monotonic seconds, by which steps are timed.
    Attributes:
        crash: see Executor.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: ModelConfig,
        launcher: RankLauncher,
        *,
        progress: Progress | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.crash: RankCrashed | None = None
        self._config = config
        self._model = model
        self._launcher = launcher
        self._progress = progress or (lambda phase, done, total: None)
        self._clock = clock
        self._size = config.parallel.tensor
        self._channel: EngineChannel | None = None
        self._receiver = threading.Thread(target=self._receive, name="cantata-results", daemon=True)
        self._stopping = threading.Event()
        self._failed = threading.Event()
        self._heartbeats = _Heartbeats()
        # Guarded by _lock.
        self._lock = threading.Lock()
        self._error: str | None = None
        self._one_has_ended = False
        self._in_flight: deque[_Flight] = deque()
        self._oldest_since_s = 0.0
        self._logits: Future[Tensor] | None = None
        self._on_failure: Callable[[str], None] = lambda sentence: None

    def on_failure(self, callback: Callable[[str], None]) -> None:
        """Register a failure callback (see Executor)."""
        self._on_failure = callback

    def start(self) -> ExecutorInfo:
        """Start the ranks and wait until all are ready.

        Raises:
            CheckpointError, ConfigError (including RankCrashed): one sentence for the user.
        """
        shards = plan_shards(self._model, self._config.parallel)
        try:
            return self._start(shards[0].tp_size)
        except EngineDead as error:
            self.shutdown()
            # When a rank crashes, others fail as well, and their errors may have arrived first.
            raise self.crash or ConfigError(error.message) from error
        except BaseException:
            self.shutdown()
            raise

    def execute(self, plan: StepPlan, masks: "Future[StepMasks] | None" = None) -> "Future[StepResult]":
        """Send the plan to all ranks, and its masks to rank 0 once they are there."""
        future: Future[StepResult] = Future()
        with self._lock:
            if self._error is not None or self._channel is None:
                future.set_result(StepResult(plan.step, error=self._error or "the executor has shut down"))
                return future
            assert len(self._in_flight) < MAX_IN_FLIGHT, "more plans in flight than ranks look ahead"
            if not self._in_flight:
                self._oldest_since_s = self._clock()
            self._in_flight.append(_Flight(plan, future, masks))
            body = encode_plan(plan)
            for rank in range(self._size):
                self._channel.send(rank, wire.PLAN, body)
        if masks is not None:
            masks.add_done_callback(partial(self._send_masks, plan.step))
        return future

    def _send_masks(self, step: int, masks: "Future[StepMasks]") -> None:
        """Send masks to the rank that samples; called from any thread."""
        error = masks.exception()
        if isinstance(error, EngineDead):  # the engine's loop has ended, and shuts down this executor
            return
        if error is not None:
            self._fail(masks_failed(step, error))
            return
        body = encode_masks(masks.result())
        with self._lock:
            if self._channel is not None:
                self._channel.send(0, wire.MASKS, body)

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Compute the logits of one sequence (see Executor).

        Raises:
            EngineDead: a rank failed.
        """
        future: Future[Tensor] = Future()
        with self._lock:
            if self._error is not None or self._channel is None:
                raise EngineDead(self._error or "the executor has shut down")
            assert self._logits is None, "one thread at a time asks for logits"
            self._logits = future
            for rank in range(self._size):
                self._channel.send(rank, wire.COMPUTE_LOGITS, msgpack.packb(list(token_ids)))
        return future.result()

    def shutdown(self) -> None:
        """End the ranks; idempotent."""
        self._stopping.set()
        with self._lock:
            self._error = self._error or "the executor has shut down"
            channel, self._channel = self._channel, None
            if channel is not None:
                for rank in range(self._size):
                    channel.send(rank, wire.STOP, b"")
        self._resolve_all(self._error)
        self._launcher.end(0.0 if self._failed.is_set() else _STOP_S)
        if self._receiver.ident is not None:
            self._receiver.join()
        if channel is not None:
            channel.close()

    def _start(self, num_ranks: int) -> ExecutorInfo:
        parallel = self._config.parallel
        started = time.perf_counter()
        placements = self._launcher.place(
            num_ranks, self._config.device, torch.get_num_threads(), parallel.start_timeout_s
        )
        one_host = {placement.host for placement in placements} == {self._launcher.host}
        channel = self._channel = EngineChannel(num_ranks, host=None if one_host else self._launcher.host)
        config = engine_config_to_json(self._config)
        for number, place in enumerate(placements):
            spec = RankSpec(
                config=config,
                rank=number,
                endpoints=channel.endpoints(number),
                host=place.host,
                local_rank=place.local_rank,
                ranks_on_host=place.ranks_on_host,
                num_threads=place.num_threads,
            )
            self._progress(f"start rank {number} on {place.host}", 0, 0)
            self._launcher.launch(spec, partial(self._note_exit, number))
        hellos = self._gather(wire.HELLO, parallel.start_timeout_s, "started")
        _check_hellos(self._config, hellos, self._launcher.host)
        phases_s = {"start ranks": time.perf_counter() - started}
        for number in range(num_ranks):
            channel.send(
                number,
                wire.JOIN,
                wire.pack(host=hellos[0]["host"], port=hellos[0]["store_port"]),
                connect_s=_CONNECT_S,
            )
        loaded = [
            _rank_loaded(body["loaded"])
            for body in self._gather(wire.LOADED, LOAD_TIMEOUT_S, "loaded its weights")
        ]
        shard = plan_shards(self._model, parallel)[0]
        plan = plan_kv_cache(self._config, self._model, shard, [entry.kv_memory for entry in loaded])
        for number in range(num_ranks):
            channel.send(number, wire.ALLOCATE, msgpack.packb(asdict(plan)))
        ready = self._gather(wire.READY, LOAD_TIMEOUT_S, "warmed up")
        self._receiver.start()
        return self._info(loaded, plan, phases_s, ready)

    def _info(
        self,
        loaded: Sequence[RankLoaded],
        plan: KVCachePlan,
        phases_s: dict[str, float],
        ready: Sequence[wire.Body],
    ) -> ExecutorInfo:
        slowest = [body["phases_s"] for body in ready]
        for phase in slowest[0] if isinstance(slowest[0], dict) else ():
            phases_s[phase] = max(float(phases[phase]) for phases in slowest if isinstance(phases, dict))
        return ExecutorInfo(
            device=", ".join(sorted({entry.device for entry in loaded})),
            dtype=self._config.dtype,
            num_ranks=len(loaded),
            max_model_len=plan.max_model_len,
            num_full_blocks=plan.num_full_blocks,
            num_sliding_blocks=plan.num_sliding_blocks,
            kv_cache_bytes=plan.total_bytes * len(loaded),
            weight_bytes=sum(entry.weight_bytes for entry in loaded),
            kernels=loaded[0].kernels,
            phases_s=phases_s,
        )

    def _gather(self, wanted: bytes, timeout_s: float, doing: str) -> list[wire.Body]:
        """Receive one message of a kind from every rank; return them by rank.

        Raises:
            CheckpointError, ConfigError: a rank reports an error, or not all messages came in time.
            EngineDead: a rank failed or ended.
        """
        channel = self._channel
        assert channel is not None
        found: dict[int, wire.Body] = {}
        deadline = time.monotonic() + timeout_s
        while len(found) < self._size:
            self._heartbeats.tell(channel, found)  # these ranks are idle and only listen
            # A rank's last message explains more than its exit code.
            message = channel.receive(
                0 if self._error is not None else min(_POLL_S, max(deadline - time.monotonic(), 0))
            )
            if message is None:
                if self._error is not None:
                    raise EngineDead(f"before all ranks were ready, {self._error}; see its output above")
                if time.monotonic() >= deadline:
                    missing = ", ".join(str(rank) for rank in range(self._size) if rank not in found)
                    raise ConfigError(f"after {timeout_s:g} s these ranks have not {doing}: {missing}")
                continue
            kind, body = message
            fields = wire.unpack(body)
            rank = int(str(fields["rank"]))
            if kind == wire.PROGRESS:
                self._progress(
                    f"{fields['phase']}, rank {rank}", int(str(fields["done"])), int(str(fields["total"]))
                )
            elif kind == wire.FAILED:
                if fields["kind"] == RankCrashed.__name__:
                    raise RankCrashed(str(fields["message"]), signal.Signals(int(str(fields["signal"]))))
                errors = {error.__name__: error for error in (CheckpointError, ConfigError)}
                raise errors.get(str(fields["kind"]), EngineDead)(str(fields["message"]))
            elif kind == wanted:
                found[rank] = fields
                if kind == wire.HELLO:
                    self._progress("start ranks", len(found), self._size)
            else:
                raise ConfigError(
                    f"rank {rank} sent {kind.decode()!r} instead of {wanted.decode()!r}: run the same "
                    f"version on all nodes"
                )
        return [found[rank] for rank in range(self._size)]

    def _receive(self) -> None:
        channel = self._channel
        while not self._stopping.is_set() and self._error is None:
            assert channel is not None
            message = channel.receive(
                _POLL_S if not self._in_flight else min(_POLL_S, self._config.parallel.step_timeout_s / 4)
            )
            if message is not None:
                self._take(*message)
            self._heartbeats.tell(channel, range(self._size))
            self._check_time()

    def _take(self, kind: bytes, body: bytes) -> None:
        if kind == wire.RESULT:
            result = decode_result(body)
            if result.error is not None:
                # A dying rank makes the others' collectives fail; how it ended is the better
                # explanation.
                if not self._failed.wait(_EXPLANATION_S):
                    self._fail(result.error)
                return
            with self._lock:
                if not self._in_flight:  # failed meanwhile
                    return
                flight = self._in_flight.popleft()
                self._oldest_since_s = self._clock()
            step = flight.plan.step
            if result.step != step:
                self._fail(f"rank 0 answered step {result.step} instead of step {step}", flight)
            else:
                flight.result.set_result(result)
        elif kind == wire.LOGITS:
            fields = msgpack.unpackb(body)
            with self._lock:
                waiting, self._logits = self._logits, None
            if waiting is not None:
                waiting.set_result(
                    torch.from_numpy(
                        np.frombuffer(fields["values"], dtype=np.float32).reshape(fields["shape"]).copy()
                    )
                )
        elif kind == wire.FAILED:
            self._fail(str(wire.unpack(body)["message"]))

    def _check_time(self) -> None:
        timeout_s = self._config.parallel.step_timeout_s
        with self._lock:
            waits = bool(self._in_flight) and self._clock() - self._oldest_since_s > timeout_s
            oldest = self._in_flight[0] if waits else None
        if oldest is not None:
            self._fail(_late(oldest, timeout_s))

    def _note_exit(self, rank: int, how: str, crashed: signal.Signals | None) -> None:
        """Record that a rank has ended; called from any thread."""
        sentence = f"rank {rank} {how}"
        with self._lock:
            # Ranks that end later do so because of the first one.
            if crashed is not None and not self._one_has_ended:
                self.crash = RankCrashed(sentence, crashed)
            self._one_has_ended = True
        self._fail(sentence)

    def _fail(self, sentence: str, landed: _Flight | None = None) -> None:
        """End everything, once; called from any thread.

        Args:
            landed: a step that is no longer in flight and has no result yet.
        """
        with self._lock:
            if self._error is not None:
                return
            self._error = sentence
        self._failed.set()
        logger.error("the ranks have failed: %s", sentence)
        if landed is not None:
            landed.result.set_result(StepResult(landed.plan.step, error=sentence))
        self._resolve_all(sentence)
        self._on_failure(sentence)
        self._launcher.end(0.0)

    def _resolve_all(self, sentence: str) -> None:
        with self._lock:
            left = list(self._in_flight)
            self._in_flight.clear()
            logits, self._logits = self._logits, None
        for plan, result, _ in left:
            result.set_result(StepResult(plan.step, error=sentence))
        if logits is not None:
            logits.set_exception(EngineDead(sentence))


def _late(flight: _Flight, timeout_s: float) -> str:
    """Return the error of a step without a result."""
    step = flight.plan.step
    if flight.masks is not None and not flight.masks.done():
        return masks_late(step, timeout_s)
    return (
        f"step {step} has no result after {timeout_s:g} s (engine.parallel.step_timeout_s): a rank hangs, "
        f"or the network between ranks is down"
    )


class _Heartbeats:
    """The signs of life that listening ranks get from their engine."""

    def __init__(self) -> None:
        self._told_s = 0.0

    def tell(self, channel: EngineChannel, ranks: Iterable[int]) -> None:
        """Send one to these ranks if it is due."""
        now = time.monotonic()
        if now - self._told_s >= _ALIVE_S:
            self._told_s = now
            for rank in ranks:
                channel.send(rank, wire.ALIVE, b"")


def _rank_loaded(fields: object) -> RankLoaded:
    assert isinstance(fields, dict)
    return RankLoaded(**{**fields, "kv_memory": KVMemory(**fields["kv_memory"])})


def _check_hellos(config: EngineConfig, hellos: Sequence[wire.Body], engine_host: str) -> None:
    """Check that all ranks run the same software on the same checkpoint with the same configuration
    as this engine.

    Raises:
        ConfigError: names the rank, its host and the difference.
    """
    for what, own in identity(config).items():
        for hello in hellos:
            theirs = hello["identity"]
            found = theirs.get(what) if isinstance(theirs, dict) else None
            if found != own:
                raise ConfigError(
                    f"rank {hello['rank']} on {hello['host']} has another {what} ({str(found)[:12]}) "
                    f"than its engine on "
                    f"{engine_host} ({str(own)[:12]}): all nodes need the same"
                )
