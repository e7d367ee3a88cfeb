"""A rank in a process of its own: joins the engine's channel and the other ranks, loads its
weights, and runs the plans that it receives.

`serve_rank` is the whole life of the process, however it was started: `python -m
workers.rank.process` for child processes (the RankSpec is JSON on stdin), the actor of
`ray_executor` under Ray.
"""

import hashlib
import importlib.metadata
import json
import logging
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

import msgpack
import torch

from workers.config import EngineConfig
from workers.config_json import engine_config_from_json, engine_config_to_json
from workers.console import keep_output_from_failing
from workers.cores import cores_of_rank
from workers.errors import CheckpointError, ConfigError, RankCrashed
from workers.executor import channel as wire
from workers.executor.channel import Endpoints, RankChannel
from workers.kv_cache.memory import KVCachePlan
from workers.model.stored_model import fingerprint
from workers.model_config import load_model_config
from workers.parallel.collectives import TorchDistributed, join_store, serve_store, use_interface_of
from workers.parallel.shard import plan_shards
from workers.parent_death import die_with_parent
from workers.rank.device import check_memory, prepare_device
from workers.rank.rank import LaunchedStep, Rank
from workers.scheduler.masks import masks_late
from workers.scheduler.plan_wire import PLAN_VERSION, decode_masks, decode_plan, encode_result

logger = logging.getLogger(__name__)

_POLL_S = 1.0
_GPU_POLL_S = 5e-5
"""Interval in seconds between two checks for the end of a GPU step, and for the next plan or
masks."""
_PROGRESS_INTERVAL_S = 0.5


@dataclass(frozen=True, slots=True)
class RankSpec:
    """Everything that a rank receives at its start.

    Attributes:
        config: EngineConfig as JSON.
        host: this node's address, for the collectives.
        local_rank, ranks_on_host, num_threads: as in `Placement`.
    """

    config: str
    rank: int
    endpoints: Endpoints
    host: str
    local_rank: int
    ranks_on_host: int
    num_threads: int

    def to_json(self) -> str:
        """Return the spec as one line of JSON."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "RankSpec":
        """Parse a line from `to_json`."""
        fields = json.loads(text)
        return RankSpec(**{**fields, "endpoints": Endpoints(**fields["endpoints"])})


def identity(config: EngineConfig) -> dict[str, object]:
    """Return the facts, by name, on which all ranks and their engine must agree.

    Raises:
        CheckpointError: the checkpoint cannot be read.
    """
    return {
        "Cantata": importlib.metadata.version("cantata"),
        "torch": torch.__version__,
        "version of step messages": PLAN_VERSION,
        "checkpoint": fingerprint(config.model_path),
        "configuration": hashlib.sha256(engine_config_to_json(config).encode()).hexdigest(),
    }


class Stopped(Exception):
    """The engine asked this rank to end."""


class EngineLost(Exception):
    """The engine has been silent for too long: its host is down or cannot be reached, or its
    process is stopped."""


class EngineLink:
    """A rank's view of the engine: the next message, or the fact that the engine is lost.

    The engine sends a sign of life each second, which is consumed here.

    Args:
        silence_s: longest silence in seconds that is tolerated while this rank listens.
        clock: returns monotonic seconds.
    Attributes:
        clock: as given.
    """

    def __init__(
        self, channel: RankChannel, silence_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.clock = clock
        self._channel = channel
        self._silence_s = silence_s
        # Messages that came before masks that were waited for.
        self._held: deque[tuple[bytes, bytes]] = deque()

    def wait(self) -> tuple[bytes, bytes]:
        """Return (kind, body) of the next message.

        Raises:
            Stopped, EngineLost: no message will come.
        """
        if self._held:
            return _not_stop(self._held.popleft())
        heard_s = self.clock()
        while True:
            message = self._channel.receive(_POLL_S)
            if message is None:
                if self.clock() - heard_s > self._silence_s:
                    raise EngineLost
            elif message[0] == wire.ALIVE:
                heard_s = self.clock()
            else:
                return _not_stop(message)

    def look(self) -> tuple[bytes, bytes] | None:
        """Return the next message if it has arrived, else None.

        Raises:
            Stopped: the message asks this rank to stop.
        """
        if self._held:
            return _not_stop(self._held.popleft())
        message = self._channel.receive(0)
        return None if message is None or message[0] == wire.ALIVE else _not_stop(message)

    def look_for_masks(self) -> bytes | None:
        """Return the body of the next message if it has arrived and is masks, else None; other
        messages are kept for `wait` and `look`: the next plan may come before the masks of this
        one.

        Raises:
            Stopped: the engine asks this rank to stop.
        """
        message = self._channel.receive(0)
        if message is None or message[0] == wire.ALIVE:
            return None
        kind, body = _not_stop(message)
        if kind == wire.MASKS:
            return body
        self._held.append((kind, body))
        return None

    def expect(self, wanted: bytes) -> bytes:
        """Return the body of the next message, which must be of the given kind."""
        kind, body = self.wait()
        if kind != wanted:
            raise ValueError(f"the engine sent {kind!r} where {wanted!r} was due")
        return body


def serve_rank(spec: RankSpec, begin: Callable[[], None] = lambda: None) -> None:
    """Run until the engine asks for the stop. A failure is reported to the engine in one sentence.

    If the engine is lost, this function ends the process: no other component can, and the GPU
    memory that the process holds is needed.

    Args:
        begin: called first; may raise the errors of a start.
    """
    channel = RankChannel(spec.endpoints)
    try:
        begin()
        _serve(spec, channel)
    except Stopped:
        pass
    except EngineLost:
        logger.error("rank %d has lost its engine and ends", spec.rank)
        logging.shutdown()
        os._exit(1)
    except RankCrashed as error:
        message = wire.pack(rank=spec.rank, kind="RankCrashed", message=str(error), signal=int(error.signal))
        channel.send(wire.FAILED, message)
    except (CheckpointError, ConfigError) as error:
        channel.send(wire.FAILED, wire.pack(rank=spec.rank, kind=type(error).__name__, message=str(error)))
    except Exception as error:
        # The outermost frame of the process: every failure is reported.
        logger.exception("rank %d failed", spec.rank)
        sentence = f"rank {spec.rank} failed ({type(error).__name__}); its log has the details"
        channel.send(wire.FAILED, wire.pack(rank=spec.rank, kind="", message=sentence))
    finally:
        channel.close()


def _serve(spec: RankSpec, channel: RankChannel) -> None:
    torch.set_num_threads(spec.num_threads)
    config = engine_config_from_json(spec.config)
    parallel = config.parallel
    model = load_model_config(config.model_path)
    shard = plan_shards(model, parallel)[spec.rank]
    device = prepare_device(config, spec.local_rank)
    check_memory(config, model, shard, device, ranks_on_host=spec.ranks_on_host)
    use_interface_of(spec.host)
    own_store = serve_store(spec.host, timeout_s=parallel.start_timeout_s) if spec.rank == 0 else None
    channel.send(
        wire.HELLO,
        wire.pack(
            rank=spec.rank,
            host=spec.host,
            identity=identity(config),
            store_port=0 if own_store is None else own_store.port,
        ),
    )
    # The engine's watchdog must act first: it can name the step, and it ends all ranks.
    patience_s = 2 * parallel.step_timeout_s + 10
    engine = EngineLink(channel, patience_s)
    join = wire.unpack(engine.expect(wire.JOIN))
    store = own_store or join_store(
        str(join["host"]), int(str(join["port"])), timeout_s=parallel.start_timeout_s
    )
    collectives = TorchDistributed(spec.rank, parallel.tensor, store, device, timeout_s=patience_s)
    cores = (
        cores_of_rank(spec.local_rank, spec.ranks_on_host, spec.num_threads) if device.type == "cpu" else []
    )
    if cores:
        # Applies to this thread and of those that it starts from now on. The threads of the channel
        # and of the collectives may run on any core.
        os.sched_setaffinity(0, cores)
    rank = Rank(
        config,
        model,
        shard,
        collectives,
        device=device,
        ranks_on_host=spec.ranks_on_host,
        progress=_Reporter(spec.rank, channel),
    )
    try:
        loaded = rank.load()
        channel.send(wire.LOADED, wire.pack(rank=spec.rank, loaded=asdict(loaded)))
        plan: dict[str, int] = msgpack.unpackb(engine.expect(wire.ALLOCATE))
        rank.allocate(KVCachePlan(**plan))
        channel.send(wire.READY, wire.pack(rank=spec.rank, phases_s=rank.phases_s))
        _run_plans(spec.rank, rank, channel, engine, parallel.step_timeout_s)
    finally:
        rank.close()
        collectives.close()


def _run_plans(
    number: int, rank: Rank, channel: RankChannel, engine: EngineLink, masks_timeout_s: float
) -> None:
    launched: deque[tuple[LaunchedStep, float]] = deque()
    while True:
        free_since = time.perf_counter()
        kind, body = _receive_while(number, launched, channel, engine)
        if kind == wire.PLAN:
            idle_s = 0.0 if launched else time.perf_counter() - free_since
            plan = decode_plan(body)
            step = rank.launch(plan)
            if step.awaits_masks:
                _wait_for_masks(
                    plan.step, step, partial(_send_ended, number, launched, channel), engine, masks_timeout_s
                )
            launched.append((step, idle_s))
        elif kind == wire.COMPUTE_LOGITS:
            logits = rank.logits(msgpack.unpackb(body))
            if logits is not None:
                channel.send(
                    wire.LOGITS, wire.pack(shape=list(logits.shape), values=logits.cpu().numpy().tobytes())
                )
        else:
            raise ValueError(f"the engine sent {kind!r} in the middle of serving")


def _receive_while(
    number: int, launched: deque[tuple[LaunchedStep, float]], channel: RankChannel, engine: EngineLink
) -> tuple[bytes, bytes]:
    """Return the next message. Results are sent meanwhile as steps end: on a GPU the next plan is
    launched while the last one runs."""
    while launched:
        if _send_ended(number, launched, channel):
            continue
        if (message := engine.look()) is not None:
            return message
        time.sleep(_GPU_POLL_S)
    return engine.wait()


def _send_ended(number: int, launched: deque[tuple[LaunchedStep, float]], channel: RankChannel) -> bool:
    """Send the result of the oldest step if it has ended; return whether it has."""
    if not launched or not launched[0][0].done:
        return False
    step, idle_s = launched.popleft()
    result = replace(step.result(), idle_s=idle_s)
    if number == 0 or result.error is not None:
        channel.send(wire.RESULT, encode_result(result))
    return True


def _wait_for_masks(
    number: int, step: LaunchedStep, send_ended: Callable[[], bool], engine: EngineLink, timeout_s: float
) -> None:
    """Sample a step once its masks have come. They depend on the results of the steps before, which
    are sent meanwhile.

    Args:
        number: of the step.
    """
    ends_s = engine.clock() + timeout_s
    while engine.clock() < ends_s:
        if send_ended():
            continue
        body = engine.look_for_masks()
        if body is None:
            time.sleep(_GPU_POLL_S)
            continue
        masks = decode_masks(body)
        if masks.step != number:
            raise ValueError(f"the engine sent masks of step {masks.step} where those of {number} were due")
        step.sample(masks)
        return
    step.fail(masks_late(number, timeout_s))


def _not_stop(message: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
    if message[0] == wire.STOP:
        raise Stopped
    return message


class _Reporter:
    """Sends progress messages at a limited rate."""

    def __init__(self, rank: int, channel: RankChannel) -> None:
        self._rank = rank
        self._channel = channel
        self._sent_s = 0.0

    def __call__(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        if total and done < total and now - self._sent_s < _PROGRESS_INTERVAL_S:
            return
        self._sent_s = now
        self._channel.send(wire.PROGRESS, wire.pack(rank=self._rank, phase=phase, done=done, total=total))


def main() -> int:
    """Read the spec from stdin and serve. The argument is the PID of the engine's process; this
    process ends when that one does."""
    keep_output_from_failing()
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    # Ctrl-C in a terminal reaches the whole process group; the engine decides the order of the
    # shutdown.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A rank that is stopped, or waits in a collective or a driver, would keep its GPU.
    if not die_with_parent(int(sys.argv[1])):
        return 1
    serve_rank(RankSpec.from_json(sys.stdin.readline()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
