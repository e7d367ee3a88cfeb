"""Output that ends nothing and holds nothing up: what a process prints goes through a queue and a thread of its own.

A log may be full, a pipe may have lost its reader or have one that does not read. Python's own streams raise or block then, in whatever
happens to print: a step, an event loop, the restart of an engine.
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
"""Of what is printed and not yet taken; what comes then is dropped."""
_LAST_WORDS_S = 2.0
"""For the end of a log to be taken when the process ends."""


class QueuedOutput(io.TextIOBase):
    """A text stream whose writes neither raise nor wait.

    Attributes:
        num_dropped_lines: written and lost, because there was no room in the queue or writing failed.

    Args:
        descriptor: where a thread writes what was printed.
        max_bytes: of the queue.
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
        # From the first piece that finds no room to the end of a line after there is room again.
        self._dropping = False
        self._in_line = False
        # Reentrant: a signal handler may print while its thread does.
        self._changed = threading.Condition(threading.RLock())
        self._thread = threading.Thread(target=self._run, name=f"cantata-output-{descriptor}", daemon=True)
        self._thread.start()

    def write(self, text: str) -> int:
        """Take the text; always all of it."""
        data = text.encode("utf-8", "backslashreplace")
        with self._changed:
            if self._closing:
                self._write_at_once(data)
            elif data:
                self._take(data)
        return len(text)

    def flush(self) -> None:
        """Nothing: what was written is on its way. See `drain`."""

    def drain(self, timeout_s: float) -> bool:
        """Wait until all that was printed has been written, at most so long; whether it has."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue and not self._writing, max(deadline - time.monotonic(), 0))

    def finish(self) -> None:
        """For the end of the process: what is printed after this is written at once, where it can be."""
        self.drain(_LAST_WORDS_S)
        self._closing = True

    def fileno(self) -> int:
        """See io.IOBase."""
        return self._descriptor

    def isatty(self) -> bool:
        """See io.IOBase."""
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        """See io.IOBase."""
        return True

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._queue))
                data = b"".join(self._queue)
                self._queue.clear()
                # Counted until it is written: a blocked write must not make room for another megabyte.
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
            # Half-empty again, and a line begins: what comes next is taken.
            self._dropping = not (data.endswith(b"\n") and self._num_bytes <= self._max_bytes // 2)
            return
        lost = self.num_dropped_lines - self._num_told
        if lost:
            self._num_told = self.num_dropped_lines
            self._append(f"{chr(10) * self._in_line}cantata: {lost} lines of this log could not be written and are lost\n".encode())
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
            except BlockingIOError:  # whoever shares the descriptor has made it so
                select.select((), (self._descriptor,), ())
            except (OSError, ValueError):
                return False
        return True

    def _write_at_once(self, data: bytes) -> None:
        with contextlib.suppress(OSError, ValueError):
            if select.select((), (self._descriptor,), (), 0)[1]:
                os.write(self._descriptor, data[: select.PIPE_BUF])


def keep_output_from_failing() -> None:
    """From here on this process prints through queues. Call it before anything keeps `sys.stderr`, such as a log's handler.

    Streams that are not the process's own, as in tests, stay as they are; one that was closed when the process started leads nowhere.
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
    """Before `os._exit`, which runs nothing else: let what was printed be written."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, QueuedOutput):
            stream.drain(timeout_s)


def _occupy(descriptor: int) -> None:
    """Open nothing as this descriptor, so that no socket gets its number and with it what libraries print there."""
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
