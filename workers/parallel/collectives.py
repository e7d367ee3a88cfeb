"""Communication between ranks while they compute. The model sees only this interface, so the same
code runs with one rank, over torch.distributed, and over threads in tests."""

import fcntl
import os
import socket
import struct
import time
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store, TCPStore

_SIOCGIFADDR = 0x8915
"""Linux ioctl for the IPv4 address of an interface."""
_MEET_POLL_S = 0.02


class Collectives(Protocol):
    """The ranks of one replica. Every rank makes the same calls in the same order, with tensors of
    equal shape and dtype."""

    @property
    def rank(self) -> int:
        """This rank's number, from 0."""

    @property
    def size(self) -> int:
        """Number of ranks."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in place if possible; return the sum."""

    def gather(self, tensor: Tensor) -> list[Tensor] | None:
        """Return every rank's tensor, by rank, on rank 0; None on the others."""

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Copy rank 0's values into every rank's `tensor`; return it."""

    def meet(self, place: str, timeout_s: float) -> None:
        """Wait on the host until every rank has reached this place; each place is used once. The
        other calls time out after a step, which is too short where one rank loads or compiles for
        longer than another.

        Raises:
            RuntimeError: not all ranks came in time.
        """


class Alone:
    """The collectives of a single rank, which exchanges nothing."""

    rank = 0
    size = 1

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return the tensor (see Collectives)."""
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor] | None:
        """Return the tensor in a list (see Collectives)."""
        return [tensor]

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Return the tensor (see Collectives)."""
        return tensor

    def meet(self, place: str, timeout_s: float) -> None:
        """Return at once (see Collectives)."""


class TorchDistributed:
    """Ranks over torch.distributed: NCCL between GPUs, gloo between CPUs. Partial sums travel in
    the model's dtype.

    A call that not every rank makes raises after the group's timeout.
    """

    def __init__(self, rank: int, size: int, store: Store, device: torch.device, *, timeout_s: float) -> None:
        """Join the other ranks; return when all are present.

        Args:
            store: store through which the ranks find each other, see `serve_store` and
                `join_store`.
        Raises:
            RuntimeError: not all ranks came in time, or they cannot reach each other.
        """
        self.rank = rank
        self.size = size
        self._store = store
        dist.init_process_group(
            backend="gloo" if device.type == "cpu" else "nccl",
            store=store,
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout_s),
            device_id=None if device.type == "cpu" else device,
        )

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks (see Collectives)."""
        dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor] | None:
        """Gather tensors on rank 0 (see Collectives)."""
        parts = [torch.empty_like(tensor) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(tensor, parts, dst=0)
        return parts

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Broadcast rank 0's tensor (see Collectives)."""
        dist.broadcast(tensor, src=0)
        return tensor

    def meet(self, place: str, timeout_s: float) -> None:
        """Wait for all ranks (see Collectives)."""
        meet_at(self._store, place, self.size, timeout_s)

    def close(self) -> None:
        """Leave the group."""
        dist.destroy_process_group()


def meet_at(store: Store, place: str, size: int, timeout_s: float) -> None:
    """Run `Collectives.meet` for `size` ranks that share a store."""
    key, deadline = f"cantata/{place}", time.monotonic() + timeout_s
    here = store.add(key, 1)
    # Polled: a blocking call would keep the group's own threads from the store.
    while here < size:
        if time.monotonic() > deadline:
            raise RuntimeError(f"after {timeout_s:g} s only {here} of {size} ranks have reached: {place}")
        time.sleep(_MEET_POLL_S)
        here = store.add(key, 0)


def serve_store(host: str, *, timeout_s: float) -> TCPStore:
    """Create rank 0's store, which all ranks join, at `host` and a free port (`.port`)."""
    return TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))


def join_store(host: str, port: int, *, timeout_s: float) -> TCPStore:
    """Join rank 0's store from another rank."""
    return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s))


def use_interface_of(host: str) -> None:
    """Make this process's collectives use the network interface with the IPv4 address `host`;
    called before any group is created.

    By default gloo uses the interface that the machine's own name resolves to, which may not reach
    the other ranks. Variables that the operator has set take precedence.

    Raises:
        OSError: no interface has that address.
    """
    name = interface_of(host)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # without the equals sign, eth1 matches eth10 too


def interface_of(host: str) -> str:
    """Return the name of the network interface with the IPv4 address `host`.

    Raises:
        OSError: there is none.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(answer[20:24]) == host:
                return name
    if host.startswith("127."):
        return "lo"
    raise OSError(f"no network interface of this node has the address {host}")
