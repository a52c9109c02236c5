"""What tests/e2e/ports.py promises to tests that run side by side."""

import socket
import subprocess
import sys

import pytest
from ports import HOST, PORTS, free_port

TAKEN = "import socket, sys; socket.socket().bind(('127.0.0.1', int(sys.argv[1])))"


def test_a_port_is_the_servers_that_was_told_it_and_again_after_a_restart() -> None:
    port = free_port()
    for _ in range(2):
        with socket.create_server((HOST, port)) as server, socket.create_connection((HOST, port)) as client:
            server.accept()[0].close()
            assert client.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, port))


def test_nobody_else_is_given_it() -> None:
    port = free_port()
    assert PORTS[0] <= port < PORTS[1]
    other = subprocess.run([sys.executable, "-c", TAKEN, str(port)], capture_output=True, text=True, check=False)
    assert "Address already in use" in other.stderr
    with socket.socket() as ours, pytest.raises(OSError, match="in use"):
        ours.bind((HOST, port))
