"""Ports that the services listen on: checked before anything starts."""

import contextlib
import errno
import socket
from types import TracebackType
from typing import Self

from softprompt.cli.problems import WrongUsage

_LAST_PORT = 65_535


class Claims:
    """Ports that are claimed together, each for one service. A context manager: at its end they are free again."""

    def __init__(self) -> None:
        self._held = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._held.close()

    def claim(self, host: str, port: int, flag: str) -> int:
        """The port to use: `port` itself if it is free, a free one for 0. WrongUsage names the flag otherwise."""
        if port > _LAST_PORT:
            raise WrongUsage(f"there is no port {port}: choose a lower one with {flag}")
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            listener = self._held.enter_context(socket.socket(family, socket.SOCK_STREAM))
            # As servers do: a port whose last connections still fade away is free.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(1)
            return int(listener.getsockname()[1])
        except OSError as error:
            raise WrongUsage(_message(host, port, flag, error)) from error


def claim(host: str, port: int, flag: str) -> int:
    """One port, looked at alone."""
    with Claims() as claims:
        return claims.claim(host, port, flag)


def _message(host: str, port: int, flag: str, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is taken: stop what listens there, or choose another with {flag}"
    if error.errno == errno.EACCES:
        return f"port {port} on {host} needs privileges: choose one above 1023 with {flag}"
    return f"cannot listen on {host}: {error.strerror or error}; check --host"
