"""The stream of a background response, read from the database by whichever gateway."""

from collections.abc import AsyncGenerator

from cluster.frontend.responses.background import BackgroundRuns
from cluster.frontend.responses.events import Event, sse_frame
from cluster.frontend.responses.items import Seals
from cluster.frontend.responses.replay import Replay
from cluster.harmony.encoding import HarmonyEncoding
from cluster.state.background import Background, Progress
from cluster.state.responses import UNFINISHED
from workers.errors import InvalidRequest

_POLL_S = 0.25
"""Seconds between two looks at a response that another gateway makes."""


class StoredStream:
    """The events of a background response after a number.

    Args:
        starting_after: number of the last event that the client has; None: it has none.
    """

    def __init__(
        self,
        background: Background,
        runs: BackgroundRuns,
        encoding: HarmonyEncoding,
        seals: Seals,
        starting_after: int | None,
    ) -> None:
        self._background = background
        self._runs = runs
        self._encoding = encoding
        self._seals = seals
        self._after = -1 if starting_after is None else starting_after
        self._number = 0
        self._pending: list[Event] = []
        self._replay: Replay | None = None
        self._is_over = False

    async def open(self, id: str, owner: str) -> "StoredStream":
        """Read what is there.

        Raises:
            NotStored: there is no such response.
            InvalidRequest: it is none of the background, or ended before the given number.
        """
        self._id, self._owner = id, owner
        progress = await self._background.progress(id, owner)
        if "reader" not in progress.stored.request:
            raise InvalidRequest("stream needs a response that was created with background: true.", "stream")
        self._replay = Replay(progress.stored.request, self._encoding, self._seals)
        self._take(self._replay.begin())
        self._read(progress)
        if self._is_over and self._after >= self._number:
            raise InvalidRequest(
                f"starting_after is {self._after}, but the last event of this response has the number "
                f"{self._number - 1}.",
                "starting_after",
            )
        return self

    async def frames(self) -> AsyncGenerator[bytes, None]:
        """Yield the events as server-sent events, until the terminal one."""
        while True:
            if self._pending:
                yield sse_frame(self._pending)
                self._pending = []
            if self._is_over:
                return
            await self._runs.writer.written(self._id, _POLL_S)
            assert self._replay is not None
            self._read(await self._background.progress(self._id, self._owner, self._replay.num_tokens))

    async def aclose(self) -> None:
        """Do nothing: the response goes on."""

    def _read(self, progress: Progress) -> None:
        assert self._replay is not None
        self._take(self._replay.push(progress.outputs))
        if progress.stored.status not in UNFINISHED and progress.stored.body is not None:
            self._take(self._replay.end(progress.stored.body))
            self._is_over = True

    def _take(self, events: "list[Event] | tuple[Event, ...]") -> None:
        for event in events:
            if self._number > self._after:
                self._pending.append(event)
            self._number += 1
