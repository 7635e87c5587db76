"""Calls of the services from Python: what fails is raised as an error of softprompt_api.errors."""

import contextlib
from collections.abc import Iterator

import grpc
from softprompt_api.errors import Unavailable
from softprompt_api.rpc.status import from_rpc_error


@contextlib.contextmanager
def translated(service: str, address: str) -> Iterator[None]:
    """Raise the error that a failed call to a service stands for."""
    try:
        yield
    except grpc.RpcError as error:
        meant = from_rpc_error(error)
        # gRPC's own text for "nobody is there" speaks of sockets; a service's own words stay.
        if isinstance(meant, Unavailable) and not error.trailing_metadata():
            raise Unavailable(
                f"no {service} answers at {address}: start one with `softprompt run`, or give its address"
            ) from error
        raise meant from error
