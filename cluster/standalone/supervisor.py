"""Engines as child processes of this one: started, watched, restarted when they die, given up after
repeated crashes, and stopped with it."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence

from cluster.fleet.table import Replica
from cluster.standalone.process_session import end_session
from workers.exit_codes import MAX_SAME_CRASHES, STABLE_AFTER_S, crash, ending, is_explained
from workers.out_of_memory import OomKills

logger = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.5
LONGEST_BACKOFF_S = 30.0
DESCENDANTS_S = 30.0
"""Seconds for the kernel to end a dead child's descendants; it takes seconds to free much
memory."""
TURN_S = 1.0
"""Seconds between two checks for a heartbeat from a child."""


class EngineFailed(Exception):
    """Raised when an engine's first start failed.

    Attributes:
        explained: whether the child has printed the reason on stderr, in one sentence.
        code: the exit code, if the child ended by itself.
    """

    def __init__(self, message: str, *, explained: bool = False, code: int | None = None) -> None:
        super().__init__(message)
        self.explained = explained
        self.code = code


def watch_children_without_threads() -> None:
    """Let asyncio learn of a child's end from the kernel, as it does by itself from Python 3.12 on.
    Python 3.11 starts a thread for each child, and waits for ever where there is no memory for
    one."""
    if sys.version_info < (3, 12) and hasattr(os, "pidfd_open"):
        try:
            os.close(os.pidfd_open(os.getpid()))
        except OSError:  # a kernel or a sandbox without it
            return
        asyncio.set_child_watcher(asyncio.PidfdChildWatcher())


class EngineProcess:
    """One engine child process. It inherits our stderr (for progress and errors) and reports its
    address on stdout as a line of JSON.

    The child leads its own session, so that Ctrl-C in a terminal reaches only the parent, which
    decides the order of the stop.

    Attributes:
        replica: the serving child; None while there is none or it is starting.
        num_restarts: number of times that a child was replaced.
        given_up: set when no child will be started again because of repeated crashes; `failure`
            then holds the sentence.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        heartbeat_timeout_s: float | None = None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            command: prints {"event": "ready", "address": …, "start_id": …} on stdout when it
                serves; exits with 0 on SIGTERM.
            environment: variables added to ours.
            heartbeat_timeout_s: seconds without output on stdout after which a serving child is
                killed and replaced; None disables the check.
            on_change: called in the event loop after `replica` changed.
        """
        self.name = name
        self.replica: Replica | None = None
        self.num_restarts = 0
        self.given_up = asyncio.Event()
        self.failure = ""
        self._command = list(command)
        self._environment = {**os.environ, **(environment or {})}
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._on_change = on_change
        self._process: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None
        self._backoff_s = FIRST_BACKOFF_S
        self._kills = OomKills()
        self._last_crash: signal.Signals | None = None
        self._num_same_crashes = 0
        self._heard = False
        self._hearing: asyncio.Task[None] | None = None
        self._pipe: asyncio.ReadTransport | None = None

    async def start(self, timeout_s: float) -> None:
        """Start the child, wait until it serves, and watch it from then on.

        Raises:
            EngineFailed: it ended, or did not serve within timeout_s.
        """
        await self._spawn(timeout_s)
        self._watch = asyncio.create_task(self._keep_alive(timeout_s), name=f"watch {self.name}")

    async def stop(self, grace_s: float) -> None:
        """Ask the child to drain and end; kill it after grace_s. Idempotent."""
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
            self._watch = None
        await self._end(grace_s)

    @property
    def pid(self) -> int | None:
        """PID of the running child, or None."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def _spawn(self, timeout_s: float) -> None:
        # Our own pipe: asyncio would wait for the end of its pipe, which the child's descendants
        # may hold open.
        reading, writing = os.pipe()
        output = asyncio.StreamReader()
        try:
            loop = asyncio.get_running_loop()
            self._pipe, _ = await loop.connect_read_pipe(
                lambda: asyncio.StreamReaderProtocol(output), os.fdopen(reading, "rb")
            )
            self._kills = OomKills()
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=writing,
                start_new_session=True,
                env=self._environment,
            )
        finally:
            os.close(writing)
        try:
            async with asyncio.timeout(timeout_s):
                replica = await self._read_ready(self._process, output)
        except TimeoutError:
            await self._end(0)
            raise EngineFailed(f"{self.name} did not start within {timeout_s:.0f} s") from None
        except BaseException:
            await self._end(0)
            await self._end_descendants(self._process.pid)
            raise
        self._hearing = asyncio.create_task(self._hear(output))
        self._set_replica(replica)

    async def _read_ready(self, process: asyncio.subprocess.Process, output: asyncio.StreamReader) -> Replica:
        reading, exiting = (
            asyncio.create_task(self._first_message(output)),
            asyncio.create_task(process.wait()),
        )
        try:
            await asyncio.wait([reading, exiting], return_when=asyncio.FIRST_COMPLETED)
            if reading.done() and (replica := reading.result()) is not None:
                return replica
            code = await exiting
        finally:
            reading.cancel()
            exiting.cancel()
        raise EngineFailed(
            f"{self.name} did not start ({self._ending(code)})", explained=is_explained(code), code=code
        )

    async def _first_message(self, output: asyncio.StreamReader) -> Replica | None:
        """Return the address at which the child serves; None if it ended before reporting one."""
        async for line in output:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                ready = json.loads(line)
                return Replica(self.name, str(ready["address"]), str(ready["start_id"]))
            logger.warning("%s wrote a line that is not a message of an engine", self.name)
        return None

    async def _keep_alive(self, timeout_s: float) -> None:
        while not self.given_up.is_set():
            try:
                process = self._process
                assert process is not None
                started = time.monotonic()
                code = await self._watch_heartbeat(process)
                self._set_replica(None)
                await self._end_descendants(process.pid)
                if time.monotonic() - started >= STABLE_AFTER_S:
                    self._backoff_s = FIRST_BACKOFF_S
                    self._last_crash = None
                # Other crashes of a serving child may be caused by a request, which the gateway
                # gives up after a while.
                if not self._gives_up(code if crash(code) == signal.SIGILL else None):
                    logger.error("%s died (%s); restarting it", self.name, self._ending(code))
                    await self._restart(timeout_s)
            except Exception:
                # No memory or descriptors, for example. Nothing else would start the child again.
                logger.exception("%s could not be replaced; retrying in %.1f s", self.name, self._backoff_s)
                await asyncio.sleep(self._backoff_s)

    async def _watch_heartbeat(self, process: asyncio.subprocess.Process) -> int:
        """Wait for the child's end, and kill it if it hangs; return its exit code."""
        exiting = asyncio.create_task(process.wait())
        # Counted in our own turns, not by the clock: if this process was stopped, the child is not
        # to blame.
        silent_turns, most = (
            0,
            None if self._heartbeat_timeout_s is None else max(1, round(self._heartbeat_timeout_s / TURN_S)),
        )
        try:
            while not exiting.done():
                await asyncio.wait([exiting], timeout=TURN_S)
                silent_turns = 0 if self._heard else silent_turns + 1
                self._heard = False
                if silent_turns == most and not exiting.done():
                    logger.error(
                        "%s hangs: no heartbeat for %g s; killing it", self.name, self._heartbeat_timeout_s
                    )
                    self._kills = OomKills()
                    with contextlib.suppress(ProcessLookupError):
                        process.kill()
            return exiting.result()
        finally:
            exiting.cancel()

    async def _restart(self, timeout_s: float) -> None:
        while True:
            await asyncio.sleep(self._backoff_s)
            self._backoff_s = min(2 * self._backoff_s, LONGEST_BACKOFF_S)
            try:
                await self._spawn(timeout_s)
            except (EngineFailed, OSError) as error:
                if self._gives_up(error.code if isinstance(error, EngineFailed) else None):
                    return
                logger.error("%s; retrying in %.1f s", error, self._backoff_s)
                continue
            self.num_restarts += 1
            logger.warning("%s serves again", self.name)
            return

    def _gives_up(self, code: int | None) -> bool:
        """Count a crash; return whether it was the last one allowed."""
        crashed = None if code is None else crash(code)
        if code is not None and self._kills.explain(code):
            crashed = signal.SIGKILL
        self._num_same_crashes = (
            0 if crashed is None else self._num_same_crashes + 1 if crashed == self._last_crash else 1
        )
        self._last_crash = crashed
        if code is None or self._num_same_crashes < MAX_SAME_CRASHES:
            return False
        self.failure = (
            f"{self.name} crashed {MAX_SAME_CRASHES} times in a row and will not be restarted "
            f"({self._ending(code)})"
        )
        logger.error("%s", self.failure)
        self.given_up.set()
        return True

    def _ending(self, code: int) -> str:
        return ending(code, out_of_memory=self._kills.explain(code))

    def _set_replica(self, replica: Replica | None) -> None:
        self.replica = replica
        self._on_change()

    async def _end(self, grace_s: float) -> None:
        self._set_replica(None)
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM if grace_s > 0 else signal.SIGKILL)
        try:
            async with asyncio.timeout(grace_s if grace_s > 0 else None):
                await process.wait()
        except TimeoutError:
            logger.warning("%s did not end within %.0f s; killing it", self.name, grace_s)
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        await self._end_descendants(process.pid)

    async def _end_descendants(self, pid: int) -> None:
        """End the child's descendants, which hold memory (perhaps of a GPU) that the next child
        needs."""
        if self._hearing is not None:
            self._hearing.cancel()
        if self._pipe is not None:
            self._pipe.close()
        left = await end_session(pid, DESCENDANTS_S)
        if left:
            logger.error(
                "processes %s of %s cannot be killed: they hang in the kernel",
                ", ".join(map(str, left)),
                self.name,
            )

    async def _hear(self, output: asyncio.StreamReader) -> None:
        """Read the output of a serving child, so that no pipe fills up. Any output is a
        heartbeat."""
        while await output.read(65536):
            self._heard = True
