"""Messages between an engine and its ranks, over ZMQ: a PUSH socket to each rank, one PULL socket back. Within a host they are Unix
sockets in a private folder, across hosts TCP on the engine's own address.

A message is three parts: the replica's secret, its kind, its body (msgpack). What does not carry the secret is dropped: on TCP anyone who
reaches the port could send plans otherwise. The channel is not encrypted; it belongs in a private network.
"""

import hmac
import logging
import shutil
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import msgpack
import zmq

logger = logging.getLogger(__name__)

# From a rank.
HELLO, PROGRESS, LOADED, READY, RESULT, LOGITS, FAILED = b"hello", b"progress", b"loaded", b"ready", b"result", b"logits", b"failed"
# To a rank.
JOIN, ALLOCATE, PLAN, COMPUTE_LOGITS, ALIVE, STOP = b"join", b"allocate", b"plan", b"compute logits", b"alive", b"stop"

Body = dict[str, object]


@dataclass(frozen=True, slots=True)
class Endpoints:
    """What a rank needs to reach its engine."""

    plans: str
    results: str
    secret: str


class EngineChannel:
    """The engine's end. `send` is called by one thread at a time, `receive` by another one.

    Args:
        num_ranks: ranks that will connect.
        host: address to bind for TCP; None: Unix sockets, all ranks are on this host.
    """

    def __init__(self, num_ranks: int, secret: str, *, host: str | None = None) -> None:
        self._secret = secret
        self._context = zmq.Context()
        self._folder = None if host is not None else Path(tempfile.mkdtemp(prefix="cantata-"))
        self._send_lock = threading.Lock()
        self._plans = [self._bind(zmq.PUSH, host, f"plans-{rank}") for rank in range(num_ranks)]
        self._results, self._results_address = self._bind(zmq.PULL, host, "results")

    def endpoints(self, rank: int) -> Endpoints:
        """For the rank of that number."""
        return Endpoints(self._plans[rank][1], self._results_address, self._secret)

    def send(self, rank: int, kind: bytes, body: bytes, *, connect_s: float = 0.0) -> None:
        """Queue a message; what a rank that is gone was to hear is dropped.

        Args:
            connect_s: how long to wait for a rank whose connection may not be there yet.
        """
        socket = self._plans[rank][0]
        with self._send_lock:
            if socket.poll(int(connect_s * 1000), zmq.POLLOUT):
                socket.send_multipart([self._secret.encode(), kind, body], zmq.DONTWAIT)

    def receive(self, timeout_s: float) -> tuple[bytes, bytes] | None:
        """(kind, body) of the next message of any rank; None: none came in time."""
        if not self._results.poll(max(int(timeout_s * 1000), 0)):
            return None
        return _checked(self._results.recv_multipart(), self._secret)

    def close(self) -> None:
        """Drop what is unsent; idempotent. Nobody may use the channel any more."""
        for socket, _ in self._plans:
            socket.close(linger=0)
        self._results.close(linger=0)
        self._context.term()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _bind(self, kind: zmq.SocketType, host: str | None, name: str) -> "tuple[zmq.Socket[bytes], str]":
        socket: zmq.Socket[bytes] = zmq.Socket(self._context, kind)
        socket.set(zmq.SNDHWM, 1000)
        if self._folder is not None:
            address = f"ipc://{self._folder / name}"
            socket.bind(address)
        else:
            port = socket.bind_to_random_port(f"tcp://{host}")
            address = f"tcp://{host}:{port}"
        return socket, address


class RankChannel:
    """A rank's end, for its one thread; `send` may be called by another one as well."""

    def __init__(self, endpoints: Endpoints) -> None:
        self._secret = endpoints.secret
        self._context = zmq.Context()
        self._lock = threading.Lock()
        self._plans: zmq.Socket[bytes] = self._context.socket(zmq.PULL)
        self._results: zmq.Socket[bytes] = self._context.socket(zmq.PUSH)
        self._plans.connect(endpoints.plans)
        self._results.connect(endpoints.results)

    def send(self, kind: bytes, body: bytes) -> None:
        """Queue a message."""
        with self._lock:
            self._results.send_multipart([self._secret.encode(), kind, body], zmq.DONTWAIT)

    def receive(self, timeout_s: float) -> tuple[bytes, bytes] | None:
        """(kind, body) of the next message; None: none came in time."""
        if not self._plans.poll(int(timeout_s * 1000)):
            return None
        return _checked(self._plans.recv_multipart(), self._secret)

    def close(self, linger_s: float = 2.0) -> None:
        """Send what is queued, for at most linger_s."""
        self._plans.close(linger=0)
        self._results.close(linger=int(linger_s * 1000))
        self._context.term()


def pack(**fields: object) -> bytes:
    """A message's body."""
    packed: bytes = msgpack.packb(fields)
    return packed


def unpack(body: bytes) -> Body:
    """The inverse of `pack`."""
    fields: Body = msgpack.unpackb(body)
    return fields


def _checked(parts: list[bytes], secret: str) -> tuple[bytes, bytes] | None:
    if len(parts) != 3 or not hmac.compare_digest(parts[0], secret.encode()):
        logger.warning("a message without the replica's secret was dropped: something else talks to the step channel")
        return None
    return parts[1], parts[2]
