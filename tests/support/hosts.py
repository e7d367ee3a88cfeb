"""Two hosts on one machine, joined by a switch whose cables can be cut: each host is a network
namespace with an address of its own, and a mount namespace with a disk and a /dev/shm of its own,
so that whatever is left on it can be seen, and is gone when the host is.
"""

import functools
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

DISK = "/mnt"
"""Path of a host's own disk, empty at first; the host's environment points programs to it
(TMPDIR)."""
SHARED_MEMORY = "/dev/shm"
_CABLE = "eth0"


@dataclass(frozen=True)
class Host:
    """One host.

    Attributes:
        number: counted from 1.
        pid: process that keeps its namespaces alive.
    """

    number: int
    pid: int

    @property
    def address(self) -> str:
        """Address at which the other hosts reach it."""
        return f"10.77.0.{self.number}"

    def command(self, command: Sequence[str]) -> list[str]:
        """Return the command, to be run on this host in our working directory; its process id is
        that of the started program."""
        return ["nsenter", f"--target={self.pid}", "--net", "--mount", "--wd", *command]

    def files(self, folder: str) -> list[Path]:
        """Return the files in a folder of this host, as seen from outside, folders left out."""
        return [path for path in Path(f"/proc/{self.pid}/root{folder}").rglob("*") if not path.is_dir()]


class Network:
    """Hosts and the switch between them."""

    def __init__(self, hosts: Sequence[Host], switch: int) -> None:
        self.hosts = tuple(hosts)
        self._switch = switch

    def cut(self, host: Host) -> None:
        """Cut the cable between the host and the others. The host can still reach itself: as with a
        cable, its address stays."""
        self._set(host, "down")

    def mend(self, host: Host) -> None:
        """Undo `cut`."""
        self._set(host, "up")

    def _set(self, host: Host, state: str) -> None:
        _run(_in(self._switch, ["ip", "link", "set", _port(host), state]))


def reason_for_no_hosts() -> str | None:
    """Return the reason for which hosts cannot be made here; None if they can."""
    if os.geteuid() != 0:
        return "network and mount namespaces need root"
    missing = [tool for tool in ("ip", "unshare", "nsenter") if shutil.which(tool) is None]
    return f"{' and '.join(missing)} not installed" if missing else _refusal()


@functools.cache
def _refusal() -> str | None:
    try:
        with network(2):
            return None
    except subprocess.CalledProcessError as error:
        return f"this user may not do it: {' '.join(error.cmd)}: {error.stderr.strip()}"


@contextmanager
def network(num_hosts: int) -> Iterator[Network]:
    """Yield this many hosts, which reach each other and nothing else; the starter of a process on
    them must end it.

    Raises:
        CalledProcessError: not allowed here.
    """
    with ExitStack() as stack:
        switch = stack.enter_context(_namespaces("--net"))
        _run(_in(switch, ["ip", "link", "add", "switch", "type", "bridge"]))
        _run(_in(switch, ["ip", "link", "set", "switch", "up"]))
        hosts = [
            Host(number, stack.enter_context(_namespaces("--net", "--mount")))
            for number in range(1, num_hosts + 1)
        ]
        for host in hosts:
            port, inside = _port(host), functools.partial(_in, host.pid)
            _run(
                _in(
                    switch,
                    [
                        "ip",
                        "link",
                        "add",
                        port,
                        "type",
                        "veth",
                        "peer",
                        "name",
                        _CABLE,
                        "netns",
                        str(host.pid),
                    ],
                )
            )
            _run(_in(switch, ["ip", "link", "set", port, "master", "switch", "up"]))
            _run(inside(["ip", "link", "set", "lo", "up"]))
            _run(inside(["ip", "address", "add", f"{host.address}/24", "dev", _CABLE]))
            _run(inside(["ip", "link", "set", _CABLE, "up"]))
            for folder in (DISK, SHARED_MEMORY):
                _run(inside(["mount", "-t", "tmpfs", "tmpfs", folder]))
        yield Network(hosts, switch)


@contextmanager
def _namespaces(*kinds: str) -> Iterator[int]:
    """Make new namespaces; return the id of an idle process in them."""
    # It reports when it is there, and ends with us: its input is a pipe that we hold.
    holder = subprocess.Popen(
        ["unshare", *kinds, "sh", "-c", "echo && exec cat >/dev/null"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stderr is not None
        if not holder.stdout.readline():
            raise subprocess.CalledProcessError(
                holder.wait(), ["unshare", *kinds], stderr=holder.stderr.read()
            )
        try:
            yield holder.pid
        finally:
            holder.kill()


def _in(pid: int, command: Sequence[str]) -> list[str]:
    return ["nsenter", f"--target={pid}", "--net", *(["--mount"] if command[0] == "mount" else []), *command]


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _port(host: Host) -> str:
    return f"port-{host.number}"
