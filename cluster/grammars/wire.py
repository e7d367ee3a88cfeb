"""What a gateway and its worker process say to each other: a grammar with limits, and a verdict."""

import json
import socket
import struct
import time
from dataclasses import asdict, dataclass
from typing import Literal

MAX_CPU_S = 2.0
"""Maximum processor time, in seconds, that a grammar may take to compile."""
QUICK_CPU_S = 0.25
"""Processor time, in seconds, in which most grammars compile."""
MAX_BYTES = 512 * 2**20
"""Maximum address space, in bytes, that a grammar may take to compile."""

_HEAD = struct.Struct("!dQII")
_LENGTH = struct.Struct("!I")

End = Literal["cpu", "memory", "crash"]
"""How the trial of a grammar ended that did not come to a verdict of its own."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a worker found.

    Attributes:
        reason: why the grammar does not compile; empty if it does.
        place: where in the schema, such as `.properties.a.pattern`; empty for the whole.
        ended: how the trial ended, if it did not finish.
    """

    reason: str = ""
    place: str = ""
    ended: End | None = None

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def decode(text: bytes) -> "Verdict":
        return Verdict(**json.loads(text))


@dataclass(frozen=True, slots=True)
class Job:
    """A grammar to try, and what it may take.

    Attributes:
        cpu_s: processor time in seconds.
        max_bytes: address space in bytes.
        beginning: a text with which texts of the grammar must be able to begin.
    """

    text: str
    cpu_s: float = MAX_CPU_S
    max_bytes: int = MAX_BYTES
    beginning: str = ""


class Channel:
    """One end of the connection.

    Args:
        connection: a stream socket.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def send_job(self, job: Job, deadline: float) -> None:
        """Raises OSError, TimeoutError after the deadline (of `time.monotonic`)."""
        text, beginning = job.text.encode(), job.beginning.encode()
        self._set_timeout(deadline)
        head = _HEAD.pack(job.cpu_s, job.max_bytes, len(text), len(beginning))
        self._connection.sendall(head + text + beginning)

    def receive_job(self) -> Job:
        """Wait for a job. Raises EOFError after the last."""
        cpu_s, max_bytes, *lengths = _HEAD.unpack(self._receive(_HEAD.size, None))
        text, beginning = (self._receive(length, None).decode() for length in lengths)
        return Job(text, cpu_s, max_bytes, beginning)

    def send_verdict(self, verdict: bytes) -> None:
        self._connection.sendall(_LENGTH.pack(len(verdict)) + verdict)

    def receive_verdict(self, deadline: float) -> Verdict:
        """Raises OSError, TimeoutError after the deadline, EOFError if the worker has ended."""
        (length,) = _LENGTH.unpack(self._receive(_LENGTH.size, deadline))
        return Verdict.decode(self._receive(length, deadline))

    def _receive(self, length: int, deadline: float | None) -> bytes:
        received = bytearray()
        while len(received) < length:
            if deadline is not None:
                self._set_timeout(deadline)
            part = self._connection.recv(min(length - len(received), 1 << 16))
            if not part:
                raise EOFError
            received += part
        return bytes(received)

    def _set_timeout(self, deadline: float) -> None:
        if (remaining_s := deadline - time.monotonic()) <= 0:
            raise TimeoutError
        self._connection.settimeout(remaining_s)
