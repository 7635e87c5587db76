"""Ports that the services listen on: checked before anything starts."""

import errno
import socket

from softprompt.cli.problems import WrongUsage


def claim(host: str, port: int, flag: str) -> int:
    """The port to use: `port` itself if it is free, a free one for 0. WrongUsage names the flag otherwise."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            # As servers do: a port whose last connections still fade away is free.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(1)
            return int(listener.getsockname()[1])
    except OSError as error:
        raise WrongUsage(_message(host, port, flag, error)) from error


def _message(host: str, port: int, flag: str, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is taken: stop what listens there, or choose another with {flag}"
    if error.errno == errno.EACCES:
        return f"port {port} on {host} needs privileges: choose one above 1023 with {flag}"
    return f"cannot listen on {host}: {error.strerror or error}; check --host"
