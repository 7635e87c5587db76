"""Errors as HTTP answers in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`.

`ANSWERS` is total over the leaves of `softprompt_api.errors`. What only HTTP can get wrong (paths, methods,
bodies, parameters) is a `Refused`.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson
from softprompt_api import errors
from starlette.responses import Response

INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"
INTERNAL_MESSAGE = "internal error; the gateway's log has the details under this request's x-request-id"


@contextmanager
def fields_spelled(**names: str) -> Iterator[None]:
    """Name fields in errors as this API's users spell them: the service's own field = the user's field."""
    try:
        yield
    except errors.SoftpromptError as error:
        error.field = names.get(error.field, error.field)
        raise


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """How one kind of error is answered."""

    status: int
    type: str
    code: str
    retry_after_s: int | None = None


ANSWERS: Mapping[type[errors.SoftpromptError], Answer] = {
    errors.InvalidArgument: Answer(status=400, type=INVALID_REQUEST, code="invalid_value"),
    errors.ContextLengthExceeded: Answer(status=400, type=INVALID_REQUEST, code="context_length_exceeded"),
    errors.Unsupported: Answer(status=400, type=INVALID_REQUEST, code="unsupported_parameter"),
    errors.AdapterInvalid: Answer(status=422, type=INVALID_REQUEST, code="adapter_invalid"),
    errors.AdapterNotFound: Answer(status=404, type=INVALID_REQUEST, code="adapter_not_found"),
    errors.AdapterConflict: Answer(status=409, type=INVALID_REQUEST, code="adapter_conflict"),
    errors.AdapterInUse: Answer(status=409, type=INVALID_REQUEST, code="adapter_conflict"),
    errors.AliasMoved: Answer(status=409, type=INVALID_REQUEST, code="adapter_conflict"),
    errors.Unauthenticated: Answer(status=401, type=INVALID_REQUEST, code="invalid_api_key"),
    errors.PermissionDenied: Answer(status=403, type=INVALID_REQUEST, code="permission_denied"),
    errors.KeyNotFound: Answer(status=404, type=INVALID_REQUEST, code="key_not_found"),
    errors.CursorExpired: Answer(status=410, type=INVALID_REQUEST, code="cursor_expired"),
    errors.BaseModelUnknown: Answer(status=503, type=SERVER_ERROR, code="base_model_unknown", retry_after_s=2),
    errors.Overloaded: Answer(status=503, type=SERVER_ERROR, code="overloaded", retry_after_s=1),
    errors.AdapterLoading: Answer(status=503, type=SERVER_ERROR, code="adapter_loading", retry_after_s=1),
    errors.RateLimited: Answer(status=429, type="rate_limit_error", code="rate_limit_exceeded", retry_after_s=1),
    errors.Unavailable: Answer(status=503, type=SERVER_ERROR, code="unavailable", retry_after_s=1),
    errors.DeadlineExceeded: Answer(status=504, type=SERVER_ERROR, code="deadline_exceeded"),
    errors.DataCorrupted: Answer(status=500, type=SERVER_ERROR, code="data_corrupted"),
    errors.InternalError: Answer(status=500, type=SERVER_ERROR, code="internal_error"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorBody:
    """One error, ready to be sent.

    Attributes:
        message: what was wrong and what to do.
        param: the request field at fault, None when none is.
    """

    answer: Answer
    message: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def json(self) -> bytes:
        """`{"error": {...}}`."""
        shape: dict[str, Any] = {
            "message": self.message,
            "type": self.answer.type,
            "param": self.param,
            "code": self.answer.code,
        }
        return orjson.dumps({"error": shape})

    def response(self) -> Response:
        """The HTTP response, with retry-after where trying again makes sense."""
        headers = dict(self.headers)
        if self.answer.retry_after_s is not None:
            headers.setdefault("retry-after", str(self.answer.retry_after_s))
        return Response(
            self.json(), status_code=self.answer.status, headers=headers, media_type="application/json"
        )


class Refused(Exception):
    """A request that HTTP's own rules or the request's shape forbid."""

    def __init__(
        self,
        message: str,
        *,
        code: str,
        status: int = 400,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        answer = Answer(status=status, type=INVALID_REQUEST, code=code)
        self.body = ErrorBody(answer=answer, message=message, param=param, headers=headers or {})


class ModelNotFound(Refused):
    """`model` names neither the base model nor an adapter."""

    def __init__(self, message: str, *, param: str = "model") -> None:
        super().__init__(message, code="model_not_found", status=404, param=param)


class ClientGone(Exception):
    """The client closed its connection; nobody reads an answer."""


def describe(error: Exception) -> ErrorBody:
    """The answer to any error; what is not ours to explain is an internal error without its text."""
    if isinstance(error, Refused):
        return error.body
    if isinstance(error, errors.SoftpromptError) and not isinstance(error, errors.InternalError):
        return ErrorBody(
            answer=ANSWERS[type(error)],
            message=error.message,
            param=error.field or None,
            headers=_headers_for(error),
        )
    return ErrorBody(answer=ANSWERS[errors.InternalError], message=INTERNAL_MESSAGE)


def _headers_for(error: errors.SoftpromptError) -> dict[str, str]:
    """What an error tells clients in headers."""
    if isinstance(error, errors.Unauthenticated):
        return {"www-authenticate": "Bearer"}
    if wait_ms := error.details.get("retry_after_ms"):
        told = {name: value for name, value in error.details.items() if name.startswith("x-ratelimit-")}
        return {"retry-after-ms": wait_ms, "retry-after": str(math.ceil(int(wait_ms) / 1000)), **told}
    return {}
