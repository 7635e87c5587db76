"""Ports for servers of benchmarks and tests, which listen a moment after their port was chosen."""

import contextlib
import itertools
import os
import random
import socket
from collections.abc import Iterator
from functools import cache
from pathlib import Path


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on, each given once.

    The kernel gives them to nobody either: they lie below those it chooses for connections and for port 0. Of
    several pytest workers each has its own.
    """
    return list(itertools.islice(filter(_is_free, _ports()), count))


@cache
def _ports() -> Iterator[int]:
    first_given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    num_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    ports = range(first_given // 2 + worker, first_given, num_workers)
    # Somewhere, so that a second run beside this one starts elsewhere.
    start = random.randrange(len(ports))
    return itertools.cycle([*ports[start:], *ports[:start]])


def _is_free(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
        return True
    return False
