"""A server that can reach nothing but loopback, and a way in for clients outside.

Ray listens on all interfaces. Where we may make network namespaces, a server is started in one of
its own that has loopback only, and `Relay` carries connections from a port out here to one in
there. Elsewhere the server runs on this machine's loopback as it is.
"""

import asyncio
import contextlib
import ctypes
import functools
import os
import shutil
import subprocess
import threading
from collections.abc import Sequence
from types import TracebackType

CLONE_NEWNET = 0x40000000


@functools.cache
def can_isolate() -> bool:
    """Return whether this process may make network namespaces and enter them."""
    if os.geteuid() != 0 or shutil.which("unshare") is None or shutil.which("ip") is None:
        return False
    return (
        subprocess.run(
            ["unshare", "--net", "ip", "link", "set", "lo", "up"], capture_output=True, check=False
        ).returncode
        == 0
    )


def isolated(command: Sequence[str]) -> list[str]:
    """Return the command, to be run in a new namespace with loopback only; its process id is that
    of the started program."""
    return ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command]


class Relay:
    """A relay that accepts connections on a free port of our loopback and connects each to
    127.0.0.1:port in the namespace of a process.

    A thread of its own is moved into the namespace; what it listens on was opened before, out here.
    An end that closes its connection closes the other end's.
    """

    def __init__(self, pid: int, port: int) -> None:
        self._pid = pid
        self._target = port
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"relay to {port}", daemon=True)

    def __enter__(self) -> "Relay":
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise RuntimeError("the relay cannot enter the namespace") from self._failure
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self._failure = error
            self._ready.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        self.port: int = server.sockets[0].getsockname()[1]
        namespace = os.open(f"/proc/{self._pid}/ns/net", os.O_RDONLY)
        try:
            if ctypes.CDLL(None, use_errno=True).setns(namespace, CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "setns")
        finally:
            os.close(namespace)
        self._ready.set()
        await self._stop.wait()
        server.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.close()
            return
        directions = [
            asyncio.create_task(_pump(reader, inner_writer)),
            asyncio.create_task(_pump(inner_reader, writer)),
        ]
        try:
            await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for direction in directions:
                direction.cancel()
            for end in (writer, inner_writer):
                end.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
