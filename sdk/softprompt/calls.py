"""Calls of the services from Python: what fails is raised as an error of softprompt_api.errors."""

import contextlib
from collections.abc import Iterator
from types import TracebackType
from typing import Self

import grpc
from softprompt_api.errors import Unavailable
from softprompt_api.rpc.channel import open_blocking_channel
from softprompt_api.rpc.status import from_rpc_error
from softprompt_api.rpc.tls import ClientTls


class ServiceClient:
    """A connection to a service; close it, or use it in a `with`.

    Args:
        service: what it is, in words.
        address: `host:port` of its gRPC.
        tls: how it is called; None: without TLS.
    """

    def __init__(self, service: str, address: str, tls: ClientTls | None) -> None:
        self._service = service
        self._address = address
        self._tls = tls
        self._channel = open_blocking_channel(address, tls)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Raise the error that a failed call stands for."""
        try:
            yield
        except grpc.RpcError as error:
            meant = from_rpc_error(error)
            # gRPC's own text for "nobody is there" speaks of sockets; a service's own words stay.
            if isinstance(meant, Unavailable) and not error.trailing_metadata():
                believed = "" if self._tls is None else f" with a certificate of an authority in {self._tls.ca}"
                raise Unavailable(
                    f"no {self._service} answers at {self._address}{believed}: "
                    "start one with `softprompt run`, or give its address"
                ) from error
            raise meant from error
