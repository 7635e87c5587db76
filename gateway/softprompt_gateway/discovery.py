"""Where replicas are: addresses that settings tell, and those that a name in DNS has now."""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Self

import structlog

_DNS = "dns:///"
_log = structlog.get_logger()

LookUp = Callable[[str, int], Awaitable[Iterable[str]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Places as settings spell them.

    Attributes:
        fixed: addresses as channels take them: one replica each.
        names: hosts and ports; each address of such a host is a replica.
    """

    fixed: tuple[str, ...] = ()
    names: tuple[tuple[str, int], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `host:port`, `unix:path` and `dns:///name:port`, joined by commas; else ValueError."""
        every = [place.strip() for place in text.split(",")]
        if len(set(every)) < len(every):
            raise ValueError(f"{text!r} names a place twice")
        if "" in every:
            raise ValueError(f"{text!r} must be host:port, dns:///name:port, or several of them, joined by ','")
        return cls(
            fixed=tuple(place for place in every if not place.startswith(_DNS)),
            names=tuple(_name(place) for place in every if place.startswith(_DNS)),
        )


def _name(place: str) -> tuple[str, int]:
    host, colon, port = place.removeprefix(_DNS).rpartition(":")
    if not colon or not host or not (port.isascii() and port.isdigit()) or not 1 <= int(port) <= 65_535:
        raise ValueError(f"{place!r} must be dns:///name:port")
    return host, int(port)


async def look_up(host: str, port: int) -> list[str]:
    """The addresses that a name has now, each with the port; OSError or UnicodeError where it has none."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(address[0]) for *_, address in found]
    return [f"[{address}]:{port}" if ":" in address else f"{address}:{port}" for address in addresses]


class Discovery:
    """Finds replicas again and again. What a name had stays where it cannot be looked up.

    Args:
        places: where to look.
        look_up: asks for the addresses of a name.
    """

    def __init__(self, places: Places, look_up: LookUp = look_up) -> None:
        self._places = places
        self._look_up = look_up
        self._found: dict[tuple[str, int], frozenset[str]] = {}

    @property
    def may_change(self) -> bool:
        """Whether there are names, whose addresses come and go."""
        return bool(self._places.names)

    @property
    def addresses(self) -> list[str]:
        """All addresses, as far as they are known."""
        return list(dict.fromkeys([*self._places.fixed, *sorted(frozenset().union(*self._found.values()))]))

    async def refresh(self) -> None:
        """Look every name up."""
        for host, port in self._places.names:
            try:
                self._found[host, port] = frozenset(await self._look_up(host, port))
            except (OSError, UnicodeError) as error:
                _log.warning("a name of inference replicas cannot be looked up", name=host, cause=str(error))
