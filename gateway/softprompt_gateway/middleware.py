"""The app's outermost layer, in plain ASGI: request ids, the access log, metrics, and the last resort for errors.

Plain ASGI, because BaseHTTPMiddleware hides the client's disconnect from the routes.
"""

import asyncio
import re
import time
import uuid

import structlog
from softprompt_api.errors import Overloaded, Unavailable
from softprompt_api.rpc.context import enter_request
from softprompt_api.tracing import Span, Tracer, serve
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from softprompt_gateway.admission import QUIET_PATHS, Admission, stopping
from softprompt_gateway.caller import Caller
from softprompt_gateway.errors import ClientGone, Refused, describe
from softprompt_gateway.metrics import METHODS, Metrics
from softprompt_gateway.rates import Meter

_PRINTABLE = re.compile(rb"[\x21-\x7e]{1,128}\Z")
_MAX_HEADERS = 128
_TRACE_HEADERS = frozenset({b"traceparent", b"tracestate"})
# What nginx logs for a client that left; nobody receives it.
CLIENT_GONE_STATUS = 499
_log = structlog.get_logger()


def request_id(scope: Scope) -> str:
    """The client's own id if it sent exactly one that is short and printable, otherwise a new one."""
    sent: list[bytes] = [value for name, value in scope["headers"] if name == b"x-request-id"]
    if len(sent) == 1 and _PRINTABLE.match(sent[0]):
        return sent[0].decode("ascii")
    return uuid.uuid4().hex


def _check_headers(scope: Scope) -> None:
    if len(scope["headers"]) > _MAX_HEADERS:
        raise Refused(f"more than {_MAX_HEADERS} headers", code="invalid_http", status=431)


class Edge:
    """Give every request an id and every error an answer; log, count and trace every answer."""

    def __init__(self, app: ASGIApp, metrics: Metrics, admission: Admission, tracer: Tracer | None = None) -> None:
        self._app = app
        self._tracer = tracer
        self._metrics = metrics
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send, request_id(scope), self._admission)
        enter_request(answer.request_id)
        tracer = self._tracer if scope["path"] not in QUIET_PATHS else None
        with serve(tracer, "HTTP", {} if tracer is None else _carrier(scope)) as span:
            await self._handle(scope, receive, answer)
            if span is not None:
                _describe(span, scope, answer)

    async def _handle(self, scope: Scope, receive: Receive, answer: "_Answer") -> None:
        scope.setdefault("state", {})["request_id"] = answer.request_id
        began_s = scope["state"]["began_s"] = time.perf_counter()
        try:
            _check_headers(scope)
            with self._admission.admitted(scope["path"]):
                self._metrics.in_progress.set(self._admission.num_running)
                await self._app(scope, receive, answer.send)
        except ClientGone:
            answer.status = CLIENT_GONE_STATUS
        except asyncio.CancelledError:  # by the server, whose grace is over
            if answer.started or not self._admission.is_stopping:
                raise
            await describe(stopping()).response()(scope, receive, answer.send)
        except (Refused, Overloaded, Unavailable) as error:
            await describe(error).response()(scope, receive, answer.send)
        except Exception as error:
            _log.exception("request failed", request_id=answer.request_id)
            if not answer.started:
                await describe(error).response()(scope, receive, answer.send)
        finally:
            self._metrics.in_progress.set(self._admission.num_running)
            self._tell(scope, answer, time.perf_counter() - began_s)

    def _tell(self, scope: Scope, answer: "_Answer", seconds: float) -> None:
        route = _route(scope)
        method = scope["method"]
        self._metrics.answered(route=route, method=method, status=answer.status, seconds=seconds)
        if route not in QUIET_PATHS:
            caller = Caller.of_scope(scope)
            _log.info(
                "request",
                request_id=answer.request_id,
                method=method,
                route=route,
                status=answer.status,
                seconds=round(seconds, 4),
                **(caller.facts() if caller else {}),
                **Meter.facts_of(scope),
            )


class _Answer:
    """Watches what is sent, and adds the request id to the headers, and that no more are taken."""

    def __init__(self, send: Send, id_: str, admission: Admission) -> None:
        self._send = send
        self._admission = admission
        self.request_id = id_
        self.started = False
        self.status = CLIENT_GONE_STATUS  # until an answer starts

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self.request_id.encode())]
            if self._admission.is_stopping:
                message["headers"].append((b"connection", b"close"))
        await self._send(message)


def _route(scope: Scope) -> str:
    return getattr(scope.get("route"), "path", "unmatched")


def _carrier(scope: Scope) -> dict[str, str]:
    """What a client says of its trace."""
    return {
        name.decode("ascii"): value.decode("latin-1") for name, value in scope["headers"] if name in _TRACE_HEADERS
    }


def _describe(span: Span, scope: Scope, answer: _Answer) -> None:
    """Say what a request was, without anything that stands in it."""
    method = scope["method"] if scope["method"] in METHODS else "other"
    span.rename(f"{method} {_route(scope)}")
    span.set(
        {
            "http.request.method": method,
            "http.route": _route(scope),
            "http.response.status_code": answer.status,
            "softprompt.request_id": answer.request_id,
            **{f"softprompt.{name}": value for name, value in Meter.facts_of(scope).items()},
        }
    )
    if answer.status >= 500:
        span.fail(str(answer.status))
