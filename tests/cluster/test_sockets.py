"""Sockets that cannot be bound: the setting to change is named."""

import socket

import pytest

from cluster.sockets import bound_socket, check_port_is_free
from workers.errors import ConfigError


def test_a_free_port_is_bound_and_let_go() -> None:
    with bound_socket("127.0.0.1", 0, "listen.http_port") as bound:
        port = bound.getsockname()[1]
    check_port_is_free("127.0.0.1", port, "listen.http_port")


def test_a_taken_port_names_its_setting() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(
            ConfigError,
            match=rf"127\.0\.0\.1 port {port}: Address already in use; set listen\.grpc_port to another",
        ):
            bound_socket("127.0.0.1", port, "listen.grpc_port")


def test_an_address_of_another_machine_names_the_host() -> None:
    # TEST-NET-1 of RFC 5737: no machine has it.
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1 .*; set listen\.host to an address of this machine"):
        bound_socket("192.0.2.1", 0, "listen.http_port")


def test_a_host_that_is_no_address() -> None:
    with pytest.raises(ConfigError, match=r"listen\.host 'no such host' is not an address of this machine"):
        bound_socket("no such host", 0, "listen.http_port")
