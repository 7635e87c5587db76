"""Errors cross the wire whole: the table is total, and every error comes back as what it was."""

import grpc
import pytest
from google.rpc import code_pb2, error_details_pb2
from grpc_status import rpc_status
from softprompt_api import errors
from softprompt_api.rpc.status import BY_CODE, BY_REASON, CODES, from_rpc_error, to_status


def leaves(kind: type[errors.SoftpromptError] = errors.SoftpromptError) -> list[type[errors.SoftpromptError]]:
    """Every error but the base."""
    return [leaf for child in kind.__subclasses__() for leaf in (child, *leaves(child))]


def failed_call(error: errors.SoftpromptError) -> grpc.aio.AioRpcError:
    """What a client sees when a server answers with this error."""
    status = rpc_status.to_status(to_status(error))
    trailers = grpc.aio.Metadata(*status.trailing_metadata)
    return grpc.aio.AioRpcError(status.code, grpc.aio.Metadata(), trailers, details=status.details)


def test_the_table_has_every_error_and_no_other():
    assert set(CODES) == set(leaves())
    assert {leaf.reason: leaf for leaf in leaves()} == BY_REASON


@pytest.mark.parametrize("leaf", leaves(), ids=lambda leaf: leaf.__name__)
def test_every_error_comes_back_as_what_it_was(leaf):
    sent = leaf("what was wrong: é", field="config.token_dim", details={"did_you_mean": "tweets"})
    received = from_rpc_error(failed_call(sent))
    assert type(received) is leaf
    assert (received.message, received.field, received.details) == (sent.message, sent.field, sent.details)
    assert from_rpc_error(failed_call(leaf("plain"))).field == ""


def test_a_status_says_reason_and_field_to_clients_of_any_language():
    status = to_status(errors.AdapterInvalid("bad", field="config.token_dim"))
    assert status.code == code_pb2.INVALID_ARGUMENT
    info, bad_request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(bad_request)
    assert (info.reason, info.domain) == ("ADAPTER_INVALID", "softprompt")
    assert bad_request.field_violations[0].field == "config.token_dim"


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_a_status_that_grpc_made_itself_is_one_of_our_errors(code):
    received = from_rpc_error(grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details=""))
    assert type(received) is BY_CODE.get(code, errors.InternalError)
    assert received.message
