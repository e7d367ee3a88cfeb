"""Output that never raises and never blocks: a queue, and a thread that writes it.

The disk under a log may be full, or a pipe may have no reader or a slow one. Python's own streams
then raise or block: in a step, in an event loop, or while an engine restarts.
"""

import atexit
import collections
import contextlib
import io
import os
import select
import sys
import threading
import time

MAX_QUEUED_BYTES = 1 << 20
"""Size of the queue of each stream; further output is dropped and counted."""
_LAST_WORDS_S = 2.0
"""Seconds to write the rest of the queue when the process ends."""


class QueuedOutput(io.TextIOBase):
    """A text stream whose writes neither raise nor wait.

    Attributes:
        num_dropped_lines: lines lost because the queue was full or writing failed.

    Args:
        descriptor: file descriptor that the thread writes to.
        max_bytes: size of the queue.
    """

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, descriptor: int, max_bytes: int = MAX_QUEUED_BYTES) -> None:
        self.num_dropped_lines = 0
        self._descriptor = descriptor
        self._max_bytes = max_bytes
        self._queue: collections.deque[bytes] = collections.deque()
        self._num_bytes = 0
        self._num_told = 0
        self._writing = False
        self._closing = False
        # Set from the first piece that does not fit to the end of a line after there is room again.
        self._dropping = False
        self._in_line = False
        # Reentrant: a signal handler may print while its thread does.
        self._changed = threading.Condition(threading.RLock())
        self._thread = threading.Thread(target=self._run, name=f"cantata-output-{descriptor}", daemon=True)
        self._thread.start()

    def write(self, text: str) -> int:
        """Queue the text. Return its length, even if it is dropped."""
        data = text.encode("utf-8", "backslashreplace")
        with self._changed:
            if self._closing:
                self._write_at_once(data)
            elif data:
                self._take(data)
        return len(text)

    def flush(self) -> None:
        """Do nothing: the thread writes at once. `drain` waits for it."""

    def drain(self, timeout_s: float) -> bool:
        """Wait until the queue is written, at most `timeout_s`; return whether it is."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            return self._changed.wait_for(
                lambda: not self._queue and not self._writing,
                max(deadline - time.monotonic(), 0),
            )

    def finish(self) -> None:
        """Drain at the end of the process; later output is written directly if that does not
        block."""
        self.drain(_LAST_WORDS_S)
        self._closing = True

    def fileno(self) -> int:
        """Return the file descriptor (see io.IOBase)."""
        return self._descriptor

    def isatty(self) -> bool:
        """Return whether the descriptor is a terminal (see io.IOBase)."""
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        """Return True (see io.IOBase)."""
        return True

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._queue))
                data = b"".join(self._queue)
                self._queue.clear()
                # Counted until written: a blocked write must not make room for another megabyte.
                self._writing = True
            written = self._write(data)
            with self._changed:
                self._num_bytes -= len(data)
                if not written:
                    self.num_dropped_lines += data.count(b"\n")
                self._writing = False
                self._changed.notify_all()

    def _take(self, data: bytes) -> None:
        if self._num_bytes + len(data) > self._max_bytes:
            self._dropping = True
        if self._dropping:
            self.num_dropped_lines += data.count(b"\n")
            # The queue is half empty again and a line begins: what follows is accepted.
            self._dropping = not (data.endswith(b"\n") and self._num_bytes <= self._max_bytes // 2)
            return
        lost = self.num_dropped_lines - self._num_told
        if lost:
            self._num_told = self.num_dropped_lines
            note = f"cantata: {lost} lines of this log could not be written and were dropped\n"
            self._append(f"{chr(10) * self._in_line}{note}".encode())
        self._append(data)
        self._changed.notify_all()

    def _append(self, data: bytes) -> None:
        self._queue.append(data)
        self._num_bytes += len(data)
        self._in_line = not data.endswith(b"\n")

    def _write(self, data: bytes) -> bool:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._descriptor, view) :]
            except BlockingIOError:  # another process that shares the descriptor has made it non-blocking
                select.select((), (self._descriptor,), ())
            except (OSError, ValueError):
                return False
        return True

    def _write_at_once(self, data: bytes) -> None:
        with contextlib.suppress(OSError, ValueError):
            if select.select((), (self._descriptor,), (), 0)[1]:
                os.write(self._descriptor, data[: select.PIPE_BUF])


def keep_output_from_failing() -> None:
    """Replace `sys.stdout` and `sys.stderr` by queued outputs.

    Call it before anything stores `sys.stderr`, such as a log handler. Streams that are not the
    process's own, as in tests, stay as they are. A stream that was closed when the process started
    is connected to the null device.
    """
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            _occupy(descriptor)
            setattr(sys, name, QueuedOutput(descriptor))
        elif isinstance(stream, io.TextIOWrapper) and _descriptor_of(stream) == descriptor:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
            setattr(sys, name, QueuedOutput(descriptor))
        else:
            continue
        atexit.register(getattr(sys, name).finish)


def drain_output(timeout_s: float = _LAST_WORDS_S) -> None:
    """Write the queued output; call it before `os._exit`, which runs no exit handlers."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, QueuedOutput):
            stream.drain(timeout_s)


def _occupy(descriptor: int) -> None:
    """Open the null device as this descriptor if it is unused.

    Otherwise a socket could get its number and receive what libraries print there.
    """
    try:
        os.fstat(descriptor)
    except OSError:
        nowhere = os.open(os.devnull, os.O_RDWR)
        if nowhere != descriptor:
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


def _descriptor_of(stream: io.TextIOWrapper) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError):
        return None
