"""A gateway's worker process, which tries to compile grammars (`cluster.grammars.worker`)."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time

from cluster.grammars.wire import Channel, Job, Verdict
from workers.errors import Overloaded

MAX_TRIAL_S = 30.0
"""Seconds after which a trial is given up that has not had its processor time yet."""


class WorkerProcess:
    """One worker process, started when first needed and again after it has ended. `tried` is called
    from one thread, with which the process ends; `close` from any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._connection: socket.socket | None = None
        self._closed = False

    def tried(self, job: Job) -> Verdict:
        """Return what the worker finds about a grammar.

        Raises:
            Overloaded: it had too little of the processor, was ended, or is closed.
        """
        deadline = time.monotonic() + MAX_TRIAL_S
        try:
            channel = self._started()
            channel.send_job(job, deadline)
            return channel.receive_verdict(deadline)
        except (OSError, EOFError):  # OSError has TimeoutError
            self._end()
            raise overloaded() from None

    def close(self) -> None:
        """End the process, and start no more."""
        with self._lock:
            self._closed = True
        self._end()

    @property
    def pid(self) -> int | None:
        """Process id; None if it is not running."""
        return self._process.pid if self._process is not None else None

    def _started(self) -> Channel:
        """Raises OSError."""
        with self._lock:
            if self._closed:
                raise OSError("closed")
            if self._channel is not None:
                return self._channel
            ours, its = socket.socketpair()
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "cluster.grammars.worker", str(os.getpid())],
                    stdin=its.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,  # messages of the compiler can quote a schema
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                    start_new_session=True,  # no signals from a terminal
                )
            except OSError:
                ours.close()
                raise
            finally:
                its.close()
            self._connection = ours
            self._channel = Channel(ours)
            return self._channel

    def _end(self) -> None:
        with self._lock:
            process, connection = self._process, self._connection
            self._process = self._channel = self._connection = None
        if process is not None:
            process.kill()
            process.wait()
        if connection is not None:
            # Wakes a thread that waits for the verdict.
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()


def overloaded() -> Overloaded:
    """Return the error of a check that cannot be made now."""
    return Overloaded("The server is at capacity for new schemas and grammars; retry after 1 s.")
