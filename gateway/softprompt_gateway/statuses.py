"""Failed calls to the services behind the gateway, as errors in words fit for a client."""

import grpc
from softprompt_api import errors
from softprompt_api.rpc.status import from_rpc_error

_DETAILS_KEY = "grpc-status-details-bin"
# Statuses that gRPC itself makes tell hosts and ports, which are nobody's business outside.
_PLAIN_WORDS: dict[type[errors.SoftpromptError], str] = {
    errors.Unavailable: "is not available; try again",
    errors.DeadlineExceeded: "did not answer in time",
    errors.Overloaded: "cannot take a message this large or this many",
}


def translate(service: str, error: grpc.aio.AioRpcError) -> errors.SoftpromptError:
    """The error that a failed call to "registry" or "inference" stands for, in words fit for a client."""
    known = from_rpc_error(error)
    if any(key == _DETAILS_KEY for key, _ in error.trailing_metadata()):
        return known
    return type(known)(f"the {service} service {_PLAIN_WORDS.get(type(known), 'refused the call')}")
