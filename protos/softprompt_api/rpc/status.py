"""Errors to gRPC statuses and back: the one table, with google.rpc details."""

from typing import cast

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from softprompt_api import errors

DOMAIN = "softprompt"

CODES: dict[type[errors.SoftpromptError], grpc.StatusCode] = {
    errors.InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    errors.ContextLengthExceeded: grpc.StatusCode.INVALID_ARGUMENT,
    errors.AdapterInvalid: grpc.StatusCode.INVALID_ARGUMENT,
    errors.Unsupported: grpc.StatusCode.INVALID_ARGUMENT,
    errors.AdapterNotFound: grpc.StatusCode.NOT_FOUND,
    errors.AdapterConflict: grpc.StatusCode.ALREADY_EXISTS,
    errors.AdapterInUse: grpc.StatusCode.FAILED_PRECONDITION,
    errors.AliasMoved: grpc.StatusCode.ABORTED,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.KeyNotFound: grpc.StatusCode.NOT_FOUND,
    errors.CursorExpired: grpc.StatusCode.OUT_OF_RANGE,
    errors.BaseModelUnknown: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.AdapterLoading: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.RateLimited: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.DataCorrupted: grpc.StatusCode.DATA_LOSS,
    errors.InternalError: grpc.StatusCode.INTERNAL,
}
BY_REASON = {leaf.reason: leaf for leaf in CODES}
# For statuses that gRPC itself makes, which carry no reason of ours.
BY_CODE: dict[grpc.StatusCode, type[errors.SoftpromptError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidArgument,
    grpc.StatusCode.NOT_FOUND: errors.AdapterNotFound,
    grpc.StatusCode.ALREADY_EXISTS: errors.AdapterConflict,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDenied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.Overloaded,
    grpc.StatusCode.UNAVAILABLE: errors.Unavailable,
    grpc.StatusCode.CANCELLED: errors.Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.DATA_LOSS: errors.DataCorrupted,
}


def to_status(error: errors.SoftpromptError) -> status_pb2.Status:
    """The google.rpc.Status of an error: ErrorInfo with its reason, BadRequest when a field is at fault."""
    details: list[any_pb2.Any] = []
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.details)
    details.append(_packed(info))
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.message)
        details.append(_packed(error_details_pb2.BadRequest(field_violations=[violation])))
    code: int = code_pb2.Code.Value(CODES[type(error)].name)
    return status_pb2.Status(code=code, message=error.message, details=details)


def from_rpc_error(error: grpc.RpcError) -> errors.SoftpromptError:
    """The error that a failed call stands for."""
    # Every failed call is both an RpcError and a Call; grpc types them apart.
    status = rpc_status.from_call(cast(grpc.Call, error)) if _has_trailers(error) else None
    if status is None:
        leaf = BY_CODE.get(error.code(), errors.InternalError)
        return leaf(error.details() or error.code().name.lower().replace("_", " "))
    info, bad_request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status.details:
        # Unpack fills its argument when the type fits, and leaves it otherwise.
        if not detail.Unpack(info):
            detail.Unpack(bad_request)
    field = bad_request.field_violations[0].field if bad_request.field_violations else ""
    leaf = BY_REASON.get(info.reason) or BY_CODE.get(error.code(), errors.InternalError)
    return leaf(status.message, field=field, details=dict(info.metadata))


def _has_trailers(error: grpc.RpcError) -> bool:
    return error.trailing_metadata() is not None


def _packed(message: error_details_pb2.ErrorInfo | error_details_pb2.BadRequest) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
