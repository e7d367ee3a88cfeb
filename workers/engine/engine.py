"""The engine: requests in, tokens out. Its step loop (`step_loop`) owns the scheduler; other
threads communicate with it through a bounded inbox."""

import logging
import os
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext

from workers.config import EngineConfig, ModelConfig, check_max_model_len
from workers.constraint.codec import Constraint
from workers.constraint.compiler import GrammarCompiler, PreparedConstraint
from workers.engine.grammars import GrammarSteps
from workers.engine.heartbeat import StepLoopWatch
from workers.engine.masks import MaskThread, mask_threads
from workers.engine.requests import RequestBook
from workers.engine.step_loop import SHUTTING_DOWN, StepLoop
from workers.engine.step_stats import StepStats
from workers.engine.stream import Notifier, OutputStream
from workers.errors import ConfigError, Overloaded, RankCrashed
from workers.executor.base import Executor, ExecutorInfo
from workers.kv_cache.manager import KVCacheManager
from workers.metrics import EngineMetrics
from workers.model.sizes import grammar_tokenizer_bytes
from workers.request import EngineLoad, EngineRequest
from workers.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)

_STOP_TIMEOUT_S = 60.0
"""Seconds for which `shutdown` waits for a step in flight."""


class Engine:
    """Runs requests on an executor. All methods may be called from any thread.

    Args:
        executor: not yet started; the engine starts it and shuts it down.
        check_integrity: assert the scheduler's invariants whenever the engine becomes idle (tests,
            debugging).
        on_death: called on the engine's thread once the engine has failed for good and every
            request has ended.
    Attributes:
        max_model_len: maximum tokens of a sequence, prompt and output; known once the engine has
            started.
        watch: detects whether the step loop hangs.
    Raises:
        ConfigError: max_model_len exceeds the model's context.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: ModelConfig,
        executor: Executor,
        *,
        metrics: EngineMetrics | None = None,
        check_integrity: bool = False,
        on_death: Callable[[], object] = lambda: None,
    ) -> None:
        check_max_model_len(config, model)
        self.metrics = metrics or EngineMetrics()
        self.max_model_len: int
        self.vocab_size = model.vocab_size
        self._config = config
        self._model = model
        self._executor = executor
        self._scheduler: Scheduler
        self._requests = RequestBook(config.scheduler.max_waiting_requests)
        self._stats = StepStats(self.metrics)
        # Ranks in their own processes are watched by their executor; on a CPU a step may take
        # minutes.
        watched = config.parallel.tensor == 1 and not config.device.startswith("cpu")
        self.watch = StepLoopWatch(config.parallel.step_timeout_s if watched else None)
        self._compiler = GrammarCompiler(
            config.model_path, model.vocab_size, config.grammars, self._stats.grammar_compiled
        )
        self._num_mask_threads = config.grammars.num_threads or mask_threads(len(os.sched_getaffinity(0)))
        self._masks = MaskThread(
            self._compiler, model.vocab_size, self._num_mask_threads, self._stats.masks_computed
        )
        self._loop = StepLoop(
            executor,
            GrammarSteps(self._masks),
            self._requests,
            self._stats,
            self.watch,
            stop_token_ids=model.stop_token_ids,
            check_integrity=check_integrity,
            on_death=on_death,
        )

    def start(self) -> ExecutorInfo:
        """Load the model and start the loop; block until requests are accepted.

        Raises:
            CheckpointError, ConfigError: one sentence for the user.
        """
        self._executor.on_failure(self._requests.end_wait)
        with self._compiler.loading() if self._config.grammars.load == "start" else nullcontext():
            info = self._executor.start()
        self.max_model_len = info.max_model_len
        try:
            kv = KVCacheManager(
                num_full_blocks=info.num_full_blocks,
                num_sliding_blocks=info.num_sliding_blocks,
                window=self._model.sliding_window,
                prefix_caching=self._config.cache.prefix_caching,
            )
            self._scheduler = Scheduler(self._config.scheduler, kv, max_model_len=self.max_model_len)
        except ConfigError:
            self._executor.shutdown()
            raise
        capacity = {
            "full": max(info.num_full_blocks - 1, 0),
            "sliding": max(info.num_sliding_blocks - 1, 0),
        }
        self._stats.watch(self._scheduler, kv, capacity)
        self._requests.open()
        self._loop.start(self._scheduler)
        return info

    def prepare(self, constraint: Constraint) -> "Future[PreparedConstraint]":
        """Make a constraint ready for `submit`: read its automaton and compile its grammars. The
        future is done at once if they are known; await it for COMPILE_TIMEOUT_S.

        Raises (the future):
            InvalidRequest, Overloaded, ConfigError: as `GrammarCompiler.prepare`.
        """
        return self._compiler.prepare(constraint)

    def submit(
        self, request: EngineRequest, notifier: Notifier, prepared: PreparedConstraint | None = None
    ) -> OutputStream:
        """Accept a request that passed `workers.rpc.validate.check_request`; its stream ends with
        exactly one finish reason.

        Args:
            prepared: the request's constraint, as returned by `prepare`; required if it has one.
        Raises:
            InvalidRequest, ContextLengthExceeded: the request could never run here.
            Overloaded: the inbox is full.
            EngineDead: the engine is draining, stopped or dead.
        """
        assert (request.constraint is None) == (prepared is None), "the constraint was not prepared"
        if self._requests.refusal is None:
            self._scheduler.check(request)
        try:
            return self._requests.submit(request, notifier, prepared)
        except Overloaded:
            self.metrics.refused.inc()
            raise

    def abort(self, stream: OutputStream, reason: str = "the client left") -> None:
        """End a request with reason `abort` between two steps; do nothing if it has ended."""
        self._requests.abort(stream.seq_id, reason)

    def load(self) -> EngineLoad:
        """Return the engine's current load."""
        return EngineLoad(
            num_running=self._requests.num_running,
            num_waiting=self._requests.num_waiting,
            kv_usage=self._stats.kv_usage,
            accepting=self._requests.refusal is None,
        )

    @property
    def grammars(self) -> str:
        """How this engine computes grammars, for the start-up summary."""
        threads = f"{self._num_mask_threads} thread{'s' if self._num_mask_threads > 1 else ''}"
        size = f"about {grammar_tokenizer_bytes(self.vocab_size) / 2**20:.0f} MiB"
        if self._config.grammars.load == "start":
            return f"{threads}; tokenizer loaded, {size}"
        return f"{threads}; tokenizer loaded when first used, {size} (engine.grammars.load)"

    @property
    def num_steps(self) -> int:
        """Number of completed steps."""
        return self._stats.num_steps

    @property
    def error(self) -> str | None:
        """Reason for the engine's death; None while it is alive."""
        return self._loop.error

    @property
    def crash(self) -> RankCrashed | None:
        """The crash of a rank that ended the engine; None if it is alive or died of another cause.
        Final after `shutdown`."""
        return self._executor.crash if self.error is not None else None

    def wait_stopped(self, timeout_s: float | None = None) -> bool:
        """Block until the loop has ended, by shutdown or by death; return whether it has."""
        return self._loop.join(timeout_s)

    def drain(self, grace_s: float) -> int:
        """Refuse new requests and wait for the live ones; after `grace_s` seconds abort the rest.
        Return the number aborted."""
        self._requests.close(SHUTTING_DOWN)
        self._requests.wait_until_none(max(grace_s, 0.0))
        num_left = self._requests.abort_all(
            f"the engine is shutting down and its grace period of {grace_s:g} s is over"
        )
        self._requests.wait_until_none(_STOP_TIMEOUT_S)
        return num_left

    def shutdown(self) -> None:
        """Stop after the step in flight; live requests end with `abort`. Idempotent."""
        self._requests.close(SHUTTING_DOWN)
        self._requests.end_wait()
        if not self.wait_stopped(_STOP_TIMEOUT_S):
            logger.error(
                "the step in flight did not end within %g s; its requests are ended without it",
                _STOP_TIMEOUT_S,
            )
            self._loop.end_all()
        self._executor.shutdown()
        self._compiler.close()
        self._masks.close()
