"""Ports are free, and the kernel gives them to nobody before their server listens."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.ports import free_ports

_FIRST_GIVEN = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])


def test_ports_are_given_once_and_none_that_the_kernel_gives() -> None:
    ports = free_ports(3) + free_ports(3)
    assert len(set(ports)) == 6
    assert all(1023 < port < _FIRST_GIVEN for port in ports)


def test_a_port_on_which_somebody_listens_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = free_ports(2)
    monkeypatch.setattr("benchmarks.ports._ports", lambda: iter([first, second]))
    with socket.create_server(("127.0.0.1", first)):
        assert free_ports(1) == [second]


def test_workers_of_pytest_are_given_different_ports(with_benchmarks: dict[str, str]) -> None:
    command = [sys.executable, "-c", "from benchmarks.ports import free_ports; print(*free_ports(200))"]

    def ports_of(worker: int) -> set[str]:
        mine = {"PYTEST_XDIST_WORKER": f"gw{worker}", "PYTEST_XDIST_WORKER_COUNT": "3"}
        return set(subprocess.check_output(command, env=with_benchmarks | mine, text=True).split())

    ports = [ports_of(worker) for worker in range(3)]
    assert [len(found) for found in ports] == [200, 200, 200]
    assert len(set.union(*ports)) == 600
