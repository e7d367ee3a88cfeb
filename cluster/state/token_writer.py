"""The tokens of running background responses on their way into the database, many responses in one
transaction."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.state.background import Background
from cluster.state.errors import StateFull, StateUnavailable
from workers.request import EngineOutput

logger = logging.getLogger(__name__)

MAX_UNWRITTEN = 64
"""Number of tokens of one response that wait to be written; its generation waits then, too."""
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 1.0
"""Shortest and longest seconds between two transactions."""
_SHARE = 10
"""A pause is this many times as long as the transaction before."""


@dataclass
class _Unwritten:
    """The tokens of one response that are not written yet.

    Attributes:
        start: number of its tokens that are written.
        num_tried: number of the first outputs of which a commit was tried but not confirmed. They
            are tried again as they were: a reader may have them, and goes on after them.
    """

    start: int
    outputs: list[EngineOutput] = field(default_factory=list)
    num_tried: int = 0
    num_tokens: int = 0
    written: asyncio.Event = field(default_factory=asyncio.Event)


class TokenWriter:
    """The writer of one gateway. Belongs to one event loop; the owner runs `run`.

    Args:
        on_lost: called with the id of a response that another copy has taken over.
    """

    def __init__(self, background: Background, on_lost: Callable[[str], None]) -> None:
        self._background = background
        self._on_lost = on_lost
        self._responses: dict[str, _Unwritten] = {}
        self._wake = asyncio.Event()
        self._full = asyncio.Event()

    def begin(self, id: str, num_tokens: int) -> None:
        """Expect tokens of a response of which `num_tokens` are stored."""
        self._responses[id] = _Unwritten(num_tokens)

    def end(self, id: str) -> None:
        """Expect no more tokens of a response; those that are not written are dropped."""
        unwritten = self._responses.pop(id, None)
        if unwritten is not None:
            unwritten.written.set()

    async def keep(self, id: str, output: EngineOutput) -> None:
        """Take an output; wait while too many tokens are not written."""
        unwritten = self._responses.get(id)
        if unwritten is None or not (output.token_ids or output.finish_reason):
            return
        unwritten.outputs.append(output)
        unwritten.num_tokens += len(output.token_ids)
        self._wake.set()
        if unwritten.num_tokens >= MAX_UNWRITTEN:
            self._full.set()
            await self.flush(id)

    async def flush(self, id: str) -> None:
        """Wait until all tokens of a response so far are written."""
        unwritten = self._responses.get(id)
        self._full.set()
        while unwritten is not None and unwritten.outputs and self._responses.get(id) is unwritten:
            unwritten.written.clear()
            await unwritten.written.wait()

    async def written(self, id: str, timeout_s: float) -> None:
        """Wait until tokens of a response have been written here, or it has ended here, at most
        `timeout_s`."""
        unwritten = self._responses.get(id)
        if unwritten is None:
            await asyncio.sleep(timeout_s)
            return
        try:
            async with asyncio.timeout(timeout_s):
                unwritten.written.clear()
                await unwritten.written.wait()
        except TimeoutError:
            pass

    async def run(self) -> None:
        """Write again and again, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            self._wake.clear()
            self._full.clear()
            begin = loop.time()
            pause_s = _LONGEST_PAUSE_S
            try:
                await self._write()
                pause_s = min(max(_SHORTEST_PAUSE_S, _SHARE * (loop.time() - begin)), _LONGEST_PAUSE_S)
            except Exception as error:  # the edge of this task; without the text, which may quote data
                if not isinstance(error, StateUnavailable | StateFull):  # logged where it was noticed
                    logger.error("tokens were not stored: %s", type(error).__name__)
                self._wake.set()  # they are still there
                await asyncio.sleep(_LONGEST_PAUSE_S)
                continue
            try:
                async with asyncio.timeout(pause_s):
                    await self._full.wait()
            except TimeoutError:
                pass

    async def _write(self) -> None:
        taken = {
            id: (unwritten, unwritten.outputs[: unwritten.num_tried or None])
            for id, unwritten in self._responses.items()
            if unwritten.outputs
        }
        if not taken:
            return
        for unwritten, outputs in taken.values():
            unwritten.num_tried = len(outputs)
        lost = await self._background.add(
            {id: (unwritten.start, outputs) for id, (unwritten, outputs) in taken.items()}
        )
        for id, (unwritten, outputs) in taken.items():
            num_tokens = sum(len(output.token_ids) for output in outputs)
            del unwritten.outputs[: len(outputs)]
            unwritten.num_tried = 0
            unwritten.start += num_tokens
            unwritten.num_tokens -= num_tokens
            unwritten.written.set()
            if unwritten.outputs:
                self._wake.set()
            if id in lost:
                self.end(id)
                self._on_lost(id)
