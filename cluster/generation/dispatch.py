"""From one engine request to one stream of outputs, whichever replica serves it."""

import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace

from cluster.metrics import GatewayMetrics
from cluster.router.client import EngineClient
from cluster.router.table import Replica, ReplicaDirectory, RoutingHint
from workers.errors import CantataError, DeadlineExceeded, EngineDead, NoReplica
from workers.request import EngineOutput, EngineRequest

_log = logging.getLogger(__name__)


class Dispatcher:
    """Chooses a replica for each sequence, and another one if the first refuses it before its first token.

    Args:
        clock: monotonic seconds, for deadlines.
    """

    def __init__(
        self, replicas: ReplicaDirectory, client: EngineClient, metrics: GatewayMetrics, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._replicas = replicas
        self._client = client
        self._metrics = metrics
        self._clock = clock

    async def stream(self, request: EngineRequest, deadline: float | None) -> AsyncGenerator[EngineOutput, None]:
        """Outputs up to the one with a finish reason `stop` or `length`. Closing it cancels the sequence in the engine.

        Args:
            deadline: on this object's clock; None: none.
        Raises:
            CantataError: the last replica's refusal, or what broke the stream after its first token.
        """
        hint = RoutingHint(request.request_id, len(request.prompt_token_ids))
        excluded: frozenset[str] = frozenset()
        refusal: CantataError | None = None
        while True:
            try:
                replica = await self._replicas.choose(hint, excluded)
            except NoReplica as error:
                raise refusal or error from None
            started = False
            try:
                async with aclosing(self._run(replica, request, deadline)) as outputs:
                    async for output in outputs:
                        started = started or bool(output.token_ids)
                        yield output
                return
            except CantataError as error:
                if isinstance(error, EngineDead):
                    self._replicas.failed(replica)
                if started or not error.retry_elsewhere:
                    raise
                _log.info("request %s: replica %s refused it: %s", request.request_id, replica.id, type(error).__name__)
                self._metrics.retries.labels(type(error).__name__).inc()
                refusal = error
                excluded |= {replica.id}
            finally:
                self._replicas.release(replica)

    async def _run(self, replica: Replica, request: EngineRequest, deadline: float | None) -> AsyncGenerator[EngineOutput, None]:
        if deadline is not None:
            left_s = deadline - self._clock()
            if left_s <= 0:
                raise DeadlineExceeded("The request's time was over before a replica took it.")
            request = replace(request, deadline_s=left_s)
        async with aclosing(self._client.generate(replica, request)) as outputs:
            async for output in outputs:
                if output.finish_reason == "abort":
                    raise EngineDead("The replica that served this request is shutting down; try again.")
                if output.finish_reason == "error":
                    _log.error("request %s failed in replica %s: %s", request.request_id, replica.id, output.error)
                    raise CantataError("The engine failed on this request.")
                yield output
