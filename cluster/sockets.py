"""Listening sockets, bound before any slow start-up work."""

import errno
import socket

from workers.errors import ConfigError


def bound_socket(host: str, port: int, setting: str) -> socket.socket:
    """Return a TCP socket bound to host:port that does not listen yet; the caller closes it. Port 0
    selects a free port.

    Raises:
        ConfigError: the port is in use, or the address is not this machine's; names `setting`.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError:
        raise ConfigError(f"listen.host {host!r} is not an address of this machine") from None
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        change = (
            "listen.host to an address of this machine"
            if error.errno == errno.EADDRNOTAVAIL
            else f"{setting} to another"
        )
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}; set {change}") from None
    return bound


def check_port_is_free(host: str, port: int, setting: str) -> None:
    """Bind and close: for ports that another process will bind later.

    Raises:
        ConfigError: as in `bound_socket`.
    """
    bound_socket(host, port, setting).close()
