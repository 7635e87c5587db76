"""Ports are checked before anything starts."""

import socket

import pytest
from softprompt.cli import ports
from softprompt.cli.problems import WrongUsage


def test_a_free_port_is_claimed_as_it_is() -> None:
    port = ports.claim("127.0.0.1", 0, "--port")
    assert port > 0
    assert ports.claim("127.0.0.1", port, "--port") == port


def test_a_taken_port_is_named_with_its_flag() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(WrongUsage, match=f"port {port} on 127.0.0.1 is taken: .* with --registry-port"):
            ports.claim("127.0.0.1", port, "--registry-port")


def test_ports_that_are_claimed_together_are_different() -> None:
    with ports.Claims() as claims:
        claimed = [claims.claim("127.0.0.1", 0, "--inference-port") for _ in range(8)]
        assert len(set(claimed)) == 8
        with pytest.raises(WrongUsage, match=f"port {claimed[3]} on 127.0.0.1 is taken: .* with --port"):
            claims.claim("127.0.0.1", claimed[3], "--port")
    assert ports.claim("127.0.0.1", claimed[3], "--port") == claimed[3]


def test_a_port_beyond_the_last_is_named() -> None:
    with pytest.raises(WrongUsage, match="there is no port 65536: choose a lower one with --inference-port"):
        ports.claim("127.0.0.1", 65_536, "--inference-port")


def test_a_host_that_is_not_ours_is_named() -> None:
    with pytest.raises(WrongUsage, match=r"cannot listen on 192.0.2.1: .*; check --host"):
        ports.claim("192.0.2.1", 2242, "--port")
