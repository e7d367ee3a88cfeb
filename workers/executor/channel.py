"""Messages between an engine and its ranks, over ZMQ: a PUSH socket to each rank, one PULL socket
back. Within a host they are Unix sockets in a private folder; across hosts TCP on the engine's own
address, encrypted (CURVE) with keys drawn for this replica, without which messages can be neither
sent nor read.

A message has two parts: its kind and its body (msgpack).
"""

import threading
from contextlib import suppress
from dataclasses import dataclass, field

import msgpack
import zmq
from zmq.auth.thread import ThreadAuthenticator

from workers.errors import ConfigError
from workers.private_folder import PrivateFolder

# Kinds of messages from a rank.
HELLO, PROGRESS, LOADED, READY, RESULT, LOGITS, FAILED = (
    b"hello",
    b"progress",
    b"loaded",
    b"ready",
    b"result",
    b"logits",
    b"failed",
)
# Kinds of messages to a rank.
JOIN, ALLOCATE, PLAN, MASKS, COMPUTE_LOGITS, ALIVE, STOP = (
    b"join",
    b"allocate",
    b"plan",
    b"masks",
    b"compute logits",
    b"alive",
    b"stop",
)

Body = dict[str, object]


@dataclass(frozen=True, slots=True)
class Endpoints:
    """The addresses and keys with which a rank reaches its engine.

    Attributes:
        server_key, rank_key: the engine's public key and the ranks' secret key, for TCP (Z85); None
        for Unix sockets.
    """

    plans: str
    results: str
    server_key: str | None = None
    rank_key: str | None = field(default=None, repr=False)


class EngineChannel:
    """The engine's end. `send` is called by one thread at a time, `receive` by another one.

    Args:
        num_ranks: number of ranks that will connect.
        host: address to bind for TCP; None for Unix sockets, with all ranks on this host.
    Raises:
        ConfigError: there is no folder for the sockets, or libzmq has no encryption.
    """

    def __init__(self, num_ranks: int, *, host: str | None = None) -> None:
        self._context = zmq.Context()
        self._folder = None if host is not None else PrivateFolder()
        self._keys = None if host is None else _Keys(self._context)
        self._send_lock = threading.Lock()
        self._plans = [self._bind(zmq.PUSH, host, f"plans-{rank}") for rank in range(num_ranks)]
        self._results, self._results_address = self._bind(zmq.PULL, host, "results")

    def endpoints(self, rank: int) -> Endpoints:
        """Return the endpoints for a rank."""
        addresses = self._plans[rank][1], self._results_address
        return (
            Endpoints(*addresses)
            if self._keys is None
            else Endpoints(*addresses, self._keys.server_key, self._keys.rank_key)
        )

    def send(self, rank: int, kind: bytes, body: bytes, *, connect_s: float = 0.0) -> None:
        """Queue a message; messages to a rank that is gone are dropped.

        Args:
            connect_s: seconds to wait for a rank that may not have connected yet.
        """
        socket = self._plans[rank][0]
        # A rank can end between the two calls.
        with self._send_lock, suppress(zmq.Again):
            if socket.poll(int(connect_s * 1000), zmq.POLLOUT):
                socket.send_multipart([kind, body], zmq.DONTWAIT)

    def receive(self, timeout_s: float) -> tuple[bytes, bytes] | None:
        """Return (kind, body) of the next message of any rank; None if none came in time."""
        if not self._results.poll(max(int(timeout_s * 1000), 0)):
            return None
        return _parts(self._results)

    def close(self) -> None:
        """Drop unsent messages; idempotent. The channel must not be used afterwards."""
        for socket, _ in self._plans:
            socket.close(linger=0)
        self._results.close(linger=0)
        if self._keys is not None:
            self._keys.close()
        self._context.term()
        if self._folder is not None:
            self._folder.close()

    def _bind(self, kind: zmq.SocketType, host: str | None, name: str) -> "tuple[zmq.Socket[bytes], str]":
        socket: zmq.Socket[bytes] = zmq.Socket(self._context, kind)
        socket.set(zmq.SNDHWM, 1000)
        if self._folder is not None:
            address = f"ipc://{self._folder.path / name}"
            socket.bind(address)
        else:
            assert self._keys is not None
            self._keys.protect(socket)
            port = socket.bind_to_random_port(f"tcp://{host}")
            address = f"tcp://{host}:{port}"
        return socket, address


class RankChannel:
    """A rank's end, for its one thread; `send` may also be called by one other thread."""

    def __init__(self, endpoints: Endpoints) -> None:
        self._context = zmq.Context()
        self._lock = threading.Lock()
        self._plans: zmq.Socket[bytes] = self._context.socket(zmq.PULL)
        self._results: zmq.Socket[bytes] = self._context.socket(zmq.PUSH)
        if endpoints.server_key is not None and endpoints.rank_key is not None:
            secret = endpoints.rank_key.encode()
            for socket in (self._plans, self._results):
                socket.curve_serverkey = endpoints.server_key.encode()
                socket.curve_secretkey, socket.curve_publickey = secret, zmq.curve_public(secret)
        self._plans.connect(endpoints.plans)
        self._results.connect(endpoints.results)

    def send(self, kind: bytes, body: bytes) -> None:
        """Queue a message."""
        with self._lock:
            self._results.send_multipart([kind, body], zmq.DONTWAIT)

    def receive(self, timeout_s: float) -> tuple[bytes, bytes] | None:
        """Return (kind, body) of the next message; None if none came in time."""
        if not self._plans.poll(int(timeout_s * 1000)):
            return None
        return _parts(self._plans)

    def close(self, linger_s: float = 2.0) -> None:
        """Send queued messages for at most linger_s."""
        self._plans.close(linger=0)
        self._results.close(linger=int(linger_s * 1000))
        self._context.term()


def pack(**fields: object) -> bytes:
    """Encode a message's body."""
    packed: bytes = msgpack.packb(fields)
    return packed


def unpack(body: bytes) -> Body:
    """Decode a message's body, the inverse of `pack`."""
    fields: Body = msgpack.unpackb(body)
    return fields


def _parts(socket: "zmq.Socket[bytes]") -> tuple[bytes, bytes]:
    kind, body = socket.recv_multipart()
    return kind, body


class _Keys:
    """Key pairs of one replica: the engine's, and the one shared by all of its ranks. Closed before
    its context.

    Attributes:
        server_key: the engine's public key (Z85).
        rank_key: the ranks' secret key.
    """

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]") -> None:
        if not zmq.has("curve"):
            raise ConfigError(
                "ranks on several hosts need a libzmq with encryption (CURVE), as in pyzmq's wheels"
            )
        public, self._secret = zmq.curve_keypair()
        self._rank_public, rank_secret = zmq.curve_keypair()
        self.server_key, self.rank_key = public.decode(), rank_secret.decode()
        self._authenticator = ThreadAuthenticator(context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(domain="*", credentials_provider=self)

    def callback(self, domain: str, key: bytes) -> bool:
        """Return whether a peer with this public key is one of our ranks."""
        return key == self._rank_public

    def protect(self, socket: "zmq.Socket[bytes]") -> None:
        """Set up a socket's encryption, before it is bound."""
        socket.curve_server = True
        socket.curve_secretkey = self._secret

    def close(self) -> None:
        self._authenticator.stop()
