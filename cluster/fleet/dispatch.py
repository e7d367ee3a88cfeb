"""Turns one engine request into one stream of outputs, whichever replica serves it."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace

from cluster.fleet.client import EngineClient
from cluster.fleet.table import Replica, ReplicaDirectory, RoutingHint
from cluster.metrics import GatewayMetrics
from workers.config import BLOCK_SIZE
from workers.errors import (
    CantataError,
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineDead,
    NoReplica,
    Overloaded,
)
from workers.kv_cache.prefix_cache import block_hashes, hash_block, hash_root, pack_tokens
from workers.request import EngineOutput, EngineRequest

_log = logging.getLogger(__name__)


MAX_ENGINE_DEATHS = 3
"""Number of replicas that may die under one request before it is given up: the request may be the
cause."""
RESUME_WAIT_S = 60.0
"""Seconds for which a sequence whose replica died waits for another one while all live replicas are
full."""
_SHORTEST_WAIT_S, _LONGEST_WAIT_S = 0.05, 5.0
"""Shortest and longest seconds between two attempts, whatever delay the full replica asks for."""
_MAX_HASHED_BLOCKS = 2048
"""Maximum number of blocks hashed (32 thousand tokens, 4 ms). Longer prompts that agree this far
belong together anyway."""
_INLINE_TOKENS = 4096
"""Prompts up to this length, which take half a millisecond, are hashed on the event loop."""


class Dispatcher:
    """Chooses a replica for each sequence, and another one if the first refuses it or dies under
    it.

    After tokens have come, the sequence is resumed elsewhere with these tokens as its output so
    far. The engine continues with the same seed and positions, so the reader sees one unbroken
    stream.

    Args:
        clock: returns monotonic seconds, for deadlines.
    """

    def __init__(
        self,
        replicas: ReplicaDirectory,
        client: EngineClient,
        metrics: GatewayMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._replicas = replicas
        self._client = client
        self._metrics = metrics
        self._clock = clock

    async def hint(self, request: EngineRequest) -> RoutingHint:
        """Return what the choice of a replica depends on for this request and others with its
        prompt, adapter and salt. Long prompts are hashed in a thread."""
        if len(self._replicas.known()) < 2:
            return RoutingHint()
        if len(request.prompt_token_ids) <= _INLINE_TOKENS:
            return _hint(request)
        return await asyncio.to_thread(_hint, request)

    async def stream(
        self, request: EngineRequest, deadline: float | None, hint: RoutingHint
    ) -> AsyncGenerator[EngineOutput, None]:
        """Yield outputs up to the one with a finish reason `stop` or `length`. Closing the
        generator cancels the sequence in the engine.

        Args:
            deadline: on this object's clock; None for no deadline.
        Raises:
            CantataError: the last replica's error, when no other replica can continue.
        """
        tries = _Tries(self._clock)
        num_cached = num_prompt_logprobs = 0
        tokens: list[int] = []
        while True:
            try:
                replica = await self._replicas.choose(hint, tries.excluded)
            except NoReplica as error:
                # A client that has read half an answer cannot retry, so the sequence waits for
                # room.
                if not tokens or not await tries.wait_for_room():
                    raise tries.refusal or error from None
                continue
            try:
                attempt = replace(request, output_token_ids=(*request.output_token_ids, *tokens))
                num_before, num_again = len(tokens), num_prompt_logprobs
                async with aclosing(self._run(replica, attempt, deadline)) as outputs:
                    async for output in outputs:
                        tokens += output.token_ids
                        # Hits in the second replica's cache do not count for the original prompt.
                        num_cached = num_cached or (0 if num_before else output.num_cached_tokens)
                        # A resumed sequence reports its prompt's log-probabilities again.
                        prompt_logprobs = output.prompt_logprobs[num_again:]
                        num_again = max(num_again - len(output.prompt_logprobs), 0)
                        num_prompt_logprobs += len(prompt_logprobs)
                        yield replace(output, num_cached_tokens=num_cached, prompt_logprobs=prompt_logprobs)
                return
            except CantataError as error:
                if isinstance(error, EngineDead):
                    self._replicas.failed(replica)
                if not tries.may_go_on(replica, error):
                    raise
                self._count(request, replica, error, went=len(tokens) > num_before, num_tokens=len(tokens))
            finally:
                self._replicas.release(replica)

    async def close(self) -> None:
        """Close the connections to engines; what still runs ends with an error."""
        await self._client.close()

    def _count(
        self, request: EngineRequest, replica: Replica, error: CantataError, *, went: bool, num_tokens: int
    ) -> None:
        name = type(error).__name__
        if went:
            _log.warning(
                "request %s: replica %s failed after %d tokens: %s",
                request.request_id,
                replica.id,
                num_tokens,
                name,
            )
            self._metrics.resumptions.inc()
        else:
            _log.info("request %s: replica %s refused it: %s", request.request_id, replica.id, name)
            self._metrics.retries.labels(name).inc()

    async def _run(
        self, replica: Replica, request: EngineRequest, deadline: float | None
    ) -> AsyncGenerator[EngineOutput, None]:
        if deadline is not None:
            left_s = deadline - self._clock()
            if left_s <= 0:
                raise DeadlineExceeded("The request's deadline passed before a replica accepted it.")
            request = replace(request, deadline_s=left_s)
        async with aclosing(self._client.generate(replica, request)) as outputs:
            async for output in outputs:
                if output.finish_reason == "abort":
                    raise EngineDead(
                        "The replica that served this request is shutting down; try again.",
                        under_request=False,
                    )
                if output.finish_reason == "error":
                    _log.error(
                        "request %s failed in replica %s: %s", request.request_id, replica.id, output.error
                    )
                    raise CantataError("The engine failed on this request.")
                yield output


def _hint(request: EngineRequest) -> RoutingHint:
    ids = request.prompt_token_ids
    root = hash_root(request.adapter, request.cache_salt)
    hashes = block_hashes(ids[: _MAX_HASHED_BLOCKS * BLOCK_SIZE], BLOCK_SIZE, root)
    rest = ids[len(hashes) * BLOCK_SIZE :]
    parent = hashes[-1] if hashes else root
    tail = hash_block(parent, pack_tokens(rest)) if len(rest) < BLOCK_SIZE else b""
    return RoutingHint(hashes, tail)


class _Tries:
    """The attempts of one sequence: the replicas that refused it or died under it.

    Attributes:
        excluded: keys of the replicas that are not tried again. A restarted replica has another
            key.
        refusal: the error for the client if no replica is left.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.excluded: frozenset[str] = frozenset()
        self.refusal: CantataError | None = None
        self._clock = clock
        self._full: frozenset[str] = frozenset()
        self._full_since_s: float | None = None
        self._retry_after_s = 0.0
        self._num_deaths = 0

    def may_go_on(self, replica: Replica, error: CantataError) -> bool:
        """Record how an attempt ended; return whether another replica may be tried."""
        # The request was checked against the shortest context known; this replica's is shorter and
        # was not known yet.
        too_long = isinstance(error, ContextLengthExceeded)
        if isinstance(error, EngineDead):
            self._num_deaths += error.under_request
            if error.under_request:  # it had been admitted
                self._full_since_s = None
        elif isinstance(error, Overloaded):
            self._full |= {replica.key}
            self._retry_after_s = error.retry_after_s
        error.num_deaths = self._num_deaths
        self.excluded |= {replica.key}
        if self.refusal is None or not too_long:
            self.refusal = error
        return (error.retry_elsewhere or too_long) and self._num_deaths < MAX_ENGINE_DEATHS

    async def wait_for_room(self) -> bool:
        """Wait briefly if a replica was only full, and allow it again. Return False if none was, or
        if none had room for RESUME_WAIT_S."""
        if self._full_since_s is None:
            self._full_since_s = self._clock()
        if not self._full or self._clock() - self._full_since_s > RESUME_WAIT_S:
            return False
        await asyncio.sleep(min(max(self._retry_after_s, _SHORTEST_WAIT_S), _LONGEST_WAIT_S))
        self.excluded, self._full = self.excluded - self._full, frozenset()
        return True
